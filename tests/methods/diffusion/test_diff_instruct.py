"""Diff-Instruct on 1-D Gaussians by quadrature."""

import torch
from tests.objectives.gaussians import MU, SIGMA, S, affine_generator, gaussian, gradient, quadrature
from torch.testing import assert_close

from potstill.contracts.players import OptimizerSpec
from potstill.methods.diffusion.diff_instruct import DiffInstruct, objective_of
from potstill.models.denoisers import MixtureDenoiser
from potstill.noise.gaussian import LogNormal
from potstill.objectives.matching import Bare, DistributionMatching, TeacherError

ADAM = OptimizerSpec(optimizer="adam")


def test_the_coded_field_is_the_integral_kl_with_weight_sigma_squared():
    """d/d(mu, s) KL(N(mu, s^2 + sigma^2) || N(0, 1 + sigma^2)), by autograd of the closed form."""
    mu, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (MU, S))
    a, b = s**2 + SIGMA**2, torch.tensor(1 + SIGMA**2)
    kl = ((b / a).log() + (a + mu**2) / b - 1) / 2
    expected = SIGMA**2 * torch.stack(torch.autograd.grad(kl, [mu, s]))
    assert_close(gradient(quadrature(DistributionMatching, elements="sum")), expected)


def test_the_paper_s_choices():
    config = DiffInstruct(exact=True)
    objective = objective_of(config, affine_generator(), MixtureDenoiser(gaussian(0, 1)), ADAM, seed=0)
    assert objective.elements == "sum" and objective.normaliser == Bare() and objective.scale == 1.0
    assert objective.levels == objective.fake_levels == LogNormal(-1.2, 1.2)
    assert objective.fake_first and config.generator_every == 1 and config.sigma_init == 1.0
    assert config.fake.betas == (0.0, 0.999) and config.fake.lr == 1e-5
    normalised = DiffInstruct(exact=True, normaliser="TeacherError")
    assert (
        objective_of(normalised, affine_generator(), MixtureDenoiser(gaussian(0, 1)), ADAM, seed=0).normaliser
        == TeacherError()
    )
