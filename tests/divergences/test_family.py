"""Laws that every divergence obeys, closed forms of each, and where the directions would be told apart."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_kl
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.spec import Part, written
from potstill.divergences import (
    Alpha,
    Clipped,
    EntropyGated,
    FDivergence,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    Mixture,
    NeymanChi2,
    PearsonChi2,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftenedReverseKL,
    SquaredHellinger,
    TotalVariation,
    entropy,
    kl,
    log_probs,
)

INF = math.inf


@dataclass(frozen=True)
class Triangular(FDivergence):
    """Somebody's own member, five lines: sum (p - q)^2 / (p + q)."""

    def f(self, log_ratio: Tensor) -> Tensor:
        return (log_ratio.exp() - 1) * torch.tanh(log_ratio / 2)


MEMBERS = [  # a new member joins all laws with one line
    ForwardKL(),
    ReverseKL(),
    JensenShannon(0.5),
    JensenShannon(0.1),
    SkewForwardKL(0.1),
    SkewForwardKL(0.0),
    SkewReverseKL(0.1),
    SkewReverseKL(0.0),
    Alpha(0.3),
    Alpha(0.0),
    Alpha(1.0),
    Alpha(1.7),
    Alpha(-0.6),
    TotalVariation(),
    SquaredHellinger(),
    PearsonChi2(),
    NeymanChi2(),
    Jeffreys(),
    SoftenedReverseKL(),
    Mixture(JensenShannon(0.5), ReverseKL(), 0.3),
    Triangular(),
]
COMBINED = [  # comparable like members, but without a generator
    EntropyGated(),
    Clipped(ForwardKL(), 0.05),
    Clipped(ReverseKL(), 0.05),
    Clipped(JensenShannon(0.2), 0.01),
]
members = pytest.mark.parametrize("d", MEMBERS, ids=repr)
everyone = pytest.mark.parametrize("d", MEMBERS + COMBINED, ids=repr)


def rows(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(d: FDivergence, teacher: Tensor, student: Tensor) -> Tensor:
    return d(teacher_logp=log_probs(teacher), student_logp=log_probs(student))


@everyone
def test_zero_at_equality_and_positive_elsewhere(d):
    teacher, student = rows(6, 11, seed=0), rows(6, 11, seed=1)
    value = of(d, teacher, student)
    assert value.shape == (6,)
    assert (value > 0).all()
    assert_close(of(d, teacher, teacher + 3.0), torch.zeros(6, dtype=torch.float64), atol=1e-14, rtol=0)
    hard = torch.tensor([[0.0, -INF, -INF]])
    assert of(d, hard, hard).item() == 0.0  # and not NaN


@members
def test_agrees_with_its_generator(d):
    log_p, log_q = log_probs(rows(6, 11, seed=0, scale=2)), log_probs(rows(6, 11, seed=1, scale=2))
    assert_close(d(teacher_logp=log_p, student_logp=log_q), (log_q.exp() * d.f(log_p - log_q)).sum(-1))
    assert d.f(torch.zeros(())).item() == 0.0


@everyone
def test_order_offset_and_padding_are_free(d):
    teacher, student = rows(2, 3, 11, seed=0), rows(2, 3, 11, seed=1)
    value = of(d, teacher, student)
    assert_close(of(d, teacher.flip(-1), student.flip(-1) - 2.0), value)
    padded = [pad(x, (1, 2), value=-INF).requires_grad_() for x in (teacher, student)]
    assert_close(of(d, *padded), value)
    free = [x.clone().requires_grad_() for x in (teacher, student)]
    for with_pad, without in zip(torch.autograd.grad(of(d, *padded).sum(), padded), _gradients(d, *free)):
        assert_close(with_pad[..., 1:-2], without)
        assert with_pad.isfinite().all()


def _gradients(d: FDivergence, *free: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(of(d, *free).sum(), free)


@everyone
def test_gradcheck(d):
    teacher, student = rows(3, 5, seed=0).requires_grad_(), rows(3, 5, seed=1).requires_grad_()
    if isinstance(d, EntropyGated):  # its gate is detached
        teacher = teacher.detach()
    assert torch.autograd.gradcheck(lambda t, s: of(d, t, s), (teacher, student))


BORDER = {  # (teacher, student): certain, half, and swapped
    "only the teacher has it": ([0.5, 0.5, 0.0], [1.0, 0.0, 0.0]),
    "only the student has it": ([1.0, 0.0, 0.0], [0.5, 0.5, 0.0]),
    "disjoint": ([1.0, 0.0, 0.0], [0.0, 0.5, 0.5]),
}


@everyone
@pytest.mark.parametrize("case", BORDER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_give_the_limit_and_finite_gradients(d, case, dtype):
    """At exact zeros the value is that of vanishing masses (or inf), and gradients are finite where the value is."""
    teacher, student = (torch.tensor(x, dtype=dtype).log().requires_grad_() for x in BORDER[case])
    value = of(d, teacher, student)
    gradients = torch.autograd.grad(value, (teacher, student), allow_unused=True)
    small = 1e-100

    def nearly(x: list[float]) -> Tensor:
        return log_probs(torch.tensor(x, dtype=torch.float64).clamp_min(small).log())

    near = d(teacher_logp=nearly(BORDER[case][0]), student_logp=nearly(BORDER[case][1])).item()
    if math.isinf(value.item()):
        assert near > 20
    else:
        assert value.item() == pytest.approx(near, rel=1e-6, abs=1e-12)
        assert all(g is None or g.isfinite().all() for g in gradients)


def test_infinite_exactly_where_the_mathematics_says():
    half, certain = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    infinite = {  # (teacher misses an outcome, student misses an outcome)
        ForwardKL(): (False, True),
        ReverseKL(): (True, False),
        PearsonChi2(): (False, True),
        NeymanChi2(): (True, False),
        Jeffreys(): (True, True),
        SoftenedReverseKL(): (True, False),
        Alpha(1.5): (False, True),
        Alpha(-0.5): (True, False),
        Alpha(0.5): (False, False),
        JensenShannon(): (False, False),
    }
    for d, expected in infinite.items():
        found = tuple(d(teacher_logp=t, student_logp=s).isinf().item() for t, s in ((certain, half), (half, certain)))
        assert found == expected, d


def test_infinite_even_where_the_probability_underflows():
    """exp(-200) is 0 in float32, but 0 * inf is not the answer."""
    teacher, student = torch.tensor([0.0, -200.0]), torch.tensor([0.0, -INF])
    assert kl(teacher, student).item() == INF
    assert ReverseKL()(teacher_logp=student, student_logp=teacher).item() == INF


def _fits_float32(d: FDivergence) -> bool:
    """Not those whose true value is about exp(200), nor a member that computes q f(r) as it stands."""
    unbounded = isinstance(d, PearsonChi2 | NeymanChi2) or (isinstance(d, Alpha) and not 0 <= d.alpha <= 1)
    return not unbounded and not isinstance(d, Triangular)


@pytest.mark.parametrize("d", filter(_fits_float32, MEMBERS + COMBINED), ids=repr)
def test_far_apart_rows_stay_finite_in_float32(d):
    teacher = torch.tensor([[0.0, -200.0, -90.0]], requires_grad=True)
    student = torch.tensor([[-150.0, 0.0, -300.0]], requires_grad=True)
    value = of(d, teacher, student)
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (teacher, student)))
    assert_close(value.double(), of(d, teacher.double(), student.double()), rtol=1e-5, atol=1e-6)


@everyone
def test_low_precision_is_computed_in_float32(d):
    log_p, log_q = log_probs(rows(4, 9, seed=0)).bfloat16(), log_probs(rows(4, 9, seed=1)).bfloat16()
    value = d(teacher_logp=log_p, student_logp=log_q)
    assert value.dtype == torch.float32
    assert_close(value, d(teacher_logp=log_p.float(), student_logp=log_q.float()))


def _distribution(size: int):
    weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=size, max_size=size)
    return weights.filter(lambda w: sum(w) > 1e-3).map(lambda w: torch.tensor(w, dtype=torch.float64) / sum(w))


@members
@settings(max_examples=25, deadline=None, derandomize=True)
@given(p=_distribution(6), q=_distribution(6), cut=st.integers(1, 5))
def test_data_processing_and_sign(d, p, q, cut):
    """Merging outcomes never moves p and q further apart, and nothing is negative or NaN, zeros included."""

    def merged(x: Tensor) -> Tensor:
        return torch.cat([x[:cut], x[cut:].sum(-1, keepdim=True)])

    whole = d(teacher_logp=p.log(), student_logp=q.log()).item()
    coarse = d(teacher_logp=merged(p).log(), student_logp=merged(q).log()).item()
    assert whole >= coarse - 1e-12 * max(1, abs(coarse)) or (math.isinf(whole) and math.isinf(coarse))
    assert coarse >= -1e-14


@settings(max_examples=100, deadline=None, derandomize=True)
@given(p=_distribution(5), q=_distribution(5))
def test_inequalities_between_members(p, q):
    """Pinsker and its relatives (Tsybakov, Introduction to Nonparametric Estimation, section 2.4)."""
    v = {type(d): d(teacher_logp=p.log(), student_logp=q.log()).item() for d in MEMBERS if not isinstance(d, Alpha)}
    tv, hellinger = v[TotalVariation], v[SquaredHellinger]
    slack = 1e-12
    assert 2 * tv**2 <= v[ForwardKL] + slack
    assert 2 * tv**2 <= v[ReverseKL] + slack
    assert hellinger - slack <= tv <= math.sqrt(hellinger * (2 - hellinger)) + slack
    assert v[ForwardKL] <= math.log1p(v[PearsonChi2]) + slack
    assert v[ReverseKL] <= math.log1p(v[NeymanChi2]) + slack
    assert 2 * hellinger <= v[ForwardKL] + slack


TWINS = {  # plain numpy or scipy, written from the definitions
    ForwardKL(): lambda p, q: scipy_kl(p, q),
    ReverseKL(): lambda p, q: scipy_kl(q, p),
    JensenShannon(0.5): lambda p, q: jensenshannon(p, q) ** 2,
    JensenShannon(0.1): lambda p, q: 0.1 * scipy_kl(p, 0.1 * p + 0.9 * q) + 0.9 * scipy_kl(q, 0.1 * p + 0.9 * q),
    SkewForwardKL(0.2): lambda p, q: scipy_kl(p, 0.2 * p + 0.8 * q),
    SkewReverseKL(0.2): lambda p, q: scipy_kl(q, 0.8 * p + 0.2 * q),
    Alpha(0.3): lambda p, q: ((p**0.3 * q**0.7).sum() - 1) / (0.3 * -0.7),
    Alpha(-1.5): lambda p, q: ((p**-1.5 * q**2.5).sum() - 1) / (-1.5 * -2.5),
    Alpha(1.0): lambda p, q: scipy_kl(p, q),
    Alpha(0.0): lambda p, q: scipy_kl(q, p),
    TotalVariation(): lambda p, q: np.abs(p - q).sum() / 2,
    SquaredHellinger(): lambda p, q: 1 - np.sqrt(p * q).sum(),
    PearsonChi2(): lambda p, q: ((p - q) ** 2 / q).sum(),
    NeymanChi2(): lambda p, q: ((p - q) ** 2 / p).sum(),
    Jeffreys(): lambda p, q: scipy_kl(p, q) + scipy_kl(q, p),
    SoftenedReverseKL(): lambda p, q: 2 * scipy_kl((p + q) / 2, p),
    Mixture(ForwardKL(), ReverseKL(), 0.9): lambda p, q: 0.9 * scipy_kl(p, q) + 0.1 * scipy_kl(q, p),
    Triangular(): lambda p, q: ((p - q) ** 2 / (p + q)).sum(),
}


@pytest.mark.parametrize("d", TWINS, ids=repr)
def test_numpy_twin(d):
    log_p, log_q = log_probs(rows(7, seed=4)), log_probs(rows(7, seed=5))
    expected = TWINS[d](log_p.exp().numpy(), log_q.exp().numpy())
    assert d(teacher_logp=log_p, student_logp=log_q).item() == pytest.approx(expected, rel=1e-12)


def test_jensen_shannon_by_hand():
    """Teacher certain, student a fair coin, share 0.1: m = (0.55, 0.45). Fails if the share is the student's."""
    expected = 0.1 * math.log(1 / 0.55) + 0.9 * (0.5 * math.log(0.5 / 0.55) + 0.5 * math.log(0.5 / 0.45))
    value = JensenShannon(0.1)(teacher_logp=torch.tensor([1.0, 0.0]).log(), student_logp=log_probs(torch.zeros(2)))
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_alpha_is_continuous_at_its_limits():
    log_p, log_q = log_probs(rows(4, 7, seed=4)), log_probs(rows(4, 7, seed=5))
    for limit, kind in ((1.0, ForwardKL()), (0.0, ReverseKL())):
        for near in (limit - 1e-6, limit + 1e-6):
            expected = kind(teacher_logp=log_p, student_logp=log_q)
            assert_close(Alpha(near)(teacher_logp=log_p, student_logp=log_q), expected, rtol=1e-5, atol=1e-6)


def test_gradients_point_where_the_direction_says():
    """d KL(p||q) / dz = q - p and d KL(q||p) / dz = q (log(q/p) - KL) at the student's logits z."""
    z, log_p = rows(6, seed=1).requires_grad_(), log_probs(rows(6, seed=0))
    log_q = log_probs(z)
    q, p = log_q.exp(), log_p.exp()
    (forward,) = torch.autograd.grad(ForwardKL()(teacher_logp=log_p, student_logp=log_q), z, retain_graph=True)
    reverse = ReverseKL()(teacher_logp=log_p, student_logp=log_q)
    (backward,) = torch.autograd.grad(reverse, z, retain_graph=True)
    assert_close(forward, (q - p).detach())
    assert_close(backward, (q * (log_q - log_p - reverse)).detach())


SCORE_WEIGHTS = {  # the table of f-distill (card of arXiv 2502.15681), up to the factor on the left
    (1.0, ReverseKL()): lambda r: torch.ones_like(r),
    (1.0, SoftenedReverseKL()): lambda r: 1 / (r + 1),
    (2.0, JensenShannon(0.5)): lambda r: r / (r + 1),
    (2.0, SquaredHellinger()): lambda r: r.sqrt() / 2,
    (1.0, ForwardKL()): lambda r: r,
    (1.0, Jeffreys()): lambda r: r + 1,
    (0.5, NeymanChi2()): lambda r: 1 / r,
    (0.5, PearsonChi2()): lambda r: r.square(),
    (1.0, Alpha(0.3)): lambda r: r**0.3,
    (1.0, SkewForwardKL(0.0)): lambda r: r,
}


@pytest.mark.parametrize("factor_d", SCORE_WEIGHTS, ids=repr)
def test_score_weight_is_the_table_of_f_distill(factor_d):
    factor, d = factor_d
    u = torch.linspace(-6, 6, 13, dtype=torch.float64)
    assert_close(factor * d.score_weight(u), SCORE_WEIGHTS[factor_d](u.exp()), rtol=1e-7, atol=1e-9)
    low = d.score_weight(u.float().requires_grad_())
    assert low.dtype == torch.float32
    assert not low.requires_grad


def test_estimates_of_the_reverse_kl_are_the_usual_three():
    u = torch.tensor([-1.5, 0.0, 0.7], requires_grad=True)
    assert_close(ReverseKL().estimate(u, "k1"), -u.detach())
    assert_close(ReverseKL().estimate(u, "k2"), u.detach().square() / 2)
    assert_close(ReverseKL().estimate(u, "k3"), u.detach().exp() - 1 - u.detach())
    assert not ReverseKL().estimate(u, "k3").requires_grad


@members
def test_k1_and_k3_are_unbiased_for_every_member(d):
    log_p, log_q = log_probs(rows(9, seed=4)), log_probs(rows(9, seed=5))
    value = d(teacher_logp=log_p, student_logp=log_q)
    for kind in ("k1", "k3"):
        assert_close((log_q.exp() * d.estimate(log_p - log_q, kind)).sum(), value)
    assert (d.estimate(torch.linspace(-8, 8, 33, dtype=torch.float64), "k3") >= 0).all()


def test_estimate_of_a_token_that_the_teacher_forbids():
    never = torch.tensor([-INF])
    assert ForwardKL().estimate(never, "k1").item() == 0.0
    assert ForwardKL().estimate(never, "k3").item() == pytest.approx(1.0)
    assert ReverseKL().estimate(never, "k1").item() == INF


def test_estimate_refusals():
    with pytest.raises(RecipeError, match=r"TotalVariation has no second-order estimate k2. Use k1 or k3"):
        TotalVariation().estimate(torch.zeros(1), "k2")
    with pytest.raises(RecipeError, match=r"ReverseKL.kind must be one of k1, k2, k3, got 'k4'"):
        ReverseKL().estimate(torch.zeros(1), "k4")
    with pytest.raises(RecipeError, match="Clipped has no generator f"):
        Clipped().score_weight(torch.zeros(1))


def test_mixture_takes_a_weight_per_position():
    log_p, log_q = log_probs(rows(3, 5, seed=0)), log_probs(rows(3, 5, seed=1))
    weight = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    forward, reverse = kl(log_p, log_q), kl(log_q, log_p)
    value = Mixture(ForwardKL(), ReverseKL())(teacher_logp=log_p, student_logp=log_q, weight=weight)
    assert_close(value, weight * forward + (1 - weight) * reverse)
    with pytest.raises(ModelError, match=r"weight has shape \[2\], but the positions are \[3\]"):
        Mixture()(teacher_logp=log_p, student_logp=log_q, weight=weight[:2])


def test_a_part_of_weight_zero_is_absent_even_when_infinite():
    half, certain = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    value = Mixture(ForwardKL(), ReverseKL(), 0.0)(teacher_logp=half, student_logp=certain)
    assert value.item() == pytest.approx(math.log(2))
    assert Mixture(ForwardKL(), ReverseKL(), 0.0).at_infinity == 0.0


def test_entropy_gate_by_hand():
    """levels = 16: the gate is 1 for a uniform row over 16, 0 for a certain one, one half over 4."""
    uniform16, uniform4 = torch.zeros(16), torch.full((16,), -INF)
    uniform4[:4] = 0.0
    certain = torch.full((16,), -INF)
    certain[0] = 0.0
    teacher = log_probs(torch.stack([uniform16, certain, uniform4]))
    student = log_probs(rows(3, 16, seed=2).float())
    gate = EntropyGated().gate(teacher)
    assert_close(gate, torch.tensor([1.0, 0.0, 0.5]))
    value = EntropyGated()(teacher_logp=teacher, student_logp=student)
    assert value[0].item() == pytest.approx(kl(teacher[0], student[0]).item(), rel=1e-5)  # unsure: forward
    assert math.isinf(value[1].item())  # certain: reverse
    assert not EntropyGated().gate(teacher.requires_grad_()).requires_grad


def test_clipping_is_per_outcome_and_safe():
    log_p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    log_q = torch.tensor([0.005, 0.66, 0.335], dtype=torch.float64).log()
    p, q = log_p.exp(), log_q.exp()
    raw = p * (log_p - log_q)
    value = {r: Clipped(ForwardKL(), 0.05, raw=r)(teacher_logp=log_p, student_logp=log_q) for r in (True, False)}
    assert_close(value[True], raw.clamp_max(0.05).sum())
    assert value[True] < -0.3  # what the raw form does far from p
    assert_close(value[False], (raw + q - p).clamp_max(0.05).sum())
    assert value[False] > 0
    assert_close(Clipped(ForwardKL(), INF)(teacher_logp=log_p, student_logp=log_q), kl(log_p, log_q))
    certain = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).log()
    assert Clipped(ReverseKL(), 0.05)(teacher_logp=certain, student_logp=log_q) < 0.151  # an infinite entry counts 0.05


def test_entropy():
    row = log_probs(torch.tensor([0.0, 0.0, -INF], requires_grad=True))
    assert entropy(row).item() == pytest.approx(math.log(2))
    logits = torch.tensor([0.0, 1.0, -INF], requires_grad=True)
    assert torch.autograd.grad(entropy(log_probs(logits)), logits)[0].isfinite().all()
    assert entropy(log_probs(rows(5, seed=3))).item() == pytest.approx(scipy_kl(log_probs(rows(5, seed=3)).exp()))


def test_members_are_parts_of_a_recipe():
    class Config(BaseModel):
        divergence: Part(FDivergence)

    def read(value: object) -> FDivergence:
        return Config(divergence=value).divergence

    assert read("ReverseKL") == ReverseKL()
    assert read({"name": "JensenShannon", "teacher_share": 0.1}) == JensenShannon(0.1)
    assert read("Triangular") == Triangular()
    nested = {"name": "Clipped", "divergence": {"name": "Alpha", "alpha": 2}, "limit": 0.1}
    assert read(nested) == Clipped(Alpha(2.0), 0.1)
    assert read({"name": "Mixture", "first": "TotalVariation"}) == Mixture(TotalVariation())
    assert written(Clipped(Alpha(2.0), 0.1))["divergence"] == {"name": "Alpha", "alpha": 2.0}
    with pytest.raises(ValueError, match=r"ReversKL is no FDivergence. Did you mean ReverseKL\?"):
        TypeAdapter(Part(FDivergence)).validate_python("ReversKL")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JensenShannon(1.0), "JensenShannon.teacher_share must lie strictly between 0 and 1, got 1.0"),
        (lambda: SkewReverseKL(1.0), r"SkewReverseKL.alpha must lie in \[0, 1\), got 1.0"),
        (lambda: Mixture(weight=1.5), "Mixture.weight must lie between 0 and 1, got 1.5"),
        (lambda: Clipped(limit=0.0), "Clipped.limit must be positive"),
        (lambda: EntropyGated(levels=1.0), "EntropyGated.levels must be above 1"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_unequal_vocabularies_are_refused():
    with pytest.raises(ModelError, match=r"ForwardKL compares equal shapes .* teacher \[2, 5\] and student \[2, 6\]"):
        kl(torch.zeros(2, 5), torch.zeros(2, 6))
