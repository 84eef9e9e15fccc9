"""Score implicit matching on 1-D Gaussians by quadrature: the theorem, its distances, and SiD as its special case."""

import copy

import pytest
import torch
from tests.objectives.gaussians import (
    MU,
    SGD,
    SIGMA,
    Quadrature,
    S,
    affine_generator,
    gaussian,
    gradient,
    numbers,
    quadrature,
)  # fmt: skip
from torch import nn
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.contracts.batch import PointBatch
from potstill.divergences import PowerScore, PseudoHuber, SquaredScore
from potstill.methods.diffusion.sid import ScoreIdentity
from potstill.methods.diffusion.sim import SIM, ScoreImplicit
from potstill.models.denoisers import MixtureDenoiser
from potstill.noise.gaussian import LogUniform
from potstill.objectives.matching import AffineScore, Bare, Comparison, DistributionMatching, NoisePower

DISTANCES = [SquaredScore(), PseudoHuber(0.3), PowerScore(4.0)]  # smooth ones: quadrature is exact


def implicit(distance, **options):
    return quadrature(ScoreImplicit, distance=distance, space="score", elements="sum", **options)


def divergence_derivative(distance, moves_points: bool) -> torch.Tensor:
    """d/d(mu, s) of E[d(s_S - s_T)] at sigma, by autograd of the quadrature; pi_t held fixed unless `moves_points`."""
    mu, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (MU, S))
    place = (mu, s) if moves_points else (MU, S)
    x_t = place[0] + place[1] * Quadrature.z + SIGMA * Quadrature.eps
    gap = -(x_t - mu) / (s**2 + SIGMA**2) + x_t / (1 + SIGMA**2)
    return torch.stack(torch.autograd.grad((Quadrature.node_weight * distance(gap)).sum(), [mu, s]))


@pytest.mark.parametrize("distance", DISTANCES, ids=repr)
def test_the_surrogate_has_the_gradient_of_the_divergence_with_its_law_held(distance):
    assert_close(gradient(implicit(distance)), divergence_derivative(distance, False), rtol=1e-6, atol=1e-8)


FIXTURE = {SquaredScore(): (0.6195147, -0.2716334), PseudoHuber(0.3): (0.5991706, -0.1125381)}
WHOLE = {SquaredScore(): (0.5405162, -0.2543145), PseudoHuber(0.3): (0.5227663, -0.1053629)}


@pytest.mark.parametrize("distance", FIXTURE, ids=repr)
def test_the_numbers_and_what_is_left_out(distance):
    """The whole derivative of the divergence moves its law too: another number, on purpose."""
    found = gradient(implicit(distance))
    assert_close(found, numbers(*FIXTURE[distance]), rtol=0, atol=2e-7)
    whole = divergence_derivative(distance, True)
    assert_close(whole, numbers(*WHOLE[distance]), rtol=0, atol=2e-7)
    assert not torch.allclose(found, whole, rtol=0.03)


@pytest.mark.parametrize("distance", FIXTURE, ids=repr)
def test_a_detached_slope_would_lose_half_of_the_spread_s_gradient(distance):
    class Detached(ScoreImplicit):
        def surrogate(self, at, step):
            slope = self.distance.slope((at.fake - at.teacher) / SIGMA**2).detach()
            return -(slope * (at.fake - at.x) / SIGMA**2).sum(1)

    held = gradient(quadrature(Detached, distance=distance))
    assert_close(held, numbers(1.0, 0.5) * gradient(implicit(distance)), rtol=1e-6, atol=1e-9)


def test_the_squared_distance_is_twice_sid_sample_by_sample():
    values = {}
    for name, objective in {
        "sim": implicit(SquaredScore()), "sid": quadrature(ScoreIdentity, alpha=1.0, elements="sum"),
    }.items():  # fmt: skip
        at = objective.compare(Quadrature.batch, 0, objective.generate(Quadrature.batch, 0))
        values[name] = objective.matching(at, 0)
    assert_close(values["sim"], 2 / SIGMA**4 * values["sid"])
    in_denoisers = quadrature(ScoreImplicit, distance=SquaredScore(), elements="sum")
    at = in_denoisers.compare(Quadrature.batch, 0, in_denoisers.generate(Quadrature.batch, 0))
    assert_close(in_denoisers.matching(at, 0), 2 * values["sid"])


def test_a_large_c_is_the_squared_distance():
    c = 1e4
    assert_close(2 * c * gradient(implicit(PseudoHuber(c))), gradient(implicit(SquaredScore())), rtol=1e-6, atol=1e-8)


def test_weights_of_the_level_are_explicit():
    plain, weighted = implicit(PseudoHuber(0.3)), implicit(PseudoHuber(0.3), normaliser=NoisePower(-2))
    assert_close(gradient(weighted), SIGMA**2 * gradient(plain))


def test_in_denoisers_c_is_a_root_mean_square_whatever_the_size():
    """A sample written four times over has the same loss an element; in scores it has not."""
    parts = [keyed.normal_like(k, torch.arange(3), torch.empty(3, 5)).double() for k in range(3)]

    def at(times):
        x, teacher, fake = (p.repeat(1, times) for p in parts)
        return Comparison(x, x, torch.ones(3).double(), teacher, fake, None)

    for space, same in (("denoiser", True), ("score", False)):
        objective = quadrature(ScoreImplicit, distance=PseudoHuber(0.5), space=space, elements="mean")
        assert torch.allclose(objective.matching(at(1), 0), objective.matching(at(4), 0)) is same


def test_the_update_is_bounded_whatever_the_gap():
    """Self-normalised: however far the scores are apart, d'(y) is shorter than 1."""
    gap = 1e4 * torch.randn(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (PseudoHuber(0.03).slope(gap).flatten(1).norm(dim=1) <= 1).all()


def test_any_frozen_field_is_orthogonal_to_the_noise_of_the_fake_score():
    """E[u(x_t) (D_S - x)] = 0 at every level and for any u, by Monte Carlo through the engine's own noise."""
    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    generator = affine_generator()
    objective = DistributionMatching(
        generator, MixtureDenoiser(gaussian(0, 1)), fake=AffineScore(generator), seed=0, optimizer=SGD,
        fake_optimizer=SGD, levels=LogUniform(0.1, 3.0), ema=None, normaliser=Bare(),
    )  # fmt: skip
    batch = PointBatch(torch.arange(20000), torch.zeros(20000, 1))
    with torch.no_grad():
        x = generator(objective.latents(batch, 0).double())
        at = objective.compare(batch, 0, x)
        products = (u(at.x_t) * (at.fake - at.x))[:, 0]
        wrong = (u(at.x_t) * (at.teacher - at.x))[:, 0]
    error = products.std() / len(products) ** 0.5
    assert products.mean().abs() < 3 * error
    assert wrong.mean().abs() > 6 * error, "the teacher's denoiser is no student's"


def test_the_defaults_say_what_is_sourced():
    config = SIM()
    assert config.distance == PseudoHuber(0.03) and config.space == "denoiser" and config.sigma_init == 2.5
    assert copy.deepcopy(config) == config
