"""Single members by hand: closed forms, edges, options, and where the directions would be told apart."""

import math

import pytest
import torch
from pydantic import BaseModel, TypeAdapter
from scipy.stats import entropy as scipy_kl
from tests.divergences.inputs import rows
from torch import Tensor
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
from potstill.divergences.family import Adaptive

INF = math.inf


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


def test_jensen_shannon_by_hand():
    """Teacher certain, student a fair coin, share 0.1: m = (0.55, 0.45). Fails if the share is the student's."""
    expected = 0.1 * math.log(1 / 0.55) + 0.9 * (0.5 * math.log(0.5 / 0.55) + 0.5 * math.log(0.5 / 0.45))
    value = JensenShannon(0.1)(teacher_logp=torch.tensor([1.0, 0.0]).log(), student_logp=log_probs(torch.zeros(2)))
    assert value.item() == pytest.approx(expected, rel=1e-5)


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


SCORE_WEIGHTS = {  # the table of f-distill (arXiv 2502.15681), up to the factor on the left
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
    for part in (Clipped(), EntropyGated(), Adaptive()):
        with pytest.raises(RecipeError, match=f"{type(part).__name__} has no generator f"):
            part.score_weight(torch.zeros(1))
        with pytest.raises(RecipeError, match="Score weights, conjugates and estimates need a plain member"):
            part.conjugate_at(torch.zeros(1))


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


def by_hand() -> dict[str, Tensor]:
    """Head (0.4, 0.3), which is as little as reaches one half; gaps 0.25 there and 0.35 in the tail."""
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.2, 0.25, 0.15, 0.4])
    return {"teacher_logp": p.double().log(), "student_logp": q.double().log()}


def test_adaptive_by_hand():
    pair = by_hand()
    gate = Adaptive().gate(**pair)
    assert gate.item() == pytest.approx(0.25 / 0.6)
    forward, reverse = ForwardKL()(**pair), ReverseKL()(**pair)
    assert Adaptive()(**pair).item() == pytest.approx(((0.25 * forward + 0.35 * reverse) / 0.6).item())
    assert Adaptive(head_mass=0.3).gate(**pair).item() == pytest.approx(0.2 / 0.6)  # the likeliest outcome alone
    assert Adaptive(head_mass=0.39).gate(**pair).item() == pytest.approx(0.2 / 0.6)
    assert Adaptive(head_mass=0.95).gate(**pair).item() == pytest.approx(1.0)


def test_the_head_ends_where_its_mass_is_reached():
    p, q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    assert Adaptive().gate(p, q).item() == pytest.approx(0.5)  # gaps 0.25 and 0.25: the first outcome is enough


def test_outcomes_as_likely_as_the_last_of_the_head_belong_to_it():
    q = log_probs(rows(6, seed=1))
    assert Adaptive().gate(torch.full_like(q, 1 / 6).log(), q).item() == pytest.approx(1.0)
    p = torch.tensor([0.3, 0.3, 0.3, 0.1, 0.0, 0.0], dtype=torch.float64)
    gap = (p - q.exp()).abs()
    assert Adaptive().gate(p.log(), q).item() == pytest.approx((gap[:3].sum() / gap.sum()).item())


def test_adaptive_is_zero_and_flat_at_equality():
    """Where code that divides the gaps by their sum, 0, is NaN."""
    z = torch.tensor([[0.3, -1.0, 2.0], [0.0, -INF, -INF]], requires_grad=True)
    value = Adaptive()(teacher_logp=log_probs(z.detach()), student_logp=log_probs(z))
    assert value.tolist() == [0.0, 0.0]
    assert_close(torch.autograd.grad(value.sum(), z)[0], torch.zeros(2, 3), atol=1e-6, rtol=0)


def test_the_gate_of_adaptive_is_a_constant():
    pair = {name: x.requires_grad_() for name, x in by_hand().items()}
    gate = Adaptive().gate(**pair)
    assert not gate.requires_grad
    ours = torch.autograd.grad(Adaptive()(**pair), list(pair.values()))
    assert_close(ours, torch.autograd.grad(Mixture()(**pair, weight=gate), list(pair.values())))


def test_clipping_positions():
    p = log_probs(rows(3, 5, seed=0))
    z = (p + torch.tensor([[0.0], [0.1], [3.0]]) * rows(3, 5, seed=1)).requires_grad_()
    pair = {"teacher_logp": p, "student_logp": log_probs(z)}
    whole, clipped = kl(p, log_probs(z)), Clipped(ForwardKL(), 0.2, per="position")
    value = clipped(**pair)
    assert (whole[1] < 0.2 < whole[2]).item()
    assert_close(value, whole.clamp_max(0.2))
    found, plain = (torch.autograd.grad(x.sum(), z, retain_graph=True)[0] for x in (value, whole))
    assert_close(found[:2], plain[:2])
    assert found[2].tolist() == [0.0] * 5
    certain = torch.tensor([1.0, 0.0]).log()
    assert Clipped(ReverseKL(), 0.2, per="position")(
        teacher_logp=certain, student_logp=torch.tensor([0.5, 0.5]).log()
    ).item() == pytest.approx(0.2)


@pytest.mark.parametrize("per", ["entry", "position"])
def test_clipping_does_not_hide_a_nan(per):
    broken = torch.tensor([math.nan, -1.0])
    assert Clipped(ForwardKL(), 0.2, per=per)(teacher_logp=log_probs(torch.zeros(2)), student_logp=broken).isnan()


def test_gated_mixtures_are_clipped_in_their_nonnegative_form():
    pair = by_hand()
    gate = Adaptive().gate(**pair)
    p, q = (x.exp() for x in pair.values())
    u = pair["teacher_logp"] - pair["student_logp"]
    entries = gate * (p * u + q - p) + (1 - gate) * (-q * u + p - q)
    assert_close(Clipped(Adaptive(), 0.05)(**pair), entries.clamp_max(0.05).sum())


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
        (lambda: Adaptive(head_mass=1.0), "Adaptive.head_mass must lie strictly between 0 and 1, got 1.0. For one KL"),
        (lambda: Clipped(per="token"), "Clipped.per must be one of entry, position, got 'token'"),
        (lambda: Clipped(raw=True, per="position"), "Clipped.raw is about single entries, and per 'position' clips"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_unequal_vocabularies_are_refused():
    with pytest.raises(ModelError, match=r"ForwardKL compares equal shapes .* teacher \[2, 5\] and student \[2, 6\]"):
        kl(torch.zeros(2, 5), torch.zeros(2, 6))
