"""Score divergences where everything is known: one-dimensional normals, integrated by quadrature.

Teacher N(0, 1); student x_0 = mu + s z; x_t = x_0 + 0.7 eps. The networks are the exact scores, frozen at (mu, s).
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import ModelError, RecipeError
from potstill.divergences import (
    ForwardKL,
    Jeffreys,
    JensenShannon,
    PearsonChi2,
    ReverseKL,
    SoftenedReverseKL,
    SquaredHellinger,
)
from potstill.divergences.scores import (
    PseudoHuber,
    SquaredScore,
    expanded,
    fisher,
    integral_kl,
    score_implicit,
    sid,
)

SIGMA, PLACE = 0.7, (0.6, 0.9)
nodes, mass = np.polynomial.hermite_e.hermegauss(80)
Z, EPS = (torch.tensor(x.flatten()) for x in np.meshgrid(nodes, nodes))
MASS = torch.tensor(np.outer(mass, mass).flatten() / (2 * np.pi))


class Case:
    def __init__(self) -> None:
        self.mu, self.s = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in PLACE)
        self.x_0 = (self.mu + self.s * Z)[:, None]
        self.x_t = self.x_0 + SIGMA * EPS[:, None]
        self.scores = {
            "teacher_score": -self.x_t / (1 + SIGMA**2),
            "student_score": score(self.x_t, *PLACE),
            "conditional_score": -(self.x_t - self.x_0) / SIGMA**2,
        }
        self.log_ratio = (log_normal(self.x_t, 0.0, 1.0) - log_normal(self.x_t, *PLACE))[:, 0]

    def gradient(self, values_B: Tensor) -> Tensor:
        return torch.stack(torch.autograd.grad((MASS * values_B).sum(), [self.mu, self.s]))


def score(x, mu, s) -> Tensor:
    return -(x - mu) / (s**2 + SIGMA**2)


def log_normal(x, mu, s) -> Tensor:
    v = torch.as_tensor(s, dtype=torch.float64) ** 2 + SIGMA**2
    return -((x - mu) ** 2) / (2 * v) - v.log() / 2


SLICES = {  # the card's derivatives of the slice in (mu, s), checked there by finite differences
    ForwardKL(): (0.7100592, -0.9012289),
    ReverseKL(): (0.5405162, -0.2543145),
    PearsonChi2(): (3.6573776, -7.5198879),
    Jeffreys(): (1.2505754, -1.1555434),
    SoftenedReverseKL(): (0.2724431, -0.0380217),
}


@pytest.mark.parametrize("divergence", SLICES, ids=repr)
def test_the_expansion_has_the_gradient_of_the_slice(divergence):
    case = Case()
    got = case.gradient(expanded(divergence, case.x_t, log_ratio=case.log_ratio, **case.scores))
    assert_close(got, torch.tensor(SLICES[divergence], dtype=torch.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("divergence", "scale"), [(JensenShannon(0.5), 2.0), (SquaredHellinger(), 1.0)], ids=["js", "hellinger"]
)
def test_the_card_s_other_generators(divergence, scale):
    """The card's JS is twice ours; its squared Hellinger is ours."""
    expected = {2.0: (0.2680731, -0.2162928), 1.0: (0.1439367, -0.1233453)}[scale]
    case = Case()
    got = scale * case.gradient(expanded(divergence, case.x_t, log_ratio=case.log_ratio, **case.scores))
    assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.3), SquaredHellinger()], ids=repr)
def test_the_slice_by_finite_differences(divergence):
    """E_q[r^2 f''(r) |gap|^2] over x_t alone, differentiated in the student's mean and deviation."""
    x = torch.tensor(nodes) * 1.0

    def slice_at(mu, s):
        deviation = (s**2 + SIGMA**2) ** 0.5
        x_t = mu + deviation * x
        u = log_normal(x_t, 0.0, 1.0) - log_normal(x_t, mu, s)
        gap = score(x_t, mu, s) + x_t / (1 + SIGMA**2)
        return (torch.tensor(mass / np.sqrt(2 * np.pi)) * divergence.score_weight(u) * gap**2).sum()

    h, (mu, s) = 1e-4, PLACE
    expected = torch.stack(
        [
            (slice_at(mu + h, s) - slice_at(mu - h, s)) / (2 * h),
            (slice_at(mu, s + h) - slice_at(mu, s - h)) / (2 * h),
        ]
    )
    case = Case()
    got = case.gradient(expanded(divergence, case.x_t, log_ratio=case.log_ratio, **case.scores))
    assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_parts_of_the_reverse_kl():
    parts = {"score": (0.6195147, -0.2716334), "ratio": (0.0, 0.0), "sampling": (-0.0789985, 0.0173189)}
    for name, expected in parts.items():
        case = Case()
        value = expanded(ReverseKL(), case.x_t, log_ratio=case.log_ratio, parts=[name], **case.scores)
        assert_close(case.gradient(value), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


def test_a_detached_ratio_is_wrong_where_the_weight_is_not_constant():
    case = Case()
    got = case.gradient(expanded(ForwardKL(), case.x_t, log_ratio=case.log_ratio, detach_ratio=True, **case.scores))
    assert_close(got, torch.tensor([0.7100592, -0.5864312], dtype=torch.float64), rtol=0, atol=2e-6)


def test_the_forward_kl_is_its_score_part():
    case = Case()
    whole = case.gradient(expanded(ForwardKL(), case.x_t, log_ratio=case.log_ratio, **case.scores))
    again = Case()
    alone = again.gradient(expanded(ForwardKL(), again.x_t, log_ratio=again.log_ratio, parts=["score"], **again.scores))
    assert_close(whole, alone)


@pytest.mark.parametrize("distance", [SquaredScore(), PseudoHuber(0.3)], ids=repr)
def test_score_implicit_matching_moves_the_score_alone(distance):
    """E[d'(gap) d student_score / d theta] with the points held fixed."""
    case = Case()
    got = case.gradient(score_implicit(distance, **case.scores))
    fixed = case.x_t.detach()
    moving = score(fixed, case.mu, case.s)
    gap = moving + fixed / (1 + SIGMA**2)
    assert_close(got, case.gradient(distance(gap)), rtol=1e-6, atol=1e-8)


def test_integral_kl_has_the_gradient_of_the_kl():
    """KL(N(mu, v) || N(0, w)) = (log(w / v) + (v + mu^2) / w - 1) / 2 at the noised variances."""
    case = Case()
    given = {k: v for k, v in case.scores.items() if k != "conditional_score"}
    got = case.gradient(integral_kl(case.x_t, **given))
    v, w = case.s**2 + SIGMA**2, 1 + SIGMA**2
    closed = ((w / v).log() + (v + case.mu**2) / w - 1) / 2
    assert_close(got, torch.stack(torch.autograd.grad(closed, [case.mu, case.s])), rtol=1e-8, atol=1e-10)


def test_sid_in_denoisers_is_score_implicit_matching():
    """D = x_t + sigma^2 score: at alpha 1 half of the squared distance's surrogate, times sigma^4."""
    case = Case()
    denoised = {k: case.x_t + SIGMA**2 * case.scores[f"{k}_score"] for k in ("teacher", "student")}
    values = sid(case.x_0, **denoised)
    assert_close(2 * values / SIGMA**4, score_implicit(SquaredScore(), **case.scores))
    gap = (denoised["teacher"] - denoised["student"])[:, 0]
    assert_close(sid(case.x_0, **denoised, alpha=1.2), values - 0.2 * gap**2)


def test_distances_and_their_slopes():
    gap = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    for distance in (SquaredScore(), PseudoHuber(0.2)):
        value = distance(gap)
        assert value.shape == (5,)
        assert_close(torch.autograd.grad(value.sum(), gap)[0], distance.slope(gap))
        assert_close(distance(torch.zeros(2, 3)), torch.zeros(2))
    norm = gap.flatten(1).norm(dim=1)
    assert_close(PseudoHuber(0.2)(gap), (norm**2 + 0.04).sqrt() - 0.2)
    assert_close(fisher(teacher_score=torch.zeros_like(gap), student_score=gap), norm**2)


def test_bad_input_is_said():
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ModelError, match=r"fisher compares scores of one shape"):
        fisher(teacher_score=a, student_score=b)
    with pytest.raises(RecipeError, match="PseudoHuber.c must be positive"):
        PseudoHuber(0)
    scores = dict.fromkeys(("teacher_score", "student_score", "conditional_score"), a)
    with pytest.raises(ModelError, match="one log-ratio a sample"):
        expanded(ReverseKL(), a, log_ratio=a, **scores)
    with pytest.raises(RecipeError, match="knows the parts score, ratio, sampling, got di"):
        expanded(ReverseKL(), a, log_ratio=torch.zeros(2), parts=["di"], **scores)
