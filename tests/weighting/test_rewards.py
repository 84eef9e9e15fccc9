"""Weights of responses from the grades of their group: exact means over all outcomes, and the kernel's optimality."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import DataError, RecipeError, SignalError
from potstill.weighting import (
    BetaKernel,
    CorrectOnly,
    HardBand,
    IncorrectOnly,
    Positions,
    RewardItself,
    RewardSoftmax,
    Uniform,
    pass_rates,
)

MEMBERS = [
    BetaKernel(),
    BetaKernel(2.0, 0.5, prior=1.0),
    BetaKernel(unbiased=True),
    BetaKernel(mean_one=True),
    BetaKernel(normalize="mean"),
    HardBand(0.2, 0.8),
    RewardSoftmax(0.5),
    CorrectOnly(),
    IncorrectOnly(mean_one=True),
    RewardItself(),
]
# Two problems of four answers: 1 of 4 right and 3 of 4; one answer has nothing that counts.
GRADES = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1])
MASK = torch.arange(3)[None] < torch.tensor([3, 2, 1, 3, 3, 0, 2, 1])[:, None]


def seen(grades: Tensor = GRADES, group: int = 4, mask: Tensor | None = None) -> Positions:
    return Positions(
        torch.ones(len(grades), 1, dtype=torch.bool) if mask is None else mask, reward_B=grades, group=group
    )


def weights(weighting, grades: Tensor = GRADES, group: int = 4) -> Tensor:
    return weighting(seen(grades, group))[:, 0]


def test_pass_rates_are_means_of_groups():
    assert_close(pass_rates(GRADES, 4), torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert_close(pass_rates(GRADES, 2), torch.tensor([0.5, 0.0, 1.0, 0.5], dtype=torch.float64))
    assert_close(pass_rates(GRADES, 4, prior=1.0), torch.tensor([2 / 6, 4 / 6], dtype=torch.float64))


def test_the_kernel_by_hand_its_peak_and_its_symmetry():
    assert_close(weights(BetaKernel(2.0, 1.0)), torch.tensor([0.25**2 * 0.75] * 4 + [0.75**2 * 0.25] * 4))
    assert_close(weights(BetaKernel(prior=1.0)), torch.full((8,), 2 / 9))
    rates = torch.linspace(0, 1, 101)
    for alpha, beta in ((1.0, 1.0), (2.0, 1.0), (1.0, 3.0)):
        curve = weights(BetaKernel(alpha, beta), rates, 1)
        assert rates[curve.argmax()].item() == pytest.approx(alpha / (alpha + beta), abs=0.006)
        assert_close(curve, weights(BetaKernel(beta, alpha), rates, 1).flip(0))
        assert curve[0] == curve[-1] == 0
    assert_close(weights(BetaKernel(0.0, 0.0), rates, 1), torch.ones(101))


def mean_over_outcomes(weighting, p: float, group: int) -> float:
    outcomes = torch.tensor(list(product([0.0, 1.0], repeat=group)), dtype=torch.float64)
    chance = (p**outcomes * (1 - p) ** (1 - outcomes)).prod(1)
    found = torch.stack([weights(weighting, o, group)[0] for o in outcomes]).double()
    return float((chance * found).sum())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_mean_of_the_estimated_kernel(p):
    """E p^(1 - p^) = (1 - 1 / K) p (1 - p), so that K / (K - 1) makes it unbiased; so do falling factors for other powers."""
    assert mean_over_outcomes(BetaKernel(), p, 8) == pytest.approx(7 / 8 * p * (1 - p), rel=1e-5)
    assert mean_over_outcomes(BetaKernel(unbiased=True), p, 8) == pytest.approx(p * (1 - p), rel=1e-5)
    assert mean_over_outcomes(BetaKernel(2.0, 1.0, unbiased=True), p, 5) == pytest.approx(p**2 * (1 - p), rel=1e-5)
    assert mean_over_outcomes(BetaKernel(1.0, 2.0, unbiased=True), p, 3) == pytest.approx(p * (1 - p) ** 2, rel=1e-5)
    assert_close(weights(BetaKernel(unbiased=True)), 4 / 3 * weights(BetaKernel()))


def test_one_answer_a_problem_says_nothing():
    assert_close(weights(BetaKernel(), group=1), torch.zeros(8))
    assert weights(BetaKernel(prior=0.5), group=1).min() > 0.1
    with pytest.raises(RecipeError, match=r"at least alpha \+ beta = 2 answers a problem, got 1"):
        weights(BetaKernel(unbiased=True), group=1)


def test_the_group_variance_of_a_bernoulli_reward_is_the_kernel():
    """The variance of the score (c - p) over one answer is p (1 - p): what a group-relative reward learns from."""
    for p in (0.1, 0.25, 0.7):
        variance = p * (1 - p) ** 2 + (1 - p) * p**2
        assert weights(BetaKernel(), torch.tensor([p]), 1).item() == pytest.approx(variance)


def efficiency(tried: Tensor, best: Tensor, share: Tensor) -> Tensor:
    """Squared signal over noise of a weighted sum of problems, relative to the best weights: noise 1, signal `best`.

    (E w s)^2 / (E w^2 E s^2): 1 exactly where w is in proportion to s.
    """
    mean = lambda x: (share * x).sum()
    return mean(tried * best) ** 2 / (mean(tried**2) * mean(best**2))


@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_the_kernel_is_optimal_for_its_law_and_loses_at_most_delta_squared(delta):
    """Signals w(p)(1 + e(p)) with |e| <= delta. Kantorovich: the loss is at most delta^2, reached where half of the kernel's
    energy has e = +delta and half -delta weighted by 1 / (1 + e); by symmetry no other fixed weight guarantees more."""
    rates = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    kernel = weights(BetaKernel(2.0, 1.0), rates, 1).double()
    share = torch.full_like(rates, 1 / len(rates))
    assert efficiency(kernel, kernel, share).item() == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        signs = torch.randint(0, 2, rates.shape, generator=generator) * 2.0 - 1
        assert 1 - efficiency(kernel, kernel * (1 + delta * signs), share) <= delta**2 + 1e-9
    two, low = torch.tensor([0.25, 0.75], dtype=torch.float64), (1 + delta) / 2
    w = weights(BetaKernel(), two, 1).double()
    worst = efficiency(w, w * torch.tensor([1 - delta, 1 + delta]), torch.tensor([low, 1 - low], dtype=torch.float64))
    assert 1 - worst.item() == pytest.approx(delta**2, rel=1e-5)
    bent = w * torch.tensor([1.0, 1.2])  # a rival, against the law that is worst for it: both problems swapped or not
    sides = [
        efficiency(
            bent, w * torch.tensor([1 - d, 1 + d]), torch.tensor([(1 + d) / 2, (1 - d) / 2], dtype=torch.float64)
        )
        for d in (delta, -delta)
    ]
    assert min(sides) < worst


def test_the_hard_band_has_its_edges_inside():
    rates = torch.tensor([0.0, 0.125, 0.2, 0.5, 0.8, 0.875, 1.0])
    assert_close(weights(HardBand(0.2, 0.8), rates, 1), torch.tensor([0.0, 0, 1, 1, 1, 0, 0]))
    assert_close(weights(HardBand(0.0, 1.0)), torch.ones(8))


def test_the_reward_softmax_favours_right_answers_with_mean_one():
    found = weights(RewardSoftmax(0.5))
    e = math.exp(2.0)
    assert_close(found, torch.where(GRADES > 0, 8 * e / (4 * e + 4), 8 / (4 * e + 4)))
    assert found.mean().item() == pytest.approx(1.0)


def test_masks_of_right_and_wrong_answers_part_them():
    assert_close(weights(CorrectOnly()), GRADES)
    assert_close(weights(IncorrectOnly()), 1 - GRADES)
    assert_close(weights(CorrectOnly(0.3), torch.tensor([0.3, 0.2]), 1), torch.tensor([1.0, 0.0]))


def test_mean_one_is_a_mean_over_the_responses_that_count():
    found = BetaKernel(2.0, 1.0, mean_one=True)(seen(mask=MASK))
    counted = MASK.any(1)
    assert found[counted].amax(1).mean().item() == pytest.approx(1.0)
    assert found[~counted].sum() == 0
    flat = BetaKernel(0.0, 0.0, mean_one=True)(seen(mask=MASK))
    assert torch.equal(flat, Uniform()(seen(mask=MASK)) * MASK)
    nothing = BetaKernel(mean_one=True)(seen(torch.ones(8)))
    assert_close(nothing, torch.zeros(8, 1))  # all are mastered: no weight, and no NaN


@pytest.mark.parametrize("weighting", MEMBERS, ids=repr)
def test_a_response_has_one_weight_at_all_its_positions_and_none_beyond(weighting):
    found = weighting(seen(mask=MASK))
    assert not found.requires_grad
    assert found.dtype == torch.float32
    assert found[~MASK].abs().sum() == 0
    for row, mask in zip(found, MASK):
        assert (row[mask] == row[mask][:1]).all()
    assert found.isfinite().all()
    with pytest.raises(SignalError, match="needs reward_B"):
        weighting(Positions(MASK))
    with pytest.raises(RecipeError, match=r"reward_B has shape \[7\]"):
        weighting(Positions(MASK, reward_B=GRADES[:7]))


def test_how_far_they_look():
    assert {w.couples for w in (BetaKernel(), HardBand(), CorrectOnly())} == {"row"}
    assert {w.couples for w in (BetaKernel(mean_one=True), RewardSoftmax(), HardBand(normalize="mean"))} == {"batch"}


def test_grades_that_are_no_pass_rates_are_refused():
    with pytest.raises(DataError, match="got 7 rewards in groups of 4"):
        BetaKernel()(seen(GRADES[:7]))
    with pytest.raises(DataError, match=r"mean of rewards in \[0, 1\], got 0 to 2"):
        HardBand()(seen(2 * GRADES))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BetaKernel(-1.0), "BetaKernel takes powers and a prior of at least 0, got alpha -1.0"),
        (lambda: BetaKernel(1.5, unbiased=True), "unbiased needs whole alpha and beta, and no prior"),
        (lambda: BetaKernel(prior=1.0, unbiased=True), "unbiased needs whole alpha and beta, and no prior"),
        (lambda: HardBand(0.8, 0.2), "HardBand takes 0 <= low <= high <= 1, got 0.8 and 0.2"),
        (lambda: RewardSoftmax(0.0), "RewardSoftmax.beta must be positive, got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
