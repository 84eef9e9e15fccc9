"""What is true of every divergence, and between them. A new member joins all of it with one line in MEMBERS."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from tests.divergences.inputs import rows
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from potstill.contracts.spec import Part
from potstill.contracts.spec import members as concrete
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
    log_probs,
)
from potstill.divergences.family import Adaptive

INF = math.inf


@dataclass(frozen=True)
class Triangular(FDivergence):
    """Somebody's own member, five lines: sum (p - q)^2 / (p + q)."""

    def f(self, log_ratio: Tensor) -> Tensor:
        return (log_ratio.exp() - 1) * torch.tanh(log_ratio / 2)


@dataclass(frozen=True)
class ReadOff(FDivergence):
    """A member of which only f is known: its costs at the border, infinite ones too, are read off."""

    known: FDivergence

    def f(self, log_ratio: Tensor) -> Tensor:
        return self.known.f(log_ratio)


MEMBERS = [
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
    ReadOff(ReverseKL()),
    ReadOff(PearsonChi2()),
    Triangular(),  # the one line
]
COMBINED = [  # comparable like members, but without a generator
    EntropyGated(),
    Adaptive(),
    Clipped(ForwardKL(), 0.05),
    Clipped(ReverseKL(), 0.05),
    Clipped(JensenShannon(0.2), 0.01),
    Clipped(EntropyGated(), 0.05),
    Clipped(Adaptive(), 0.05),
    Clipped(ForwardKL(), 0.4, per="position"),
]
members = pytest.mark.parametrize("d", MEMBERS, ids=repr)
everyone = pytest.mark.parametrize("d", MEMBERS + COMBINED, ids=repr)
some_examples = settings(max_examples=6, deadline=None, derandomize=True)


def test_nobody_is_missing():
    ours = {d for d in concrete(FDivergence).values() if d.__module__ == "potstill.divergences.family"}
    assert ours <= {type(d) for d in MEMBERS + COMBINED}


def test_ones_own_member_is_a_part_of_recipes_at_once():
    assert TypeAdapter(Part(FDivergence)).validate_python({"name": "Clipped", "divergence": "Triangular"}) == Clipped(
        Triangular()
    )


def of(d: FDivergence, teacher: Tensor, student: Tensor) -> Tensor:
    """From logits."""
    return d(teacher_logp=log_probs(teacher), student_logp=log_probs(student))


def between(d: FDivergence, p: Tensor, q: Tensor) -> Tensor:
    """From probabilities."""
    return d(teacher_logp=p.log(), student_logp=q.log())


@st.composite
def pairs(draw, zeros: bool = True) -> tuple[Tensor, Tensor]:
    """Teacher's and student's probabilities: any number of outcomes, rows near and far apart, without and with zeros."""
    size, seed = draw(st.integers(2, 7)), draw(st.integers(0, 2**20))
    scale = torch.tensor([0.01, 1.0, 4.0], dtype=torch.float64)[:, None, None]
    share = torch.tensor([0.0, 0.3, 0.6] if zeros else [0.0])[:, None]

    def one(seed: int) -> Tensor:
        never = torch.rand(3, len(share), size, generator=torch.Generator().manual_seed(seed)) < share
        never[..., seed % size] = False
        return log_probs((scale * rows(3, len(share), size, seed=seed)).masked_fill(never, -INF)).exp()

    flat = draw(st.booleans())
    return tuple(one(2 * seed + side).flatten(0, -2 if flat else 0) for side in (0, 1))


# ---- of one divergence


@everyone
@some_examples
@given(pair=pairs())
def test_never_negative_never_nan_and_zero_at_equality(d, pair):
    p, q = pair
    value = between(d, p, q)
    assert value.shape == p.shape[:-1]
    assert (value >= -1e-14).all()
    assert_close(between(d, p, p.clone()), torch.zeros_like(value), atol=1e-14, rtol=0)
    apart = (p - q).abs().sum(-1) > 1e-6
    assert (value[apart] > 0).all()


@members
@some_examples
@given(pair=pairs(zeros=False))
def test_entries_are_q_f_of_r(d, pair):
    p, q = pair
    log_p, log_q = p.log(), q.log()
    generated = q * d.f(log_p - log_q)
    entries = d.entries(teacher_logp=log_p, student_logp=log_q)
    assert_close(entries, generated, rtol=1e-9, atol=1e-14)
    assert_close(d(teacher_logp=log_p, student_logp=log_q), entries.sum(-1))
    assert d.f(torch.zeros(())).item() == 0.0


@everyone
@some_examples
@given(pair=pairs())
def test_entries_can_be_made_nonnegative_without_moving_the_sum(d, pair):
    if isinstance(d, Clipped):
        return  # clips just these
    p, q = pair
    entries = d.nonnegative_entries(teacher_logp=p.log(), student_logp=q.log())
    assert (entries >= -1e-14).all()
    assert_close(entries.sum(-1), between(d, p, q), rtol=1e-9, atol=1e-14)


@members
def test_the_border_costs_are_the_limits_of_the_generator(d):
    """f(0) and lim f(r) / r, whether a member states them or leaves them to be read off."""
    stated, read = (d.at_zero, d.at_infinity), (FDivergence.at_zero.fget(d), FDivergence.at_infinity.fget(d))
    assert stated == pytest.approx(read, rel=1e-8, abs=1e-8)
    assert all(seen == 0 for cost, seen in zip(stated, read) if cost == 0)


@everyone
@some_examples
@given(pair=pairs(), seed=st.integers(0, 99))
def test_order_and_padding_are_free(d, pair, seed):
    p, q = pair
    order = torch.randperm(p.shape[-1], generator=torch.Generator().manual_seed(seed))
    value = between(d, p, q)
    assert_close(between(d, p[..., order], q[..., order]), value)
    assert_close(between(d, pad(p, (1, 2)), pad(q, (1, 2))), value)


@everyone
def test_padding_leaves_the_gradients_alone(d):
    free = [rows(2, 3, 11, seed=seed).requires_grad_() for seed in (0, 1)]
    padded = [pad(x.detach(), (1, 2), value=-INF).requires_grad_() for x in free]
    shifted = [free[0] + 3.0, free[1] - 2.0]
    expected = torch.autograd.grad(of(d, *shifted).sum(), free)
    for found, plain in zip(torch.autograd.grad(of(d, *padded).sum(), padded), expected):
        assert_close(found[..., 1:-2], plain)
        assert (found[..., [0, -2, -1]] == 0).all()


@everyone
def test_gradients_and_second_gradients_are_those_of_finite_differences(d):
    teacher, student = rows(3, 4, seed=0).requires_grad_(), rows(3, 4, seed=1).requires_grad_()
    part = d.divergence if isinstance(d, Clipped) else d
    if isinstance(part, EntropyGated | Adaptive):  # their gate is detached: hold it where it is
        frozen = Mixture(part.high, part.low)
        gate = part.gate(log_probs(teacher), log_probs(student))
        assert not gate.requires_grad
        fixed = lambda t, s: frozen(teacher_logp=log_probs(t), student_logp=log_probs(s), weight=gate)
        if part is d:
            for ours, theirs in zip(*(torch.autograd.grad(g.sum(), (teacher, student), create_graph=True)
                                      for g in (of(d, teacher, student), fixed(teacher, student)))):  # fmt: skip
                assert_close(ours, theirs)
        return
    assert torch.autograd.gradcheck(lambda t, s: of(d, t, s), (teacher, student))
    assert torch.autograd.gradgradcheck(lambda t, s: of(d, t, s), (teacher, student), atol=1e-4)


@members
@some_examples
@given(pair=pairs(zeros=False))
def test_gradient_law(d, pair):
    """d D / d log p = p f'(r) and d D / d log q = -q f*(f'(r)), outcome by outcome."""
    log_p, log_q = (x.log().requires_grad_() for x in pair)
    by_p, by_q = torch.autograd.grad(d(teacher_logp=log_p, student_logp=log_q).sum(), (log_p, log_q))
    u, (p, q) = (log_p - log_q).detach(), pair
    assert_close(by_p, p * d.slope(u), rtol=1e-7, atol=1e-12)
    assert_close(by_q, -q * d.conjugate_at(u), rtol=1e-7, atol=1e-12)


def _fits_float32(d: FDivergence) -> bool:
    """Not those whose true value is about exp(200), nor a member that computes q f(r) as it stands."""
    unbounded = isinstance(d, PearsonChi2 | NeymanChi2) or (isinstance(d, Alpha) and not 0 <= d.alpha <= 1)
    return not unbounded and not isinstance(d, Triangular | ReadOff)


@everyone
@some_examples
@given(pair=pairs())
def test_the_gradient_beside_the_entries_is_autograds(d, pair):
    log_p, log_q = (x.log() for x in pair)
    log_q.requires_grad_()
    expected = d.entries(teacher_logp=log_p, student_logp=log_q)
    (by_q,) = torch.autograd.grad(expected.sum(), log_q)
    with torch.no_grad():
        entries, pull = d.entries_and_pull(teacher_logp=log_p, student_logp=log_q.detach())
    assert_close(entries, expected.detach(), rtol=1e-12, atol=0)
    assert_close(pull, by_q, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("d", filter(_fits_float32, MEMBERS), ids=repr)
def test_the_gradient_beside_the_entries_is_finite_far_apart(d):
    log_p = log_probs(torch.tensor([[0.0, -200.0, -90.0, 3.0]]))
    log_q = log_probs(torch.tensor([[-150.0, 0.0, -300.0, -3.0]]))
    _, pull = d.entries_and_pull(teacher_logp=log_p, student_logp=log_q)
    _, exact = d.entries_and_pull(teacher_logp=log_p.double(), student_logp=log_q.double())
    assert_close(pull.double(), exact, rtol=2e-5, atol=1e-6)


def test_a_gradient_in_closed_form_is_not_inherited_by_another_generator():
    @dataclass(frozen=True)
    class Doubled(ForwardKL):
        def f(self, log_ratio: Tensor) -> Tensor:
            return 2 * super().f(log_ratio)

        def _entry(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
            return 2 * super()._entry(log_p, log_q, log_ratio)

    log_p, log_q = log_probs(rows(3, 4, seed=0)), log_probs(rows(3, 4, seed=1))
    _, pull = Doubled().entries_and_pull(teacher_logp=log_p, student_logp=log_q)
    assert_close(pull, -2 * log_p.exp())
    assert all(type(d)._pulls for d in MEMBERS if not isinstance(d, Mixture | ReadOff | Triangular))


@members
@some_examples
@given(pair=pairs(zeros=False), guess=st.integers(0, 2**20))
def test_variational_law(d, pair, guess):
    """D = E_p f'(r) - E_q f*(f'(r)); with any other ratio in the place of r it is a lower bound."""
    p, q = pair

    def bound(u: Tensor) -> Tensor:
        return (p * d.slope(u) - q * d.conjugate_at(u)).sum(-1)

    u = p.log() - q.log()
    assert_close(bound(u), between(d, p, q), rtol=1e-9, atol=1e-12)
    assert (bound(u + rows(*u.shape, seed=guess)) <= between(d, p, q) + 1e-12).all()


@members
def test_conjugate_is_the_maximum_of_rt_minus_f(d):
    def negative(log_r: float, t: float) -> float:
        return d.f(torch.tensor(log_r, dtype=torch.float64)).item() - math.exp(log_r) * t

    for u in (-2.0, -0.7, 0.0, 0.4, 1.5):
        at = torch.tensor(u, dtype=torch.float64)
        best = minimize_scalar(
            negative, bounds=(u - 4, u + 3), args=(d.slope(at).item(),), method="bounded", options={"xatol": 1e-9}
        )
        assert -best.fun == pytest.approx(d.conjugate_at(at).item(), rel=1e-9, abs=1e-9)


CONJUGATES = {  # f*(t) at the slope t, solved by hand (f-GAN, arXiv 1606.00709, Table 6, up to scale)
    ForwardKL(): lambda t: (t - 1).exp(),
    ReverseKL(): lambda t: -1 - (-t).log(),
    JensenShannon(0.5): lambda t: -(2 - (2 * t).exp()).log() / 2,
    SkewReverseKL(0.2): lambda t: -1 - 0.25 * t + (-0.8 / t).log(),
    Alpha(0.3): lambda t: ((1 - 0.7 * t) ** (-0.3 / 0.7) - 1) / 0.3,
    Alpha(1.7): lambda t: ((1 + 0.7 * t) ** (1.7 / 0.7) - 1) / 1.7,
    TotalVariation(): lambda t: t,
    SquaredHellinger(): lambda t: t / (1 - 2 * t),
    PearsonChi2(): lambda t: t + t**2 / 4,
    NeymanChi2(): lambda t: 2 - 2 * (1 - t).sqrt(),
}


@pytest.mark.parametrize("d", CONJUGATES, ids=repr)
def test_conjugate_in_closed_form(d):
    u = torch.linspace(-3, 3, 12, dtype=torch.float64)
    assert_close(d.conjugate_at(u), CONJUGATES[d](d.slope(u)), rtol=1e-10, atol=1e-12)


@members
def test_slope_and_conjugate_are_differentiable_and_keep_their_type(d):
    """Both derivatives follow from f'': d slope / du = r f'' and d conjugate / du = r^2 f''."""
    u = torch.linspace(-2, 2, 6, dtype=torch.float64, requires_grad=True)
    weight = d.score_weight(u)
    (slope,) = torch.autograd.grad(d.slope(u).sum(), u)
    (conjugate,) = torch.autograd.grad(d.conjugate_at(u).sum(), u)
    assert_close(slope, weight / u.detach().exp(), rtol=1e-8, atol=1e-10)
    assert_close(conjugate, weight, rtol=1e-8, atol=1e-10)
    for narrow, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        assert d.slope(u.to(narrow)).dtype == d.conjugate_at(u.to(narrow)).dtype == wide
    assert d.conjugate_at(torch.tensor([-INF])).item() == pytest.approx(-d.at_zero)


@members
def test_near_equality_it_is_a_quadratic_form(d):
    """D(p, p + e h) / e^2 -> f''(1) / 2 sum h^2 / p, which is Fisher's: the same for all members, up to f''(1)."""
    curvature = d.score_weight(torch.zeros((), dtype=torch.float64))
    p, h, e = log_probs(rows(5, seed=0)).exp(), rows(5, seed=1), 1e-5
    h = h - h.mean()
    if curvature > 0:
        assert_close(between(d, p, p + e * h) / e**2, curvature / 2 * (h**2 / p).sum(), rtol=1e-3, atol=0)


@members
@some_examples
@given(pair=pairs())
def test_infinite_exactly_where_a_cost_is(d, pair):
    p, q = (x.requires_grad_() for x in pair)
    infinite = ((p == 0) & (q > 0)).any(-1) & (d.at_zero == INF) | ((q == 0) & (p > 0)).any(-1) & (d.at_infinity == INF)
    log_p, log_q = (x.detach().log().requires_grad_() for x in pair)
    value = d(teacher_logp=log_p, student_logp=log_q)
    assert (value.isinf() == infinite).all()
    finite = value.masked_fill(infinite, 0.0).sum()
    for gradient in torch.autograd.grad(finite, (log_p, log_q)):
        assert gradient.isfinite().all()


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
    value = d(teacher_logp=teacher, student_logp=student)
    gradients = torch.autograd.grad(value, (teacher, student), allow_unused=True)
    near = between(d, *(torch.tensor(x, dtype=torch.float64).clamp_min(1e-100) for x in BORDER[case])).item()
    if math.isinf(value.item()):
        assert near > 20
    else:
        assert value.item() == pytest.approx(near, rel=1e-6, abs=1e-12)
        assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("d", filter(_fits_float32, MEMBERS + COMBINED), ids=repr)
def test_far_apart_rows_stay_finite_in_float32(d):
    teacher = torch.tensor([[0.0, -200.0, -90.0]], requires_grad=True)
    student = torch.tensor([[-150.0, 0.0, -300.0]], requires_grad=True)
    value = of(d, teacher, student)
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (teacher, student)))
    assert_close(value.double(), of(d, teacher.double(), student.double()), rtol=1e-5, atol=1e-6)


@everyone
def test_a_single_row_is_one_position(d):
    assert of(d, rows(5, seed=0), rows(5, seed=1)).shape == ()


@everyone
def test_low_precision_is_computed_in_float32(d):
    log_p, log_q = log_probs(rows(4, 9, seed=0)).bfloat16(), log_probs(rows(4, 9, seed=1)).bfloat16()
    value = d(teacher_logp=log_p, student_logp=log_q)
    assert value.dtype == torch.float32
    assert_close(value, d(teacher_logp=log_p.float(), student_logp=log_q.float()))
    assert d(teacher_logp=log_p, student_logp=log_q.double()).dtype == torch.float64


@members
@some_examples
@given(pair=pairs(), outcomes=st.integers(1, 5), seed=st.integers(0, 99))
def test_data_processing(d, pair, outcomes, seed):
    """No channel moves p and q further apart, noisy or merging outcomes (which is what a bucketed tail does)."""
    p, q = pair
    size = p.shape[-1]
    noisy = rows(size, outcomes, seed=seed).softmax(-1)
    merging = torch.eye(outcomes, dtype=torch.float64)[
        torch.randint(outcomes, (size,), generator=torch.Generator().manual_seed(seed))
    ]
    whole = between(d, p, q)
    for channel in (noisy, merging):
        sent = between(d, p @ channel, q @ channel)
        assert (sent <= whole * (1 + 1e-12) + 1e-13).all()


@members
@some_examples
@given(one=pairs(), share=st.floats(0.05, 0.95))
def test_joint_convexity(d, one, share):
    """D of mixtures is at most the mixture of D: in p and q together, so in either alone."""
    p, q = one
    other = p.roll(1, -1), q.flip(-1)
    mixed = between(d, *(share * a + (1 - share) * b for a, b in zip(one, other)))
    bound = share * between(d, p, q) + (1 - share) * between(d, *other)
    assert (mixed <= bound * (1 + 1e-12) + 1e-13).all()


@members
def test_k1_and_k3_are_unbiased(d):
    log_p, log_q = log_probs(rows(9, seed=4)), log_probs(rows(9, seed=5))
    value = d(teacher_logp=log_p, student_logp=log_q)
    for kind in ("k1", "k3"):
        assert_close((log_q.exp() * d.estimate(log_p - log_q, kind)).sum(), value)
    assert (d.estimate(torch.linspace(-8, 8, 33, dtype=torch.float64), "k3") >= 0).all()


@members
def test_what_its_estimates_would_do_as_losses(d):
    """Differentiated over tokens sampled from q, f(r) moves log q by -p f'(r), which is no divergence's business but the
    reverse KL's, where it sums to nothing; k3 adds the forward KL's gradient, f'(1) times."""
    z, log_p = rows(9, seed=4).requires_grad_(), log_probs(rows(9, seed=5))
    log_q = log_probs(z)
    q, u = log_q.detach().exp(), (log_p - log_q).detach()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    k1 = gradient((q * d._estimate(log_p - log_q, "k1")).sum())
    assert_close(k1, gradient((-log_p.exp() * d.slope(u) * log_q).sum()), rtol=1e-9, atol=1e-12)
    k3 = gradient((q * d._estimate(log_p - log_q, "k3")).sum())
    at_one = d.slope(torch.zeros((), dtype=torch.float64))
    assert_close(k3 - k1, -at_one * gradient(between(ForwardKL(), log_p.exp(), log_q.exp())), rtol=1e-9, atol=1e-12)


@everyone
def test_shapes_alone_are_enough(d):
    """No value decides the way through the code: without data there is nothing to look at (so a compiler can trace it)."""
    teacher, student = (torch.empty(2, 3, 7, device="meta") for _ in range(2))

    def entries(log_q: Tensor) -> Tensor:
        return d.entries(teacher_logp=teacher, student_logp=log_q)

    value, pull = torch.func.vjp(entries, student)
    assert value.shape == pull(torch.ones_like(value))[0].shape == (2, 3, 7)


@pytest.mark.parametrize(
    "d", [Triangular(), Clipped(Adaptive(), 0.05, per="position"), Clipped(EntropyGated())], ids=repr
)
def test_one_graph(d):
    """torch.compile takes entries and their pullback whole, borders included, even where limits are read off."""
    p, q = torch.tensor([[0.5, 0.2, 0.3, 0.0]]), torch.tensor([[0.1, 0.5, 0.4, 0.0]])

    def both(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        value, pull = torch.func.vjp(lambda log_q: d.entries(teacher_logp=log_p, student_logp=log_q), log_q)
        return value, pull(torch.ones_like(value))[0]

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert_close(compiled(p.log(), q.log()), both(p.log(), q.log()))


# ---- between divergences

TWINS = {  # SciPy, or the definitions in NumPy
    ForwardKL(): lambda p, q: rel_entr(p, q).sum(),
    ReverseKL(): lambda p, q: rel_entr(q, p).sum(),
    JensenShannon(0.5): lambda p, q: jensenshannon(p, q) ** 2,
    JensenShannon(0.1): lambda p, q: 0.1 * rel_entr(p, m := 0.1 * p + 0.9 * q).sum() + 0.9 * rel_entr(q, m).sum(),
    SkewForwardKL(0.2): lambda p, q: rel_entr(p, 0.2 * p + 0.8 * q).sum(),
    SkewReverseKL(0.2): lambda p, q: rel_entr(q, 0.8 * p + 0.2 * q).sum(),
    Alpha(0.3): lambda p, q: ((p**0.3 * q**0.7).sum() - 1) / (0.3 * -0.7),
    Alpha(-1.5): lambda p, q: ((p**-1.5 * q**2.5).sum() - 1) / (-1.5 * -2.5),
    Alpha(1.0): lambda p, q: rel_entr(p, q).sum(),
    Alpha(0.0): lambda p, q: rel_entr(q, p).sum(),
    TotalVariation(): lambda p, q: np.abs(p - q).sum() / 2,
    SquaredHellinger(): lambda p, q: 1 - np.sqrt(p * q).sum(),
    PearsonChi2(): lambda p, q: ((p - q) ** 2 / q).sum(),
    NeymanChi2(): lambda p, q: ((p - q) ** 2 / p).sum(),
    Jeffreys(): lambda p, q: ((p - q) * np.log(p / q)).sum(),
    SoftenedReverseKL(): lambda p, q: rel_entr(p + q, 2 * p).sum(),
    Mixture(ForwardKL(), ReverseKL(), 0.9): lambda p, q: 0.9 * rel_entr(p, q).sum() + 0.1 * rel_entr(q, p).sum(),
    Triangular(): lambda p, q: ((p - q) ** 2 / (p + q)).sum(),
}


@pytest.mark.parametrize("d", TWINS, ids=repr)
def test_numpy_twin(d):
    p, q = (log_probs(rows(7, seed=seed)).exp() for seed in (4, 5))
    assert between(d, p, q).item() == pytest.approx(TWINS[d](p.numpy(), q.numpy()), rel=1e-12)


SWAPPED = [(ForwardKL(), ReverseKL()), (PearsonChi2(), NeymanChi2()), (JensenShannon(0.2), JensenShannon(0.8)),
           (SkewForwardKL(0.3), SkewReverseKL(0.3)), (Alpha(0.3), Alpha(0.7)), (Alpha(1.7), Alpha(-0.7)),
           (Mixture(ForwardKL(), ReverseKL(), 0.3), Mixture(ForwardKL(), ReverseKL(), 0.7)),
           *((d, d) for d in (TotalVariation(), SquaredHellinger(), Jeffreys(), JensenShannon(), Triangular()))]  # fmt: skip


@pytest.mark.parametrize(("d", "dual"), SWAPPED, ids=repr)
@some_examples
@given(pair=pairs())
def test_swapping_teacher_and_student(d, dual, pair):
    """The perspective r f(1 / r) exchanges the arguments, and with them the costs at the border."""
    p, q = pair
    assert_close(between(d, p, q), between(dual, q, p))
    assert (d.at_zero, d.at_infinity) == pytest.approx((dual.at_infinity, dual.at_zero))
    u = torch.linspace(-3, 3, 7, dtype=torch.float64)
    slope = d.slope(torch.zeros((), dtype=torch.float64)) + dual.slope(torch.zeros((), dtype=torch.float64))
    assert_close(u.exp() * dual.f(-u), d.f(u) - slope * torch.expm1(u), rtol=1e-9, atol=1e-12)


EQUAL = [
    (1.0, Alpha(0.5), 4.0, SquaredHellinger()),
    (1.0, Alpha(2.0), 0.5, PearsonChi2()),
    (1.0, Alpha(-1.0), 0.5, NeymanChi2()),
    (1.0, Alpha(1.0), 1.0, ForwardKL()),
    (1.0, Alpha(0.0), 1.0, ReverseKL()),
    (1.0, SkewForwardKL(0.0), 1.0, ForwardKL()),
    (1.0, SkewReverseKL(0.0), 1.0, ReverseKL()),
    (1.0, Jeffreys(), 2.0, Mixture(ForwardKL(), ReverseKL(), 0.5)),
    (1.0, JensenShannon(0.3), 1.0, Mixture(SkewForwardKL(0.3), SkewReverseKL(0.7), 0.3)),
    (1.0, Mixture(Alpha(0.3), Jeffreys(), 1.0), 1.0, Alpha(0.3)),
    (1.0, Clipped(JensenShannon(0.2), INF), 1.0, JensenShannon(0.2)),
    (1.0, Clipped(Adaptive(), INF, per="position"), 1.0, Adaptive()),
    (1.0, Adaptive(high=Jeffreys(), low=Jeffreys()), 1.0, Jeffreys()),
]


@pytest.mark.parametrize(("a", "one", "b", "other"), EQUAL, ids=repr)
@some_examples
@given(pair=pairs())
def test_special_cases_are_other_members(a, one, b, other, pair):
    assert_close(a * between(one, *pair), b * between(other, *pair), rtol=1e-9, atol=1e-14)


LIMITS = [  # (member at e, its divisor, what it tends to)
    (lambda e: JensenShannon(e), lambda e: e, ForwardKL()),
    (lambda e: JensenShannon(1 - e), lambda e: e, ReverseKL()),
    (lambda e: SkewForwardKL(e), lambda e: 1, ForwardKL()),
    (lambda e: SkewReverseKL(e), lambda e: 1, ReverseKL()),
    (lambda e: SkewForwardKL(1 - e), lambda e: e**2 / 2, NeymanChi2()),
    (lambda e: SkewReverseKL(1 - e), lambda e: e**2 / 2, PearsonChi2()),
    (lambda e: Alpha(1 - e), lambda e: 1, ForwardKL()),
    (lambda e: Alpha(1 + e), lambda e: 1, ForwardKL()),
    (lambda e: Alpha(e), lambda e: 1, ReverseKL()),
    (lambda e: Alpha(-e), lambda e: 1, ReverseKL()),
]


@pytest.mark.parametrize(("member", "divisor", "limit"), LIMITS)
def test_limits_of_a_parameter(member, divisor, limit):
    """The distance to the limit falls with e, as e."""
    p, q = (log_probs(rows(4, 7, seed=seed)).exp() for seed in (4, 5))
    errors = [
        (between(member(e), p, q) / divisor(e) - between(limit, p, q)).abs().max().item() for e in (1e-2, 1e-3, 1e-4)
    ]
    assert all(0.05 < fine / coarse < 0.2 for coarse, fine in pairwise(errors))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(pair=pairs())
def test_inequalities_between_members(pair):
    """Pinsker and its relatives (Tsybakov, Introduction to Nonparametric Estimation, 2.4; Topsoe 2000 for the last)."""
    p, q = pair
    kl, reverse, tv, h2 = (between(d, p, q) for d in (ForwardKL(), ReverseKL(), TotalVariation(), SquaredHellinger()))
    pearson, neyman, js = (between(d, p, q) for d in (PearsonChi2(), NeymanChi2(), JensenShannon()))
    triangular, jeffreys = between(Triangular(), p, q), between(Jeffreys(), p, q)
    for small, large in [
        (2 * tv**2, kl),
        (2 * tv**2, reverse),
        (tv, (1 - (-kl).exp()).sqrt()),  # Bretagnolle and Huber
        (h2, tv),
        (tv**2, h2 * (2 - h2)),
        (-2 * torch.log1p(-h2.clamp_max(1.0)), kl),
        (kl, torch.log1p(pearson)),
        (reverse, torch.log1p(neyman)),
        (4 * tv**2, pearson),
        (js, math.log(2) * tv),
        (js, jeffreys / 4),
        (2 * h2, triangular),
        (triangular, 4 * h2),
        (2 * tv**2, triangular),
        (triangular, 2 * tv),
        (triangular / 4, js),
        (js, math.log(2) / 2 * triangular),
    ]:
        assert (small <= large * (1 + 1e-9) + 1e-12).all()
    for w in (0.1, 0.6):
        assert (between(JensenShannon(w), p, q) <= -w * math.log(w) - (1 - w) * math.log(1 - w) + 1e-12).all()
        assert (between(SkewForwardKL(w), p, q) <= -math.log(w) + 1e-12).all()
        assert (between(SkewForwardKL(w), p, q) <= (1 - w) * kl + 1e-12).all()
        assert (between(SkewReverseKL(w), p, q) <= -math.log(w) + 1e-12).all()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(pair=pairs(), seed=st.integers(0, 2**20))
def test_three_are_squared_metrics(pair, seed):
    p, q = pair
    m = log_probs(rows(*p.shape, seed=seed, scale=2.0)).exp()
    for d, root in ((TotalVariation(), 1.0), (SquaredHellinger(), 0.5), (JensenShannon(), 0.5)):
        direct, first, second = (between(d, *x).clamp_min(0) ** root for x in ((p, q), (p, m), (m, q)))
        assert (direct <= first + second + 1e-9).all()


@pytest.mark.parametrize(
    "d", [Clipped(ForwardKL(), 0.05), Clipped(JensenShannon(0.2), 0.05), Clipped(ReverseKL(), 0.3)], ids=repr
)
@some_examples
@given(pair=pairs())
def test_clipping_lowers_and_a_higher_limit_clips_less(d, pair):
    p, q = pair
    values = [between(replace(d, limit=limit), p, q) for limit in (0.01, 0.1, 1.0, INF)]
    assert_close(values[-1], between(d.divergence, p, q), rtol=1e-9, atol=1e-14)
    assert all((low <= high + 1e-14).all() for low, high in pairwise(values))
    whole = between(replace(d, per="position"), p, q)
    assert_close(whole, between(d.divergence, p, q).clamp_max(d.limit), rtol=1e-9, atol=1e-14)
