"""SiD on 1-D Gaussians by quadrature, and its form as coded."""

import pytest
import torch
from tests.objectives.gaussians import SIGMA, affine_generator, gaussian, gradient, numbers, quadrature
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.contracts.players import OptimizerSpec
from potstill.methods.diffusion.sid import ScoreIdentity, SiD, objective_of
from potstill.models.denoisers import MixtureDenoiser
from potstill.objectives.matching import Comparison, DistributionMatching

ADAM = OptimizerSpec(optimizer="adam")


def test_alpha_one_is_half_of_the_squared_score_difference():
    """In scores: the surrogate's gradient times 2 / sigma^4."""
    found = gradient(quadrature(ScoreIdentity, alpha=1.0, elements="sum"))
    assert_close(2 * found / SIGMA**4, numbers(0.6195147, -0.2716334), rtol=0, atol=2e-7)


def test_alpha_adds_the_gradient_of_the_squared_difference_of_denoisers():
    one, other = (gradient(quadrature(ScoreIdentity, alpha=a)) for a in (1.0, 1.2))

    class Squared(ScoreIdentity):
        def surrogate(self, at, step):
            return ((at.teacher - at.fake) ** 2).flatten(1).sum(1)

    assert_close(other, one - 0.2 * gradient(quadrature(Squared)))


def coded(at: Comparison, alpha: float) -> torch.Tensor:
    """(y_real - y_fake) ((y_real - y) - alpha (y_real - y_fake)) / max(mean |y - y_real|, 1e-5), summed, times 100."""
    gap = at.teacher - at.fake
    om = (at.x - at.teacher).abs().mean((1, 2, 3), keepdim=True).detach().clamp(min=1e-5)
    return 100 * (gap * ((at.teacher - at.x) - alpha * gap) / om).sum((1, 2, 3))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_it_is_the_published_loss_sample_by_sample(alpha):
    parts = [keyed.normal_like(k, torch.arange(3), torch.empty(3, 2, 4, 4)).double() for k in range(3)]
    parts[0][1], parts[2][1] = parts[1][1], parts[1][1] + 1e-7  # a teacher without error: om is at its least
    x, teacher, fake = (p.requires_grad_() for p in parts)
    at = Comparison(x, x, torch.ones(3), teacher, fake, None)
    config = SiD(alpha=alpha, exact=True)
    objective = objective_of(config, affine_generator(), MixtureDenoiser(gaussian(0, 1)), ADAM, seed=0)
    found, expected = objective.scale * objective.matching(at, 0), coded(at, alpha)
    assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(v.sum(), [x, teacher, fake]) for v in (found, expected))):
        assert_close(a, b)


def test_with_detached_networks_it_would_be_another_method():
    """The gradient left is that through x: Diff-Instruct's field, with the other sign and magnitude of s."""

    class Detached(ScoreIdentity):
        through = False

    held = gradient(quadrature(Detached, alpha=1.0, elements="sum"))
    assert_close(held, gradient(quadrature(DistributionMatching, elements="sum")))
    assert not torch.allclose(held, gradient(quadrature(ScoreIdentity, alpha=1.0, elements="sum")), rtol=0.05)


def test_levels_are_four_fifths_of_karras():
    low, high = SiD().levels.of_uniform(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert low == pytest.approx(0.002) and high == pytest.approx((0.8 * 80 ** (1 / 7) + 0.2 * 0.002 ** (1 / 7)) ** 7)
    assert SiD().alpha == 1.2 and SiD().sigma_init == 2.5 and SiD().scale == 100
