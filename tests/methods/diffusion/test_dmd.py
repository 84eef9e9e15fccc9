"""DMD: the field of its weight, and the regression on pairs of the teacher."""

import copy

import pytest
import torch
from tests.objectives.gaussians import SGD, SIGMA, Quadrature, affine_generator, gaussian, gradient, points, quadrature
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.methods.diffusion.dmd import DMD, PairedMatching, Pairs, draw_pairs, objective_of
from potstill.models.denoisers import MixtureDenoiser, OneStep, mlp_denoiser
from potstill.noise.gaussian import karras_grid
from potstill.noise.mixture import GaussianMixture
from potstill.noise.samplers import heun
from potstill.objectives.matching import DistributionMatching, TeacherError


def test_the_weight_of_the_scores_is_the_field_in_denoisers():
    """w_t (s_S - s_T) of equation 8, with w_t from its own definition."""
    objective = quadrature(DistributionMatching, normaliser=TeacherError(eps=0.0))
    at = objective.compare(Quadrature.batch, 0, objective.generate(Quadrature.batch, 0))
    s_T, s_S = ((d - at.x_t) / SIGMA**2 for d in (at.teacher, at.fake))
    weight = SIGMA**2 * at.x[0].numel() / (at.teacher - at.x).abs().sum(1, keepdim=True)
    assert_close(objective.field(at), (weight * (s_S - s_T)).detach())


def test_pairs_follow_the_flow_of_the_teacher():
    """Of a Gaussian the flow is linear: sigma z ends at mean + std sigma z / sqrt(std^2 + sigma^2), as the steps grow."""
    teacher, z = MixtureDenoiser(gaussian(0.0, 0.5)), torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64)
    expected = 0.5 * 5.0 * z / (0.25 + 25.0) ** 0.5
    error = [(draw_pairs(teacher, z, None, 5.0, n, size=2) - expected).abs().max().item() for n in (10, 80)]
    assert error[1] < 2e-3 and error[1] < 0.2 * error[0]
    assert_close(draw_pairs(teacher, z, None, 5.0, 10), heun(teacher, 5.0 * z, karras_grid(10, smax=5.0)))


def paired(weight: float = 0.25, teacher=None) -> PairedMatching:
    torch.manual_seed(0)
    teacher = teacher or mlp_denoiser(width=8, depth=1)
    ids = torch.arange(7)
    z, y = (keyed.normal_like(k, ids, torch.empty(7, 2)) for k in (1, 2))
    config = DMD(sigma_init=2.0, regression=weight)
    return objective_of(config, OneStep(copy.deepcopy(teacher), 2.0), teacher, SGD, 0, pairs=Pairs(z, y))


def test_the_regression_is_the_mean_square_over_pairs_drawn_by_id():
    objective, batch = paired(), points(6)
    with torch.no_grad():
        objective.generator.denoiser.network.output.bias.fill_(0.4)
    index = (keyed.uniform(keyed.key(0, "pair", 3), batch.ids_B) * 7).long()
    assert len(index.unique()) > 1
    z, y = objective.pairs.z[index], objective.pairs.y[index]
    expected = ((objective.generator(z) - y) ** 2).mean()
    loss = objective.loss("generator", batch, 3)
    assert_close(loss.terms["regression"].mean(), 0.25 * expected)
    assert_close(objective.pair_error(points(3, 3), 3), objective.pair_error(batch, 3)[3:], rtol=1e-5, atol=1e-6)
    assert not torch.equal(objective.pair_error(batch, 3), objective.pair_error(batch, 4))


def test_without_regression_it_is_distribution_matching():
    assert set(paired(0.0).loss("generator", points(4), 0).terms) == {"matching"}
    options = {"normaliser": TeacherError()}
    ours = quadrature(PairedMatching, pairs=None, regression=0.25, **options)
    assert_close(gradient(ours), gradient(quadrature(DistributionMatching, **options)))


def test_pairs_alone_would_pull_the_generator_to_the_teacher_s_map():
    """An affine generator and a Gaussian teacher: the regression vanishes where G(z) = std sigma z / sqrt(...)."""
    z = keyed.normal_like(3, torch.arange(50), torch.empty(50, 1)).double()
    y = draw_pairs(MixtureDenoiser(gaussian(0.0, 0.5)), z, None, 1.0, 60)
    for scale, small in ((0.5 / 1.25**0.5, True), (0.5, False)):
        generator = affine_generator(0.0, scale)
        objective = quadrature(PairedMatching, pairs=Pairs(z, y), regression=1.0)
        objective.generator = generator
        assert (objective.pair_error(points(20), 0).mean().item() < 1e-5) is small


def test_labels_go_with_their_pairs():
    torch.manual_seed(0)
    teacher = mlp_denoiser(width=8, depth=1, classes=3, conditional=True)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.2 * torch.randn_like(p))
    z, labels = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    y = draw_pairs(teacher, z, labels, 2.0, 3, size=2)
    alone = draw_pairs(teacher, z[3:4], labels[3:4], 2.0, 3)
    assert_close(y[3:4], alone)
    assert not torch.allclose(alone, draw_pairs(teacher, z[3:4], labels[1:2], 2.0, 3))
    objective = PairedMatching(
        OneStep(copy.deepcopy(teacher), 2.0), teacher, pairs=Pairs(z, y, labels), regression=1.0, seed=0,
        optimizer=SGD, fake_optimizer=SGD,
    )  # fmt: skip
    batch = points(4)
    index = (keyed.uniform(keyed.key(0, "pair", 0), batch.ids_B) * 5).long()
    expected = ((objective.generator(z[index], labels[index]) - y[index]) ** 2).mean(1)
    assert_close(objective.pair_error(batch, 0), expected)


@pytest.mark.parametrize("dimension", [1, 2])
def test_exact_mixtures_make_pairs_too(dimension):
    mixture = GaussianMixture(torch.zeros(1, dimension), 1.0)
    assert draw_pairs(MixtureDenoiser(mixture), torch.randn(3, dimension), None, 2.0, 4).shape == (3, dimension)
