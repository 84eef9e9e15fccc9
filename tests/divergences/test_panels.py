"""Every minimiser is proved three times: by descent from a random start, by the gap identity, and by stationarity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.divergences.inputs import least, rows
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import ModelError, RecipeError
from potstill.divergences import (
    Alpha,
    ForwardKL,
    JensenShannon,
    NeymanChi2,
    PearsonChi2,
    ReverseKL,
    SquaredHellinger,
    kl,
    log_probs,
)
from potstill.divergences.panels import (
    ORDERS,
    confidence_weights,
    contrast,
    disagreement,
    minimiser,
    mixture,
    panel,
    power_mean,
    product,
)

INF = math.inf
CLOSED = [
    ForwardKL(),
    ReverseKL(),
    Alpha(0.3),
    Alpha(1.0),
    Alpha(0.0),
    Alpha(-0.6),
    Alpha(1.7),
    SquaredHellinger(),
    PearsonChi2(),
    NeymanChi2(),
]
WEIGHTS = torch.tensor([0.5, 1.2, 0.3], dtype=torch.float64)  # of sum 2, on purpose
closed = pytest.mark.parametrize("d", CLOSED, ids=repr)


def experts(*shape: int, k: int = 3, seed: int = 0, scale: float = 1.5) -> Tensor:
    return log_probs(rows(k, *shape, seed=seed, scale=scale))


def order(d) -> float:
    return d.alpha if isinstance(d, Alpha) else ORDERS[type(d)]


def test_nobody_with_a_closed_form_is_missing():
    assert set(ORDERS) | {Alpha} == {type(d) for d in CLOSED}


@closed
def test_the_minimiser_is_where_descent_ends(d):
    teachers = experts(6)
    found = least(lambda log_q: panel(d, teachers_logp=teachers, student_logp=log_q, weights=WEIGHTS), 6, seed=3)
    assert_close(found.exp(), minimiser(d, teachers, WEIGHTS).exp(), rtol=0, atol=1e-6)


@closed
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), k=st.integers(1, 4), size=st.integers(2, 7))
def test_gap_identity(d, seed, k, size):
    """sum_i w_i D(p_i, q) = W c D(m, q) + sum_i w_i D(p_i, m), at any q: a panel is one teacher, and a constant."""
    teachers, log_q = experts(2, size, k=k, seed=seed), log_probs(rows(2, size, seed=seed + 1, scale=2.0))
    w = rows(k, seed=seed + 2).exp()
    m = minimiser(d, teachers, w)
    a, share = order(d), (w / w.sum())[:, None, None]
    unnormalised = (share * (a * teachers).exp()).sum(0) ** (1 / a) if a else (share * teachers).sum(0).exp()
    c = 1.0 if a == 0 else unnormalised.sum(-1) ** a
    at_q, at_m = (panel(d, teachers_logp=teachers, student_logp=x, weights=w) for x in (log_q, m))
    assert_close(at_q, w.sum() * c * d(teacher_logp=m, student_logp=log_q) + at_m, rtol=1e-9, atol=1e-11)
    assert (at_m >= -1e-14).all()
    if a == 1:
        assert_close(torch.as_tensor(c), torch.ones(2, dtype=torch.float64))


@closed
def test_the_minimiser_is_stationary(d):
    """The Lagrange condition: sum_i w_i f*(f'(p_i / q)) is the same at every outcome."""
    teachers = experts(4, 6)
    price = (WEIGHTS[:, None, None] * d.conjugate_at(teachers - minimiser(d, teachers, WEIGHTS))).sum(0)
    assert_close(price, price[:, :1].expand_as(price), rtol=1e-9, atol=1e-11)


@closed
def test_the_gradient_is_that_of_the_one_teacher(d):
    z, teachers = rows(6, seed=5).requires_grad_(), experts(6)
    whole, one = (
        torch.autograd.grad(value, z)[0]
        for value in (
            panel(d, teachers_logp=teachers, student_logp=log_probs(z), weights=WEIGHTS),
            d(teacher_logp=minimiser(d, teachers, WEIGHTS), student_logp=log_probs(z)),
        )
    )
    factor = whole.norm() / one.norm()
    assert_close(whole, factor * one)
    if order(d) in (0.0, 1.0):
        assert factor.item() == pytest.approx(2.0)  # the weights' sum


def test_the_product_is_where_two_reverse_kls_meet():
    """SELFCI's identity: w_a KL(q || p_a) + w_d KL(q || p_d) = KL(q || product) - log Z for weights of sum 1."""
    allow, disallow = experts(5, k=2)
    w, log_q = torch.tensor([0.3, 0.7], dtype=torch.float64), log_probs(rows(5, seed=9))
    z = (0.3 * allow + 0.7 * disallow).exp().sum()
    value = panel(ReverseKL(), teachers_logp=[allow, disallow], student_logp=log_q, weights=w)
    assert_close(value, kl(log_q, product([allow, disallow], w)) - z.log(), rtol=1e-12, atol=1e-12)


def test_disclosure_by_hand():
    """Logits (share what is needed, leak what is not): allow (3, 0.5), disallow (0.5, -3). SELFCI's toy in closed form."""
    bits = log_probs(
        torch.tensor([[[3.0, 0.0], [0.5, 0.0]], [[0.5, 0.0], [-3.0, 0.0]]])
    )  # teachers, attributes, yes or no
    share, leak = product(bits)[:, 0].exp().tolist()
    assert (share, leak, share * (1 - leak)) == pytest.approx((0.852, 0.223, 0.662), abs=5e-4)
    share, leak = mixture(bits)[:, 0].exp().tolist()
    assert (share, leak, share * (1 - leak)) == pytest.approx((0.788, 0.335, 0.524), abs=5e-4)


def test_means_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.float64)
    assert_close(mixture(p.log(), [3, 1]).exp(), torch.tensor([0.65, 0.35], dtype=torch.float64))
    assert_close(product(p.log(), [0.75, 0.25]).exp(), torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    assert_close(product(p.log(), [1, 1]).exp(), torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert_close(product(p.log(), [2, 1]).exp(), torch.tensor([0.8, 0.2], dtype=torch.float64))
    harmonic = torch.tensor([1 / (0.75 / 0.8 + 0.25 / 0.2), 1 / (0.75 / 0.2 + 0.25 / 0.8)], dtype=torch.float64)
    assert_close(power_mean(p.log(), [3, 1], -1).exp(), harmonic / harmonic.sum())
    squares = torch.tensor([0.75 * 0.64 + 0.25 * 0.04, 0.75 * 0.04 + 0.25 * 0.64], dtype=torch.float64).sqrt()
    assert_close(power_mean(p.log(), [3, 1], 2).exp(), squares / squares.sum())


@pytest.mark.parametrize("a", [-1.5, 0.0, 0.5, 1.0, 3.0])
def test_laws_of_means(a):
    teachers = experts(2, 6)
    mean = power_mean(teachers, WEIGHTS, a)
    assert_close(mean.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    assert_close(power_mean(teachers, 7 * WEIGHTS, a), mean)  # the weights' scale is free
    assert_close(power_mean(teachers.flip(0), WEIGHTS.flip(0), a), mean)  # so is the teachers' order
    assert_close(power_mean(list(teachers), WEIGHTS.tolist(), a), mean)  # a list does as well
    assert_close(power_mean(teachers[:1].expand(3, 2, 6), WEIGHTS, a), teachers[0])  # one opinion is that opinion
    absent = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert_close(power_mean(teachers, absent, a), teachers[0])
    assert_close(power_mean(teachers, None, a), power_mean(teachers, [1, 1, 1], a))
    by_position = torch.stack([WEIGHTS, WEIGHTS.flip(0)], -1)
    per_row = torch.stack([power_mean(teachers[:, n], by_position[:, n], a) for n in range(2)])
    assert_close(power_mean(teachers, by_position, a), per_row)
    assert_close(power_mean(teachers, WEIGHTS, a + 1e-7), mean, rtol=0, atol=1e-5)  # continuous, at 0 too
    assert power_mean(teachers.bfloat16(), None, a).dtype == torch.float32
    assert torch.autograd.gradcheck(
        lambda z: power_mean(log_probs(z), WEIGHTS, a), rows(3, 2, 4, seed=1).requires_grad_()
    )


@pytest.mark.parametrize("a", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_forbidden_outcomes(a):
    """Up to order 0 one teacher's no is a no; above, all must say it. Gradients stay finite."""
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.2, 0.0, 0.8, 0.0]], dtype=torch.float64)
    log_p = p.log().requires_grad_()
    mean = power_mean(log_p, None, a)
    assert (mean.exp() > 0).tolist() == ([True, False, False, False] if a <= 0 else [True, True, True, False])
    assert mean.exp().sum().item() == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(mean[0], log_p)
    assert gradient.isfinite().all()
    assert_close(power_mean(p.log(), [0, 1], a), p[1].log())  # who is absent forbids nothing


def test_a_panel_is_the_weighted_sum_and_forgets_who_is_absent():
    teachers, log_q = experts(2, 6), log_probs(rows(2, 6, seed=8))
    d = JensenShannon(0.3)
    each = torch.stack([d(teacher_logp=teacher, student_logp=log_q) for teacher in teachers])
    assert_close(
        panel(d, teachers_logp=teachers, student_logp=log_q, weights=WEIGHTS), (WEIGHTS[:, None] * each).sum(0)
    )
    assert_close(panel(d, teachers_logp=teachers, student_logp=log_q), each.mean(0))
    w = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    assert_close(panel(d, teachers_logp=list(teachers), student_logp=log_q, weights=w), (w * each).sum(0))
    certain, half = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
    assert panel(ReverseKL(), teachers_logp=[certain, half], student_logp=half, weights=[0, 1]).item() == 0.0
    assert panel(ReverseKL(), teachers_logp=[certain, half], student_logp=half).item() == INF


@pytest.mark.parametrize("a", [0.5, 1.0, 1.5])
def test_extrapolation_is_the_best_answer_to_a_log_ratio_reward(a):
    """max E_q a log(p_T / p_ref) - KL(q || p_ref) is at p_T^a p_ref^(1-a) / Z; for a = 1 it is -KL(q || p_T)."""
    teacher, reference = experts(6, k=2)

    def cost(log_q: Tensor) -> Tensor:
        return kl(log_q, reference) - a * (log_q.exp() * (teacher - reference)).sum()

    best = product([teacher, reference], [a, 1 - a])
    assert_close(least(cost, 6, seed=3).exp(), best.exp(), rtol=0, atol=1e-6)
    signed = panel(ReverseKL(), teachers_logp=[teacher, reference], student_logp=best, weights=[a, 1 - a])
    assert_close(signed, cost(best))
    assert_close(minimiser(ReverseKL(), [teacher, reference], [a, 1 - a]), best)


def test_interpolated_logits_are_a_product():
    teacher, student = rows(4, 6, seed=0), rows(4, 6, seed=1)
    blended = log_probs(0.7 * teacher + 0.3 * student)
    assert_close(product([log_probs(teacher), log_probs(student)], [0.7, 0.3]), blended)


def test_subtraction_keeps_to_what_the_expert_allows():
    expert, amateur = torch.tensor([0.6, 0.4, 0.0]).log(), torch.tensor([0.5, 0.25, 0.25]).log()
    expected = torch.tensor([0.36 / 0.5, 0.16 / 0.25, 0.0])
    assert_close(product([expert, amateur], [2.0, -1.0]).exp(), expected / expected.sum())
    masked = torch.tensor([0.5, 0.5, 0.0]).log()  # an outcome that both forbid is no quarrel
    assert product([masked, masked], [2.0, -1.0]).exp().tolist() == pytest.approx([0.5, 0.5, 0.0])
    with pytest.raises(ModelError, match="forbidden only by a subtracted expert"):
        product([amateur, expert], [2.0, -1.0])


def test_teachers_that_share_nothing_have_no_product():
    one, other = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    for a in (-1.0, 0.0):
        with pytest.raises(ModelError, match="no outcome is allowed by all"):
            power_mean([one, other], None, a)
    assert mixture([one, other]).exp().tolist() == pytest.approx([0.5, 0.5])


def test_confidence_weights_by_hand():
    weights = confidence_weights(torch.tensor([[1.0, 0.5, math.nan], [0.0, 0.5, 1.0]]))
    assert_close(weights, torch.tensor([[0.7311, 0.5, 0.5], [0.2689, 0.5, 0.5]]), rtol=0, atol=1e-4)
    sharp = confidence_weights(torch.tensor([0.9, 0.4]), temperature=0.5)
    assert sharp[0].item() == pytest.approx(1 / (1 + math.exp(-1.0)))
    with pytest.raises(RecipeError, match="temperature must be positive, got 0"):
        confidence_weights(torch.zeros(2), temperature=0)


def test_disagreement_by_hand():
    logp = torch.tensor([[-1.0, -2.0], [-3.0, -2.0], [-2.0, -2.0]])
    assert disagreement(logp).tolist() == [1.0, 0.0]
    assert disagreement(list(logp), "range").tolist() == [2.0, 0.0]
    assert disagreement(logp.bfloat16()).dtype == torch.float32
    with pytest.raises(ModelError, match="at least two teachers, got 1"):
        disagreement(logp[:1])
    with pytest.raises(RecipeError, match="must be one of variance, range, got 'std'"):
        disagreement(logp, "std")


def test_contrast_by_hand():
    """Its gradient is the difference of two signs, and stops once the wrong answer is a margin farther away."""
    student = torch.tensor([-1.0, -1.0, -1.0, -3.0]).requires_grad_()
    positive = torch.tensor([-0.5, -2.0, -1.0, -1.0]).requires_grad_()
    negative = torch.tensor([-2.0, -0.6, -4.0, -2.5]).requires_grad_()
    value = contrast(positive_logp=positive, negative_logp=negative, student_logp=student, margin=0.8)
    assert_close(value, torch.tensor([0.8 + 0.5 - 1.0, 0.8 + 1.0 - 0.4, 0.0, 0.8 + 2.0 - 0.5]))
    gradients = torch.autograd.grad(value.sum(), (student, positive, negative), allow_unused=True)
    assert gradients[0].tolist() == [-1.0 - 1.0, 1.0 + 1.0, 0.0, -1.0 + 1.0]
    assert gradients[1:] == (None, None)
    low = contrast(positive_logp=positive.bfloat16(), negative_logp=negative, student_logp=student.bfloat16())
    assert low.dtype == torch.float32
    with pytest.raises(ModelError, match=r"equal shapes of sampled tokens, got \[\[4\], \[4\], \[3\]\]"):
        contrast(positive_logp=positive, negative_logp=negative, student_logp=student[:3])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda t: mixture([]), ModelError, "at least one teacher"),
        (lambda t: mixture([t[0], t[1, :, :4]]), ModelError, r"all of one shape .* got \[\[2, 4\], \[2, 5\]\]"),
        (lambda t: mixture(t, [1, 1]), ModelError, r"3 teachers at positions \[2\] has weights of shape \[2\]"),
        (lambda t: mixture(t, [2, -1, 1]), RecipeError, "order 1.0 needs weights of at least 0. To subtract an expert"),
        (lambda t: mixture(t, [0, 0, 0]), RecipeError, "must have a positive sum at every position"),
        (
            lambda t: mixture(t, torch.eye(3)[:, :2] * torch.tensor([1, 0])),
            RecipeError,
            "a positive sum at every position",
        ),
        (
            lambda t: minimiser(JensenShannon(), t),
            RecipeError,
            "under JensenShannon has no closed form here. It has for",
        ),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(experts(2, 5))
