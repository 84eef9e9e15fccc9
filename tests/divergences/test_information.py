"""Bounds against their definition in loops, against discrete laws enumerated sample by sample, and against Gaussians."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.divergences.information import info_nce, mi_alpha, nwj

ALPHAS = [0.0, 0.01, 0.5, 0.9, 1.0]
alphas = pytest.mark.parametrize("alpha", ALPHAS)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(scores: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """The objective of the MI-alpha family, entry by entry."""
    K, e = len(scores), scores.exp()
    d = lambda i, j: alpha * sum(e[i, k] for k in range(K) if k != j) / (K - 1) + (1 - alpha) * log_q[i].exp()
    others = lambda i: [j for j in range(K) if j != i]
    joint = [sum(scores[i, i] - d(i, j).log() for j in others(i)) / (K - 1) for i in range(K)]
    marginal = [sum(e[i, j] / d(i, i) for j in others(i)) / (K - 1) for i in range(K)]
    return torch.stack([1 + a - b for a, b in zip(joint, marginal)])


# Definitions


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.sampled_from([*ALPHAS, 0.3]), st.floats(0.1, 6.0), st.integers(0, 2**31))
def test_mi_alpha_by_its_definition(K, alpha, scale, seed):
    scores, log_q = scale * normal(K, K, seed=seed), normal(K, seed=seed + 1)
    assert_close(mi_alpha(scores, log_q, alpha), by_definition(scores, log_q, alpha), rtol=1e-9, atol=1e-9)


def test_info_nce_by_hand():
    """Two rows, e^s = (3, 1) and (1, 1): log(3 / 2) and log 1. Rows are the student's: columns would give other numbers."""
    scores = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    assert info_nce(scores).tolist() == pytest.approx([math.log(3 / 2), 0.0])


def test_nwj_by_hand():
    scores = torch.tensor([[0.5, 1.0], [3.0, -1.0]])
    assert nwj(scores).tolist() == pytest.approx([0.5 - 1.0, -1.0 - math.exp(2.0)])


def test_at_alpha_one_it_is_info_nce_without_one_negative():
    """Averaged over the negative that is dropped; its second mean is exactly 1, whatever the baseline."""
    scores = normal(6, 6, seed=0)
    expected = []
    for i in range(6):
        kept = [[k for k in range(6) if k != j] for j in range(6) if j != i]
        expected.append(sum(scores[i, i] - scores[i, k].logsumexp(0) + math.log(5) for k in kept) / 5)
    assert_close(mi_alpha(scores, alpha=1.0), torch.stack(expected))
    assert_close(mi_alpha(scores, normal(6, seed=1), 1.0), torch.stack(expected))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.floats(0.1, 100.0), st.integers(0, 2**31))
def test_the_contrastive_bounds_saturate(K, scale, seed):
    scores = scale * normal(K, K, seed=seed)
    assert (info_nce(scores) <= math.log(K) + 1e-9).all()
    assert (mi_alpha(scores, alpha=1.0) <= math.log(K - 1) + 1e-9).all()
    sure = 1000 * torch.eye(K, dtype=torch.float64)
    assert_close(info_nce(sure), torch.full((K,), math.log(K)).double())
    assert_close(mi_alpha(sure, alpha=1.0), torch.full((K,), math.log(K - 1)).double())


def test_at_alpha_zero_it_is_tuba_and_with_q_equal_e_nwj():
    scores, log_q = normal(5, 5, seed=0), normal(5, seed=1)
    ratio = (scores - log_q[:, None]).exp()
    tuba = 1 + (scores.diagonal() - log_q) - (ratio.sum(1) - ratio.diagonal()) / 4
    assert_close(mi_alpha(scores, log_q, 0.0), tuba)
    assert_close(mi_alpha(scores, 1.0, 0.0), nwj(scores))
    assert_close(mi_alpha(scores, torch.ones(5).double(), 0.0), nwj(scores))


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_ends_are_limits(end):
    scores, log_q = normal(5, 5, seed=0), normal(5, seed=1)
    assert_close(mi_alpha(scores, log_q, abs(end - 1e-9)), mi_alpha(scores, log_q, end), rtol=1e-6, atol=1e-6)


# What the bounds know of mutual information

JOINT = torch.tensor([[0.30, 0.05, 0.10], [0.05, 0.40, 0.10]], dtype=torch.float64)  # rows the teacher's x, columns y
PRODUCT = JOINT.sum(1, keepdim=True) * JOINT.sum(0)
OPTIMAL = (JOINT / PRODUCT).log()
INFORMATION = (JOINT * OPTIMAL).sum().item()


def expectation(bound, joint: Tensor, critic: Tensor, K: int) -> float:
    """The mean of a bound over every sample of K pairs (x, y), each with its probability."""
    pairs = torch.tensor(list(itertools.product(range(joint.numel()), repeat=K)))
    x, y = pairs // joint.shape[1], pairs % joint.shape[1]
    scores = critic[x[:, None, :], y[:, :, None]]  # [samples, student row, teacher column]
    return (joint[x, y].prod(1) * bound(scores, y).mean(1)).sum().item()


@pytest.mark.parametrize("K", [2, 3, 4])
def test_at_alpha_zero_the_best_critic_finds_the_information(K):
    value = expectation(lambda s, y: mi_alpha(s, alpha=0.0), JOINT, OPTIMAL, K)
    assert value == pytest.approx(INFORMATION, rel=1e-9)
    assert expectation(lambda s, y: nwj(s), JOINT, OPTIMAL + 1, K) == pytest.approx(INFORMATION, rel=1e-9)
    assert expectation(lambda s, y: nwj(s), JOINT, OPTIMAL, K) < INFORMATION - 1e-2


@alphas
@pytest.mark.parametrize("seed", range(6))
def test_no_critic_and_no_baseline_exceed_the_information(alpha, seed):
    critic, baseline = normal(2, 3, seed=seed), normal(3, seed=seed + 10)
    for f, log_q in ((critic, baseline), (OPTIMAL, torch.zeros(3).double()), (OPTIMAL, baseline)):
        value = expectation(lambda s, y, log_q=log_q: mi_alpha(s, log_q[y], alpha), JOINT, f, 3)
        assert value <= INFORMATION + 1e-12
    assert expectation(lambda s, y: info_nce(s), JOINT, critic, 3) <= INFORMATION


def test_more_rows_bring_info_nce_nearer():
    values = [expectation(lambda s, y: info_nce(s), JOINT, OPTIMAL, K) for K in (2, 3, 4, 5)]
    assert values == sorted(values)
    assert INFORMATION / 2 < values[-1] < INFORMATION


@alphas
def test_independent_views_carry_nothing(alpha):
    assert expectation(lambda s, y: mi_alpha(s, alpha=alpha), PRODUCT, torch.zeros(2, 3).double(), 3) == pytest.approx(
        0
    )
    assert expectation(lambda s, y: mi_alpha(s, alpha=alpha), PRODUCT, normal(2, 3, seed=0), 3) < -1e-3


# Known figures: 20 correlated Gaussians, the best critic, q = 1, K = 64, 300 batches.
CARD_MEANS = {0.0: 5.05, 0.01: 4.92, 0.1: 4.61, 0.5: 4.10, 0.9: 3.73, 1.0: 3.46}
CARD_SPREADS = {0.0: 0.67, 0.01: 0.43, 0.1: 0.28, 0.5: 0.21, 0.9: 0.17, 1.0: 0.15}


def gaussian_scores(information: float, seed: int) -> Tensor:
    """log p(y_i | x_j) / p(y_i), [300, 64, 64], with I = -d / 2 log(1 - rho^2)."""
    d, rho = 20, math.sqrt(1 - math.exp(-2 * information / 20))
    x, noise = normal(300, 64, d, seed=seed), normal(300, 64, d, seed=seed + 1)
    y = rho * x + math.sqrt(1 - rho**2) * noise
    square = y.square().sum(-1)[:, :, None] + rho**2 * x.square().sum(-1)[:, None] - 2 * rho * y @ x.mT
    return -square / (2 * (1 - rho**2)) + y.square().sum(-1)[:, :, None] / 2 - d / 2 * math.log(1 - rho**2)


def test_bias_grows_and_variance_falls_with_alpha():
    scores = gaussian_scores(5.0, seed=0)
    batches = {alpha: mi_alpha(scores, alpha=alpha).mean(1) for alpha in CARD_MEANS}
    for alpha, value in batches.items():
        assert value.mean().item() == pytest.approx(CARD_MEANS[alpha], abs=4 * CARD_SPREADS[alpha] / 300**0.5 + 0.01)
        assert value.std().item() == pytest.approx(CARD_SPREADS[alpha], rel=0.25)
    assert (batches[1.0] <= math.log(63)).all()
    for of in (lambda v: v.mean(), lambda v: v.std()):
        values = [of(batches[alpha]).item() for alpha in CARD_MEANS]
        assert values == sorted(values, reverse=True)


def test_at_two_nats_hardly_any_bias_is_left():
    scores = gaussian_scores(2.0, seed=2)
    assert mi_alpha(scores, alpha=0.0).mean().item() == pytest.approx(2.01, abs=0.06)
    assert mi_alpha(scores, alpha=1.0).mean().item() == pytest.approx(1.82, abs=0.06)


# Invariances, rounding, gradients


@alphas
def test_what_may_be_added_to_the_scores(alpha):
    scores, log_q, shift = normal(5, 5, seed=0), normal(5, seed=1), normal(5, seed=2)
    value = mi_alpha(scores, log_q, alpha)
    assert_close(mi_alpha(scores + shift[:, None], log_q + shift, alpha), value)
    alone = mi_alpha(scores + shift[:, None], log_q, alpha)
    if alpha == 1.0:
        assert_close(alone, value)
    else:
        assert (alone - value).abs().max() > 1e-3
    assert_close(info_nce(scores + shift[:, None]), info_nce(scores))
    assert (info_nce(scores + shift) - info_nce(scores)).abs().max() > 1e-2


@alphas
def test_pairs_may_be_reordered_and_groups_stand_alone(alpha):
    scores, log_q, order = normal(2, 5, 5, seed=0), normal(2, 5, seed=1), torch.tensor([3, 0, 4, 1, 2])
    value = mi_alpha(scores, log_q, alpha)
    assert value.shape == (2, 5)
    assert_close(mi_alpha(scores[:, order][:, :, order], log_q[:, order], alpha), value[:, order])
    assert_close(mi_alpha(scores[1], log_q[1], alpha), value[1])


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("lead", [30.0, 300.0])
def test_a_sure_critic_loses_nothing_to_rounding(lead, alpha):
    """The negatives' mean is far below the positive: taken as the sum less the positive it would be lost."""
    scores = normal(6, 6, seed=0) - lead / 2 + lead * torch.eye(6)
    value = mi_alpha(scores.float(), -lead / 2, alpha)
    exact = mi_alpha(scores.double(), -lead / 2, alpha)
    slow = by_definition(scores, torch.full((6,), -lead / 2).double(), alpha)
    assert_close(exact, slow)
    assert_close(value, exact.float(), rtol=1e-4, atol=1e-4)


@alphas
def test_extreme_scores_have_finite_gradients(alpha):
    scores = torch.tensor([[-1e4, -math.inf, 0.0], [0.0, 0.0, 0.0], [-1e4, -1e4, 1e4]]).requires_grad_()
    (gradient,) = torch.autograd.grad(mi_alpha(scores, 0.0, alpha).sum(), scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_row_whose_negatives_are_impossible_is_measured_by_its_baseline(alpha):
    scores = torch.tensor([[1.0, -math.inf], [0.0, 2.0]], requires_grad=True)
    value = mi_alpha(scores, 0.0, alpha)
    assert value[0].item() == pytest.approx(2 - (math.log(alpha * math.e + 1 - alpha)))
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    assert gradient.isfinite().all()


@alphas
def test_derivatives_by_finite_differences(alpha):
    inputs = normal(2, 4, 4, seed=0).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    value = lambda scores, log_q: mi_alpha(scores, log_q, alpha)
    if alpha == 1.0:  # the baseline has no say
        inputs, value = inputs[:1], lambda scores: mi_alpha(scores, 0.0, 1.0)
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)
    assert torch.autograd.gradcheck(info_nce, inputs[:1])


def test_ties_have_the_gradient_of_their_neighbours():
    """The largest entry is masked by name; where two are equally large, either will do."""
    scores = torch.zeros(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: mi_alpha(s, alpha=0.5), (scores,))


@alphas
def test_half_precision_is_computed_in_float32(alpha):
    scores, log_q = normal(4, 4, seed=0).bfloat16(), normal(4, seed=1).bfloat16()
    value = mi_alpha(scores, log_q, alpha)
    assert value.dtype == torch.float32
    assert_close(value, mi_alpha(scores.float(), log_q.float(), alpha))
    assert info_nce(scores).dtype == nwj(scores).dtype == torch.float32


# Input


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_is_checked(alpha):
    with pytest.raises(RecipeError, match=rf"alpha must lie between 0 \(NWJ\) and 1 \(InfoNCE\), got {alpha}"):
        mi_alpha(torch.zeros(3, 3), alpha=alpha)


def test_shapes_are_checked():
    for of, name in ((mi_alpha, "mi_alpha"), (info_nce, "info_nce"), (nwj, "mi_alpha")):
        for shape in ((3, 4), (3,)):
            with pytest.raises(
                ModelError, match=rf"{name} takes the scores of all pairs of K rows, .*got \[{shape[0]}"
            ):
                of(torch.zeros(shape))
        with pytest.raises(DataError, match=f"{name} needs at least two rows, got 1: without a negative"):
            of(torch.zeros(1, 1))
    with pytest.raises(ModelError, match=r"one log_baseline for each student row, \[3\], got \[4\]"):
        mi_alpha(torch.zeros(3, 3), torch.zeros(4))
