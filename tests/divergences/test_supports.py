import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from tests.divergences.inputs import least, rows
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import RecipeError
from potstill.divergences import (
    Alpha,
    ForwardKL,
    Full,
    JensenShannon,
    PearsonChi2,
    ReverseKL,
    SquaredHellinger,
    TopK,
    TotalVariation,
    kl,
    log_mass,
    log_probs,
    tail_logp,
)

INF = math.inf
SIDES = ("teacher", "student", "union")


def pair(seed: int = 0, shape: tuple[int, ...] = (2, 3, 12)) -> dict[str, Tensor]:
    return {
        "teacher_logp": log_probs(rows(*shape, seed=seed, scale=2)),
        "student_logp": log_probs(rows(*shape, seed=seed + 1, scale=2)),
    }


def on(support, both: dict[str, Tensor]) -> dict[str, Tensor]:
    teacher, student = support(**both)
    return {"teacher_logp": teacher, "student_logp": student}


def test_log_probs_divides_by_the_temperature_and_is_float32_or_better():
    logits = torch.tensor([0.0, math.log(9.0)])
    assert_close(log_probs(logits, 2.0).exp(), torch.tensor([0.25, 0.75]))
    assert log_probs(logits.bfloat16()).dtype == torch.float32
    assert log_probs(logits.double()).dtype == torch.float64
    with pytest.raises(RecipeError, match="temperature must be positive, got 0"):
        log_probs(logits, 0)


def test_top_k_by_hand():
    teacher, student = torch.tensor([0.6, 0.3, 0.1, 0.0]).log(), torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    expected = {
        ("teacher", "drop"): ([0.6, 0.3], [0.1, 0.2]),
        ("student", "drop"): ([0.0, 0.1], [0.4, 0.3]),
        ("teacher", "renormalize"): ([2 / 3, 1 / 3], [1 / 3, 2 / 3]),
        ("teacher", "bucket"): ([0.6, 0.3, 0.1], [0.1, 0.2, 0.7]),
        ("student", "bucket"): ([0.0, 0.1, 0.9], [0.4, 0.3, 0.3]),
    }
    for (of, tail), (p, q) in expected.items():
        got_p, got_q = TopK(2, of, tail)(teacher_logp=teacher, student_logp=student)
        assert_close(got_p.exp(), torch.tensor(p))
        assert_close(got_q.exp(), torch.tensor(q))


def test_the_union_counts_a_shared_outcome_once():
    teacher, student = torch.tensor([0.5, 0.3, 0.1, 0.1]).log(), torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    p, q = TopK(2, "union", "bucket")(teacher_logp=teacher, student_logp=student)  # ids 0, 1 and 0, 2
    assert p.shape == (5,)
    assert_close(p.exp().sort().values, torch.tensor([0.0, 0.1, 0.1, 0.3, 0.5]))
    assert_close(q.exp().sort().values, torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]))
    assert p[q == -INF].item() == -INF  # the duplicate is dead on both sides


@pytest.mark.parametrize("of", SIDES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("d", [ForwardKL(), ReverseKL(), JensenShannon(0.3)], ids=repr)
def test_k_equal_to_the_vocabulary_is_the_full_divergence(of, tail, d):
    both = pair()
    for k in (12, 99):
        assert_close(d(**on(TopK(k, of, tail), both)), d(**both))
    assert_close(d(**on(Full(), both)), d(**both))


@pytest.mark.parametrize("of", SIDES)
@pytest.mark.parametrize("d", [ForwardKL(), ReverseKL(), TotalVariation(), PearsonChi2(), SquaredHellinger()], ids=repr)
def test_a_bucket_loses_information_and_never_adds_any(of, d):
    both, values = pair(), []
    for k in (1, 3, 6, 12):
        teacher, student = TopK(k, of, "bucket")(**both)
        assert_close(log_mass(teacher), torch.zeros_like(log_mass(teacher)), atol=1e-12, rtol=0)
        values.append(d(teacher_logp=teacher, student_logp=student))
    assert all((coarse <= fine + 1e-12).all() for coarse, fine in pairwise(values))
    assert (values[0] < values[-1] - 1e-3).all()


@pytest.mark.parametrize("of", SIDES)
def test_renormalised_rows_are_distributions(of):
    for logp in TopK(3, of, "renormalize")(**pair()):
        assert_close(log_mass(logp), torch.zeros_like(log_mass(logp)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("of", SIDES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_gradients_are_finite_at_certain_rows(of, tail):
    logits = [torch.tensor([[0.0, -INF, -INF, -INF], [0.0, -INF, 1.0, -2.0]], requires_grad=True) for _ in range(2)]
    both = {"teacher_logp": log_probs(logits[0]), "student_logp": log_probs(logits[1])}
    value = JensenShannon()(**on(TopK(2, of, tail), both))
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), logits))


def test_a_student_without_mass_on_the_support_is_infinite_not_nan():
    teacher, student = torch.tensor([1.0, 0.0, 0.0]).log(), torch.tensor([0.0, 0.5, 0.5]).log()
    for tail in ("bucket", "renormalize", "drop"):
        assert ForwardKL()(**on(TopK(1, "teacher", tail), {"teacher_logp": teacher, "student_logp": student})) == INF


def test_the_tail_of_an_almost_certain_row_survives_float32():
    """1 - sum(kept) would be 0 here, and the reverse KL of the bucket infinite."""
    logits = torch.tensor([0.0, -25.0, -25.0])
    teacher, _ = TopK(1)(teacher_logp=log_probs(logits), student_logp=log_probs(logits))
    assert teacher[-1].item() == pytest.approx(-25 + math.log(2), rel=1e-6)


def test_tail_of_kept_outcomes_alone():
    kept = torch.tensor([[0.5, 0.3], [0.75, 0.25], [1.0, 0.0]]).log().requires_grad_()
    tail = tail_logp(kept)
    assert tail[0].exp().item() == pytest.approx(0.2)
    assert tail[1:].tolist() == [-INF, -INF]
    (gradient,) = torch.autograd.grad(tail[0] + tail[1:].exp().sum(), kept)
    assert_close(gradient[0], torch.tensor([-0.5 / 0.2, -0.3 / 0.2]))
    assert gradient[1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    whole = log_probs(rows(9, seed=5))
    assert_close(tail_logp(whole[:4]), whole[4:].logsumexp(-1))


def test_log_mass_of_nothing():
    nothing = torch.full((3,), -INF, requires_grad=True)
    mass = log_mass(nothing)
    assert mass.item() == -INF
    assert torch.autograd.grad(mass, nothing)[0].tolist() == [0.0, 0.0, 0.0]


def test_the_support_is_chosen_without_gradient_and_follows_its_side():
    both = pair()
    for of in ("teacher", "student"):
        ids = TopK(3, of).indices(**both)
        assert_close(ids, both[f"{of}_logp"].topk(3).indices)


@pytest.mark.parametrize(("d", "scale"), [(ForwardKL(), 1.0), (ReverseKL(), 1 / math.e)], ids=["forward", "reverse"])
def test_dropping_the_tail_moves_the_minimum(d, scale):
    """STAR (arXiv 2602.03022): minima are m log m at q = p / m (forward KL) and -m / e at q = p / e (reverse KL)."""
    log_p = log_probs(rows(12, seed=7))
    support = TopK(4, "teacher", "drop")
    kept = log_p.topk(4).indices
    m = log_p[kept].exp().sum()
    on_support = 1.0 if scale == 1.0 else (m / math.e)  # student mass that the minimiser leaves on the support
    q = torch.full((12,), ((1 - on_support) / 8), dtype=torch.float64)
    q[kept] = log_p[kept].exp() / m * on_support
    minimum = m * m.log() if scale == 1.0 else -m / math.e

    def value(log_q: Tensor) -> Tensor:
        return d(**on(support, {"teacher_logp": log_p, "student_logp": log_q}))

    assert value(q.log()).item() == pytest.approx(minimum.item(), rel=1e-12)
    assert minimum < 0
    for candidate in log_probs(q.clamp_min(1e-3).log() + rows(500, 12, seed=9, scale=0.3)):
        assert value(candidate) > minimum - 1e-12
    assert value(log_p) > minimum + 1e-3  # the teacher itself is not the minimiser


def test_renormalising_makes_the_outside_free():
    """A student that spends 90 % outside the support still has divergence 0: the reason to prefer the bucket."""
    p, q = torch.tensor([0.6, 0.4, 0.0]).log(), torch.tensor([0.06, 0.04, 0.9]).log()
    both = {"teacher_logp": p, "student_logp": q}
    assert ReverseKL()(**on(TopK(2, "teacher", "renormalize"), both)).item() == pytest.approx(0.0, abs=1e-6)
    assert kl(*TopK(2, "teacher", "bucket")(**both)).item() == pytest.approx(math.log(10), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "TopK.k must be at least 1, got 0"),
        ({"of": "judge"}, "TopK.of must be one of teacher, student, union, got 'judge'"),
        ({"tail": "keep"}, "TopK.tail must be one of bucket, renormalize, drop, got 'keep'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        TopK(**options)


def twin(d, p: list[float], q: list[float], k: int, of: str, tail: str) -> float:
    """The divergence on a support, from sets of token ids and plain numbers."""

    def likeliest(row: list[float]) -> set[int]:
        return set(sorted(range(len(row)), key=lambda v: -row[v])[:k])

    ids = {"teacher": likeliest(p), "student": likeliest(q), "union": likeliest(p) | likeliest(q)}[of]
    kept = [(p[v], q[v]) for v in ids]
    m, s = (sum(pair[side] for pair in kept) for side in (0, 1))
    if tail == "renormalize":
        kept = [(a / m, b / s) for a, b in kept]
    if tail == "bucket":
        kept.append((sum(p) - m, sum(q) - s))
    return sum(b * d.f(torch.tensor(a / b, dtype=torch.float64).log()).item() for a, b in kept)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), size=st.integers(5, 12), k=st.integers(1, 4))
def test_every_support_is_its_twin_made_of_sets(seed, size, k):
    both = pair(seed=2 * seed, shape=(size,))
    p, q = (x.exp().tolist() for x in both.values())
    for of, tail, d in product(
        SIDES, ("bucket", "renormalize", "drop"), (ForwardKL(), ReverseKL(), JensenShannon(0.3))
    ):
        if of == "union" and tail == "bucket" and 2 * k >= size:
            continue  # nothing may be left for the bucket, where the twin would divide 0 by 0
        expected = twin(d, p, q, k, of, tail)
        assert d(**on(TopK(k, of, tail), both)).item() == pytest.approx(expected, rel=1e-9, abs=1e-12), (of, tail, d)


@pytest.mark.parametrize("of", SIDES)
def test_a_support_of_everything_is_the_whole_row(of):
    both = pair()
    for d in (ForwardKL(), ReverseKL(), TotalVariation()):
        for tail in ("bucket", "renormalize", "drop"):
            assert_close(d(**on(TopK(99, of, tail), both)), d(**both))


def test_what_the_tail_costs():
    """The bucket keeps what f of the tail's two masses says, the dropped tail exactly the rest of the sum."""
    both = pair(shape=(12,))
    bucket, drop = (ForwardKL()(**on(TopK(4, "teacher", tail), both)) for tail in ("bucket", "drop"))
    m, s = (log_mass(x).exp() for x in TopK(4, "teacher", "drop")(**both))
    assert_close(bucket - drop, (1 - m) * ((1 - m) / (1 - s)).log())
    whole = ForwardKL().entries(**both)
    assert_close(drop, whole[both["teacher_logp"].topk(4).indices].sum())
    renormalised = ForwardKL()(**on(TopK(4, "teacher", "renormalize"), both))
    assert_close(drop, m * (renormalised + (m / s).log()))  # the chain rule of the KL


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "d", [ForwardKL(), ReverseKL(), JensenShannon(0.5), SquaredHellinger(), PearsonChi2(), Alpha(1.5)], ids=repr
)
def test_what_dropping_the_tail_does_to_each_minimum(d, seed):
    """Free to choose its mass s on the kept outcomes, a student is best at q = p s / m there, with s f(m / s).

    Forward KL: m log m at s = 1. Reverse KL: -m / e at s = m / e. Found by descent over all q and by a line search on s.
    """
    log_p = log_probs(rows(8, seed=seed + 20, scale=1.5))
    kept = log_p.topk(3).indices
    m = log_p[kept].exp().sum()
    cost = lambda log_q: d(**on(TopK(3, "teacher", "drop"), {"teacher_logp": log_p, "student_logp": log_q}))
    log_q = least(cost, 8, seed)
    found, q = cost(log_q).item(), log_q.exp()

    def on_support(s: float) -> float:
        return s * d.f((m / s).log()).item()

    line = minimize_scalar(on_support, bounds=(1e-9, 1.0), method="bounded", options={"xatol": 1e-12})
    best = min(line.fun, on_support(1.0))
    assert found == pytest.approx(best, abs=1e-6)
    s = q[kept].sum()
    assert_close(q[kept] / s, log_p[kept].exp() / m, rtol=0, atol=1e-3)
    closed = {ForwardKL(): (m * m.log(), 1.0), ReverseKL(): (-m / math.e, m / math.e)}
    if d in closed:
        assert best == pytest.approx(float(closed[d][0]), abs=1e-9)
        assert float(s) == pytest.approx(float(closed[d][1]), abs=1e-3)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("d", [ForwardKL(), ReverseKL(), JensenShannon(0.5)], ids=repr)
def test_where_the_other_tails_are_least(d, tail):
    """Bucket: 0, only where the kept outcomes and the tail's mass are the teacher's. Renormalised: 0 whatever the mass."""
    log_p, support = log_probs(rows(8, seed=20)), TopK(3, "teacher", tail)
    kept = log_p.topk(3).indices
    cost = lambda log_q: d(**on(support, {"teacher_logp": log_p, "student_logp": log_q}))
    log_q = least(cost, 8, seed=0)
    found, q = cost(log_q).item(), log_q.exp()
    assert found == pytest.approx(0.0, abs=1e-9)
    free = 1.0 if tail == "bucket" else log_p[kept].exp().sum() / q[kept].sum()
    assert_close(q[kept] * free, log_p[kept].exp(), rtol=0, atol=1e-4)
    assert tail == "bucket" or abs(free - 1.0) > 0.05
