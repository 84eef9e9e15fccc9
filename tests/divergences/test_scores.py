"""Score divergences where everything is known: normals in one and two dimensions, integrated by quadrature.

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
    Huber,
    PowerScore,
    PseudoHuber,
    ScoreDistance,
    SquaredScore,
    expanded,
    fisher,
    integral_kl,
    score_implicit,
    sid,
    with_score_gradient,
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


SLICES = {  # derivatives of the slice in (mu, s), by finite differences
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
    """The paper's JS is twice ours; its squared Hellinger is ours."""
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


@pytest.mark.parametrize(
    ("distance", "expected"),
    [(SquaredScore(), (0.6195147, -0.2716334)), (PseudoHuber(0.3), (0.5991706, -0.1125381))],
    ids=["squared", "pseudo-huber"],
)
def test_score_implicit_matching_by_the_card_s_numbers(distance, expected):
    """With d'(gap) held fixed only the deviation's half is lost: a mean alone would not show it."""
    case = Case()
    got = case.gradient(score_implicit(distance, **case.scores))
    assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)
    case = Case()
    slope = distance.slope(case.scores["student_score"] - case.scores["teacher_score"]).detach()
    held = -(slope * (case.scores["student_score"] - case.scores["conditional_score"]))[:, 0]
    assert_close(case.gradient(held), got * torch.tensor([1.0, 0.5]).double(), rtol=1e-6, atol=1e-8)


def test_any_field_is_orthogonal_to_the_noise_of_the_score():
    """E[u(x_t) (student_score - conditional_score)] = 0: sees every mistake of sign or scale in a conditional score."""
    case = Case()
    noise = (case.scores["student_score"] - case.scores["conditional_score"])[:, 0]
    for field in (torch.sin, torch.exp, lambda x: x**3 + 1):
        assert abs((MASS * field(case.x_t[:, 0]) * noise).sum()) < 1e-9
    assert (MASS * noise**2).sum() > 0.1


def test_integral_kl_has_the_gradient_of_the_kl():
    """KL(N(mu, v) || N(0, w)) = (log(w / v) + (v + mu^2) / w - 1) / 2 at the noised variances."""
    case = Case()
    given = {k: v for k, v in case.scores.items() if k != "conditional_score"}
    got = case.gradient(integral_kl(case.x_t, **given))
    v, w = case.s**2 + SIGMA**2, 1 + SIGMA**2
    closed = ((w / v).log() + (v + case.mu**2) / w - 1) / 2
    assert_close(got, torch.stack(torch.autograd.grad(closed, [case.mu, case.s])), rtol=1e-8, atol=1e-10)


def noised(mu, s):
    """(x_t, mass) of the student's noised law, by one-dimensional quadrature."""
    deviation = (torch.as_tensor(s, dtype=torch.float64) ** 2 + SIGMA**2) ** 0.5
    return mu + deviation * torch.tensor(nodes), torch.tensor(mass / np.sqrt(2 * np.pi))


MEMBERS = [ForwardKL(), ReverseKL(), JensenShannon(0.3), SquaredHellinger(), PearsonChi2(), Jeffreys()]


@pytest.mark.parametrize("divergence", MEMBERS, ids=repr)
def test_weighed_by_r2_f2_it_has_the_gradient_of_the_f_divergence(divergence):
    def value(mu, s):
        x, weight = noised(mu, s)
        return (weight * divergence.f(log_normal(x, 0.0, 1.0) - log_normal(x, mu, s))).sum()

    case = Case()
    expected = torch.autograd.grad(value(case.mu, case.s), [case.mu, case.s])
    given = {k: v for k, v in case.scores.items() if k != "conditional_score"}
    got = case.gradient(divergence.score_weight(case.log_ratio) * integral_kl(case.x_t, **given))
    assert_close(got, torch.stack(expected), rtol=1e-6, atol=1e-8)


CLOSED = {  # teacher N(0, 1), student N(0.6, 0.81); the paper's Jensen-Shannon is twice ours
    ForwardKL(): 0.234145,
    ReverseKL(): 0.190361,
    JensenShannon(0.5): 0.099087 / 2,
    PearsonChi2(): 0.838485,
    Jeffreys(): 0.424506,
    SquaredHellinger(): 0.0511398,
    SoftenedReverseKL(): 0.0912735,
}


@pytest.mark.parametrize("divergence", CLOSED, ids=repr)
def test_the_slices_integrate_to_the_divergence(divergence):
    """D_f(p_0, q_0) = 1/2 int_0^S E_q[F |gap|^2] d(sigma^2) + D_f at S."""
    mu, s = PLACE
    t, weight = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(60))
    top = np.log1p(50.0)
    square = torch.expm1((t + 1) / 2 * top)[:, None]  # sigma^2, even in log(1 + sigma^2)

    def at(square):
        v_p, v_q = 1 + square, s**2 + square
        x = mu + v_q.sqrt() * torch.tensor(nodes)
        u = (-(x**2) / v_p + (x - mu) ** 2 / v_q - (v_p / v_q).log()) / 2
        return u, -x / v_p, -(x - mu) / v_q

    normal = torch.tensor(mass / np.sqrt(2 * np.pi))
    u, teacher, student = at(square)
    values = divergence.score_weight(u) * fisher(
        teacher_score=teacher.flatten()[:, None], student_score=student.flatten()[:, None]
    ).view_as(u)
    inside = 0.5 * (weight * top / 2 * (1 + square[:, 0]) * (values @ normal)).sum()
    outside = (divergence.f(at(torch.tensor([[50.0]]).double())[0]) @ normal)[0]
    assert (inside + outside).item() == pytest.approx(CLOSED[divergence], abs=3e-6)
    assert outside < 0.02 * inside


TABLE = {  # F, r^2 F'' and F - r F' of the ratio
    ForwardKL(): (lambda r: r, lambda r: 0 * r, lambda r: 0 * r),
    ReverseKL(): (lambda r: 0 * r + 1, lambda r: 0 * r, lambda r: 0 * r + 1),
    JensenShannon(0.5): (
        lambda r: r / (r + 1) / 2,
        lambda r: -(r**2) / (r + 1) ** 3,
        lambda r: r**2 / (r + 1) ** 2 / 2,
    ),
    PearsonChi2(): (lambda r: 2 * r**2, lambda r: 4 * r**2, lambda r: -2 * r**2),
    Jeffreys(): (lambda r: r + 1, lambda r: 0 * r, lambda r: 0 * r + 1),
    SquaredHellinger(): (lambda r: r**0.5 / 4, lambda r: -(r**0.5) / 16, lambda r: r**0.5 / 8),
    SoftenedReverseKL(): (
        lambda r: 1 / (1 + r),
        lambda r: 2 * r**2 / (1 + r) ** 3,
        lambda r: (1 + 2 * r) / (1 + r) ** 2,
    ),
}


def leaves() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("x_t", "teacher_score", "student_score", "conditional_score")
    found = {k: torch.randn(4, 2, 3, generator=generator, dtype=torch.float64) for k in names}
    found["log_ratio"] = torch.tensor([-3.0, -0.2, 0.0, 2.5], dtype=torch.float64)
    return {k: v.requires_grad_() for k, v in found.items()}


def gradients(at: dict[str, Tensor], value: Tensor) -> dict[str, Tensor]:
    """Those that are there and more than rounding."""
    found = zip(at, torch.autograd.grad(value.sum(), list(at.values()), allow_unused=True))
    return {k: g for k, g in found if g is not None and (g.abs() > 1e-12).any()}


@pytest.mark.parametrize("divergence", TABLE, ids=repr)
def test_each_part_at_one_point(divergence):
    """Its weights are the paper's, its sign is right, and its gradient goes where it should and nowhere else."""
    F, r2F2, F_rF1 = (of(leaves()["log_ratio"].detach().exp())[:, None, None] for of in TABLE[divergence])
    at = leaves()
    gap = (at["student_score"] - at["teacher_score"]).detach()
    noise = (at["student_score"] - at["conditional_score"]).detach()
    square = (gap**2).sum((1, 2), keepdim=True)

    got = gradients(at, expanded(divergence, **at, parts=["ratio"]))
    assert set(got) == ({"x_t"} if (r2F2 != 0).any() else set())
    if got:
        assert_close(got["x_t"], r2F2 * square * gap)

    got = gradients(at, expanded(divergence, **at, parts=["sampling"]))
    if (F_rF1 != 0).any():
        assert set(got) == {"teacher_score", "student_score"}
        assert_close(got["student_score"], 2 * F_rF1 * gap)
        assert_close(got["teacher_score"], -2 * F_rF1 * gap)

    value = expanded(divergence, **at, parts=["score"])
    assert_close(value, (-2 * F * gap * noise).sum((1, 2)))
    got = gradients(at, value)
    assert_close(got["student_score"], -2 * F * (gap + noise))
    assert_close(got["teacher_score"], 2 * F * noise)
    assert_close(got["conditional_score"], 2 * F * gap)
    if ((F - F_rF1) != 0).any():  # r F'
        assert_close(got["log_ratio"], (-2 * (F - F_rF1) * gap * noise).sum((1, 2)))
    held = gradients(at, expanded(divergence, **at, parts=["score"], detach_ratio=True))
    assert "log_ratio" not in held
    assert_close(held["student_score"], got["student_score"])

    whole = gradients(at, expanded(divergence, **at))
    assert_close(whole["student_score"], -2 * F * (gap + noise) + 2 * F_rF1 * gap)


def test_integral_kl_moves_the_points_alone():
    at = leaves()
    value = integral_kl(at["x_t"], teacher_score=at["teacher_score"], student_score=at["student_score"])
    got = gradients(at, value)
    assert set(got) == {"x_t"} and value.shape == (4,)
    assert_close(got["x_t"], (at["student_score"] - at["teacher_score"]).detach())


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(0.3)], ids=repr)
def test_a_ratio_without_a_gradient_of_its_own_can_have_the_scores(divergence):
    case, other = Case(), Case()
    given = {k: v for k, v in other.scores.items() if k != "conditional_score"}
    ratio = with_score_gradient(-other.log_ratio + 2 * other.log_ratio.detach(), other.x_t, **given)
    assert_close(ratio, other.log_ratio)  # in value; its own gradient is wrong, and goes
    at = leaves()
    two = {k: at[k] for k in ("teacher_score", "student_score")}
    value = with_score_gradient(at["log_ratio"], at["x_t"], **two)
    found = torch.autograd.grad(value.sum(), list(at.values()), allow_unused=True)
    assert [k for k, g in zip(at, found, strict=True) if g is not None] == ["x_t"]
    assert_close(found[0], (at["teacher_score"] - at["student_score"]).detach())
    got = other.gradient(expanded(divergence, other.x_t, log_ratio=ratio, **other.scores))
    assert_close(got, case.gradient(expanded(divergence, case.x_t, log_ratio=case.log_ratio, **case.scores)))


class Plane:
    """Diagonal normals of two dimensions: teacher N(0, diag(1, 4)), student mu + s z, integrated over z and eps."""

    mu, s, w = (torch.tensor(x, dtype=torch.float64) for x in ([0.6, -0.4], [0.9, 1.5], [1.0, 4.0]))

    def __init__(self, size: int = 14) -> None:
        at, weight = np.polynomial.hermite_e.hermegauss(size)
        grid = torch.tensor(np.stack([x.flatten() for x in np.meshgrid(at, at, at, at)], -1))
        self.mass = torch.tensor(np.prod(np.meshgrid(*[weight / np.sqrt(2 * np.pi)] * 4), axis=0).flatten())
        self.at = [self.mu.clone().requires_grad_(), self.s.clone().requires_grad_()]
        self.x_0 = self.at[0] + self.at[1] * grid[:, :2]
        self.x_t = self.x_0 + SIGMA * grid[:, 2:]
        self.scores = {
            "teacher_score": -self.x_t / (self.w + SIGMA**2),
            "student_score": -(self.x_t - self.mu) / (self.s**2 + SIGMA**2),
            "conditional_score": -(self.x_t - self.x_0) / SIGMA**2,
        }
        self.log_ratio = self.ratio(self.x_t, self.mu, self.s)

    def ratio(self, x, mu, s):
        v, w = s**2 + SIGMA**2, self.w + SIGMA**2
        return (((x - mu) ** 2 / v - x**2 / w - (w / v).log()) / 2).sum(-1)

    def gradient(self, values_B: Tensor) -> Tensor:
        return torch.stack(torch.autograd.grad((self.mass * values_B).sum(), self.at))


def test_in_two_dimensions_the_distance_takes_the_norm_of_a_whole_sample():
    plane = Plane()
    got = plane.gradient(score_implicit(PseudoHuber(0.5), **plane.scores))
    x = plane.x_t.detach()
    gap = -(x - plane.at[0]) / (plane.at[1] ** 2 + SIGMA**2) + x / (plane.w + SIGMA**2)
    assert_close(got, plane.gradient(((gap**2).sum(-1) + 0.25).sqrt()), rtol=2e-4, atol=2e-5)


def test_in_two_dimensions_integral_kl_has_the_gradient_of_the_kl():
    plane = Plane()
    given = {k: v for k, v in plane.scores.items() if k != "conditional_score"}
    v, w = plane.at[1] ** 2 + SIGMA**2, plane.w + SIGMA**2
    closed = (((w / v).log() + (v + plane.at[0] ** 2) / w - 1) / 2).sum()
    got = plane.gradient(integral_kl(plane.x_t, **given))
    assert_close(got, torch.stack(torch.autograd.grad(closed, plane.at)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon(0.5), SquaredHellinger()], ids=repr)
def test_in_two_dimensions_the_expansion_has_the_gradient_of_the_slice(divergence):
    plane = Plane()
    got = plane.gradient(expanded(divergence, plane.x_t, log_ratio=plane.log_ratio, **plane.scores))
    at, weight = np.polynomial.hermite_e.hermegauss(40)
    grid = torch.tensor(np.stack([x.flatten() for x in np.meshgrid(at, at)], -1))
    weight = torch.tensor(np.outer(weight, weight).flatten() / (2 * np.pi))

    def slice_at(mu, s):
        x = mu + (s**2 + SIGMA**2).sqrt() * grid
        gap = -(x - mu) / (s**2 + SIGMA**2) + x / (plane.w + SIGMA**2)
        return (weight * divergence.score_weight(plane.ratio(x, mu, s)) * (gap**2).sum(-1)).sum()

    h, step = 1e-4, torch.eye(2, dtype=torch.float64)
    mu, s = plane.mu, plane.s
    expected = [[slice_at(mu + h * e, s) - slice_at(mu - h * e, s) for e in step]]
    expected.append([slice_at(mu, s + h * e) - slice_at(mu, s - h * e) for e in step])
    expected = torch.stack([torch.stack(row) for row in expected]) / (2 * h)
    assert_close(got, expected, rtol=1e-3, atol=2e-4)


def test_sid_in_denoisers_is_score_implicit_matching():
    """D = x_t + sigma^2 score: at alpha 1 half of the squared distance's surrogate, times sigma^4."""
    case = Case()
    denoised = {k: case.x_t + SIGMA**2 * case.scores[f"{k}_score"] for k in ("teacher", "student")}
    values = sid(case.x_0, **denoised)
    assert_close(2 * values / SIGMA**4, score_implicit(SquaredScore(), **case.scores))
    gap = (denoised["teacher"] - denoised["student"])[:, 0]
    assert_close(sid(case.x_0, **denoised, alpha=1.2), values - 0.2 * gap**2)


DISTANCES = [SquaredScore(), PseudoHuber(0.2), PowerScore(1.5), PowerScore(3.0), Huber(2.0), Huber(100.0)]


@pytest.mark.parametrize("distance", DISTANCES, ids=repr)
def test_distances_and_their_slopes(distance):
    gap = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    value = distance(gap)
    assert value.shape == (5,) and (value > 0).all()
    assert_close(torch.autograd.grad(value.sum(), gap)[0], distance.slope(gap))
    assert_close(ScoreDistance.slope(distance, gap), distance.slope(gap))  # what a member without one of its own has
    assert torch.autograd.gradcheck(distance.slope, gap)
    zero = torch.zeros(2, 3, requires_grad=True)
    assert_close(distance(zero), torch.zeros(2))
    for at_zero in (distance(zero), distance.slope(zero)):
        assert torch.autograd.grad(at_zero.sum(), zero)[0].isfinite().all()


def test_distances_by_their_formulas():
    gap = torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = gap.flatten(1).norm(dim=1)
    assert_close(PseudoHuber(0.2)(gap), (norm**2 + 0.04).sqrt() - 0.2)
    assert (PseudoHuber(0.2).slope(gap).flatten(1).norm(dim=1) < 1).all()
    assert_close(2e6 * PseudoHuber(1e6)(gap), norm**2)
    assert_close(PowerScore(1.5)(gap), norm**1.5)
    assert_close(PowerScore(2.0)(gap), SquaredScore()(gap))
    assert (norm > 2).any() and (norm < 2).any()
    assert_close(Huber(2.0)(gap), torch.where(norm < 2, norm**2 / 2, 2 * norm - 2))
    assert_close(fisher(teacher_score=torch.zeros_like(gap), student_score=gap), norm**2)


def test_low_precision_is_promoted_before_anything_is_taken_apart():
    """In bfloat16 numbers so unlike have no difference of their own."""
    at = {k: v.detach() for k, v in leaves().items() if k != "log_ratio"}
    at = {k: (v * scale).bfloat16() for (k, v), scale in zip(at.items(), (1.0, 30.0, 0.1, 7.0), strict=True)}
    three = ("teacher_score", "student_score", "conditional_score")
    ratio = torch.tensor([-3.0, -0.25, 0.0, 2.5])  # the same in bfloat16

    def values(at):
        scores = {k: at[k] for k in three}
        two = {k: at[k] for k in three[:2]}
        return {
            "fisher": fisher(**two),
            "integral_kl": integral_kl(at["x_t"], **two),
            "implicit": score_implicit(PseudoHuber(0.2), **scores),
            "sid": sid(at["x_t"], teacher=at["teacher_score"], student=at["student_score"], alpha=1.2),
            "expanded": expanded(JensenShannon(), at["x_t"], log_ratio=ratio.to(at["x_t"].dtype), **scores),
        }

    exact = values({k: v.double() for k, v in at.items()})
    for name, value in values(at).items():
        assert value.dtype == torch.float32
        assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("divergence", [JensenShannon(0.3), SoftenedReverseKL(), SquaredHellinger()], ids=repr)
def test_weights_of_large_ratios_keep_their_digits_in_float32(divergence):
    """Derivatives of f that cancel: where the weight is small, all digits of a difference in float32 are gone."""
    at = {k: v.detach() for k, v in leaves().items()} | {"log_ratio": torch.tensor([-9.0, -5.0, 8.0, 12.0]).double()}
    low = {k: v.float() for k, v in at.items()}
    for part in ("score", "sampling"):
        exact = expanded(divergence, **{k: v.double() for k, v in low.items()}, parts=[part])
        assert_close(expanded(divergence, **low, parts=[part]).double(), exact, rtol=2e-6, atol=0)


def test_bad_input_is_said():
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ModelError, match=r"fisher compares scores of one shape"):
        fisher(teacher_score=a, student_score=b)
    with pytest.raises(RecipeError, match="PseudoHuber.c must be positive"):
        PseudoHuber(0)
    with pytest.raises(RecipeError, match="Huber.c must be positive, got -1"):
        Huber(-1)
    with pytest.raises(RecipeError, match=r"PowerScore.power must be above 1, got 1: below, the slope jumps"):
        PowerScore(1)
    pair = {"teacher_score": a, "student_score": a}
    with pytest.raises(ModelError, match=r"got conditional_score \[2, 1\] and student \[2, 3\]"):
        score_implicit(SquaredScore(), **pair, conditional_score=a[:, :1])
    with pytest.raises(ModelError, match=r"integral_kl .* got x_t \[2, 1\]"):
        integral_kl(a[:, :1], **pair)
    with pytest.raises(ModelError, match=r"sid .* got x_0 \[3\]"):
        sid(a[0], teacher=a, student=a)
    with pytest.raises(ModelError, match=r"with_score_gradient .* got x_t \[2, 4\]"):
        with_score_gradient(torch.zeros(2), b, **pair)
    with pytest.raises(ModelError, match=r"expanded .* got x_t \[2, 4\]"):
        expanded(ReverseKL(), b, log_ratio=torch.zeros(2), **pair, conditional_score=a)
    scores = dict.fromkeys(("teacher_score", "student_score", "conditional_score"), a)
    with pytest.raises(ModelError, match="one log-ratio a sample"):
        expanded(ReverseKL(), a, log_ratio=a, **scores)
    with pytest.raises(RecipeError, match="knows the parts score, ratio, sampling, got di"):
        expanded(ReverseKL(), a, log_ratio=torch.zeros(2), parts=["di"], **scores)
