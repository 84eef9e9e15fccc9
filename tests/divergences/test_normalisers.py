import math

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.errors import RecipeError
from potstill.divergences import ForwardKL, ReverseKL, TimeBins, batch_normalised, ratio_from_logits


def test_ratio_averages_heads_clamps_exponentiates_and_clips():
    logits = torch.tensor([[[0.0, 2.0], [1.0, 1.0]], [[50.0, 50.0], [50.0, 50.0]], [[-9.0, -9.0], [-9.0, -9.0]]])
    ratio = ratio_from_logits(logits.requires_grad_())
    assert_close(ratio, torch.tensor([math.e, 20.0, 0.1]))
    assert not ratio.requires_grad
    assert_close(ratio_from_logits(logits, clip=False), torch.tensor([1.0, 10.0, -9.0]).exp())
    assert_close(ratio_from_logits(torch.tensor([math.log(3.0)])), torch.tensor([3.0]))
    assert ratio_from_logits(logits.bfloat16()).dtype == torch.float32


def test_a_calibrated_discriminator_gives_teacher_over_student():
    """D = p / (p + q) has logit log p - log q. Fails if the ratio is the student's over the teacher's."""
    p, q = torch.tensor([0.8]), torch.tensor([0.2])
    assert_close(ratio_from_logits(torch.logit(p / (p + q))), p / q)


def test_time_bins_by_hand():
    bins = TimeBins(0.0, 10.0, bins=10, rho=0.5)
    ratio, times = torch.tensor([2.0, 4.0, 8.0]), torch.tensor([0.1, 0.9, 10.0])
    value = bins(ratio, times)
    means = [0.5 * 1 + 0.5 * 3, *[1.0] * 8, 0.5 * 1 + 0.5 * 8]  # updated before dividing; empty bins keep their mean
    assert_close(bins.means, torch.tensor(means))
    assert_close(value, torch.tensor([2 / 2, 4 / 2, 8 / 4.5]), rtol=1e-5, atol=0)
    bins(torch.tensor([5.0]), torch.tensor([0.5]))
    assert_close(bins.means[[0, 9]], torch.tensor([0.5 * 2 + 0.5 * 5, 4.5]))


def test_without_memory_a_lone_sample_becomes_one():
    assert_close(TimeBins(0, 1)(torch.tensor([17.0]), torch.tensor([0.3])), torch.ones(1), rtol=1e-5, atol=0)


def test_micro_batches_add_their_sums():
    ratio, times = torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.1, torch.linspace(0, 1, 12)
    whole, parts = TimeBins(0, 1, rho=0.3), TimeBins(0, 1, rho=0.3)
    expected = whole(ratio, times)
    sums = [parts.sums(ratio[cut], times[cut]) for cut in (slice(0, 5), slice(5, 12))]
    parts.update(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1])
    assert_close(parts.means, whole.means)
    assert_close(torch.cat([parts.divide(ratio[:5], times[:5]), parts.divide(ratio[5:], times[5:])]), expected)


def test_the_means_are_saved_and_never_learned():
    bins = TimeBins(0, 1)
    bins(torch.tensor([3.0]), torch.tensor([0.0]))
    other = TimeBins(0, 1)
    other.load_state_dict(bins.state_dict())
    assert other.means[0].item() == 3.0
    assert list(bins.parameters()) == []
    assert not bins(torch.tensor([3.0], requires_grad=True), torch.tensor([0.0])).requires_grad


def test_batch_normalised_has_mean_one_and_no_scale():
    weight = ForwardKL().score_weight(torch.tensor([-1.0, 0.0, 2.0]))
    value = batch_normalised(weight)
    assert value.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert_close(batch_normalised(10 * weight), value, rtol=1e-5, atol=0)
    assert_close(batch_normalised(weight, mean=torch.tensor(2.0)), weight / 2, rtol=1e-5, atol=0)
    reverse = batch_normalised(ReverseKL().score_weight(torch.tensor([-1.0, 0.0, 2.0])))
    assert_close(reverse, torch.ones(3), rtol=1e-5, atol=0)  # f-distill with the reverse KL is DMD2


def test_time_bins_refusals():
    with pytest.raises(RecipeError, match="TimeBins needs low < high, bins >= 1 and 0 <= rho < 1, got 1, 1, 10 and 0"):
        TimeBins(1, 1)
