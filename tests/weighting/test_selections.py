"""TIP's selections: what each rule keeps, by hand and by enumeration."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.contracts.errors import RecipeError
from potstill.weighting import (
    DivergenceTop,
    EntropyTop,
    Overconfident,
    PerResponse,
    Positions,
    Quadrants,
    SampledShare,
    SoftOR,
    unit_range,
)

# One response of six: unsure and far, unsure and near, sure and far, sure and near, and two between.
ONE = torch.ones(1, 6, dtype=torch.bool)
H = torch.tensor([[2.0, 1.5, 0.0, 0.0, 0.5, 1.0]])
REVERSE = torch.tensor([[3.0, 0.0, 4.0, 0.1, 1.0, 0.0]])
FORWARD = torch.tensor([[2.0, 0.1, 3.0, 0.1, 5.0, 0.0]])
SIX = Positions(ONE, student_entropy_BR=H, reverse_kl_BR=REVERSE, forward_kl_BR=FORWARD)


def kept(weighting, values: Positions = SIX) -> list[int]:
    return weighting(values)[0].nonzero()[:, 0].tolist()


def test_the_soft_or_of_normalised_entropy_and_divergence():
    s = SoftOR(clip=1.0).score(SIX)
    h, delta = H / 2, REVERSE / 4
    assert_close(s, 1 - (1 - h) * (1 - delta))
    assert ((s >= 0) & (s <= 1)).all()
    assert (s >= torch.maximum(h, delta)).all()
    assert kept(SoftOR(0.5, clip=1.0)) == [0, 1, 2]  # 1, 0.75, 1; 0.025, 0.4375, 0.5
    assert kept(SoftOR(0.5, clip=1.0, lowest=True)) == [3, 4, 5]
    nothing = Positions(ONE, student_entropy_BR=torch.zeros(1, 6), reverse_kl_BR=torch.zeros(1, 6))
    assert_close(SoftOR().score(nothing), torch.zeros(1, 6))


def test_the_entropy_is_clipped_at_its_quantile_and_the_divergence_is_not():
    h = torch.arange(101.0)[None]
    whole = torch.ones(1, 101, dtype=torch.bool)
    assert_close(unit_range(h, whole, "batch", 0.98), (h / 98).clamp_max(1.0))
    assert_close(unit_range(h, whole, "batch"), h / 100)
    seen = Positions(whole, student_entropy_BR=torch.zeros_like(h), reverse_kl_BR=h)
    assert_close(SoftOR().score(seen), h / 100)
    seen = Positions(whole, student_entropy_BR=h, reverse_kl_BR=torch.zeros_like(h))
    assert_close(SoftOR().score(seen), (h / 98).clamp_max(1.0))


def test_ranges_are_over_the_batch_or_each_response():
    values, mask = torch.tensor([[1.0, 2.0, 9.0], [3.0, 5.0, 9.0]]), torch.tensor([[True, True, False]] * 2)
    assert_close(unit_range(values, mask, "batch"), torch.tensor([[0.0, 0.25, 0.0], [0.5, 1.0, 0.0]]))
    assert_close(unit_range(values, mask, "response"), torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))
    assert_close(unit_range(torch.full((2, 3), 4.0), mask, "batch"), torch.zeros(2, 3))
    assert unit_range(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), "batch").shape == (2, 0)
    both = Positions(mask, student_entropy_BR=values, reverse_kl_BR=torch.zeros(2, 3), forward_kl_BR=torch.ones(2, 3))
    for make in (SoftOR, Overconfident):
        assert make(0.5, clip=1.0, ranges="response").entropy_range(both)[0, 1] == 1.0
        assert make(0.5, clip=1.0).entropy_range(both)[0, 1] == 0.25
    far = Positions(mask, student_entropy_BR=torch.zeros(2, 3), reverse_kl_BR=values)
    assert SoftOR(ranges="response").score(far)[0, 1] == 1.0
    assert SoftOR().score(far)[0, 1] == 0.25
    clipped = unit_range(torch.tensor([[0.0, 1, 2, 3, 8], [0, 10, 20, 30, 80]]), torch.ones(2, 5) > 0, "response", 0.75)
    assert_close(clipped, torch.tensor([[0, 1 / 3, 2 / 3, 1, 1]] * 2))


def test_no_rule_of_the_entropy_tells_confident_errors_from_mastery_and_the_soft_or_does():
    pair = Positions(
        ONE[:, :2], student_entropy_BR=torch.tensor([[0.3, 0.3]]), reverse_kl_BR=torch.tensor([[0.0, 2.0]]),
        forward_kl_BR=torch.tensor([[0.0, 2.0]]), noise_BR=torch.tensor([[0.5, 0.5]]),
    )  # fmt: skip
    for blind in (EntropyTop(), SampledShare()):
        score = blind.score(pair)
        assert score[0, 0] == score[0, 1]
    for seeing in (SoftOR(0.5), Overconfident(0.5), DivergenceTop(0.5)):
        assert kept(seeing, pair) == [1]


def test_confident_errors_are_ranked_by_the_forward_divergence():
    assert_close(Overconfident(clip=1.0).score(SIX), FORWARD * (1 - H / 2))
    assert kept(Overconfident(0.34, clip=1.0)) == [2, 4]  # 3 and 3.75; the reverse one would keep 2 and then 0
    assert kept(DivergenceTop(0.34)) == [0, 2]
    assert kept(DivergenceTop(0.34, divergence="forward_kl")) == [2, 4]


def test_the_kept_mean_is_equation_9_over_the_batch_and_for_each_response():
    """sum of weights x values over all positions, or a mean of means, is the mean over what is kept."""
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    h = keyed.uniform(1, torch.arange(14)).float().view(2, 7)
    values = keyed.uniform(2, torch.arange(14)).float().view(2, 7)
    seen = Positions(mask, student_entropy_BR=h)
    chosen = EntropyTop(0.5)(seen) > 0  # 2 of 5, 3 of 7: shares differ, and so do the two means
    over_batch = EntropyTop(0.5, normalize="mean")(seen)
    assert_close((over_batch * values).sum() / mask.sum(), values[chosen].mean())
    by_response = PerResponse(EntropyTop(0.5))(seen)
    means = torch.stack([values[b][chosen[b]].mean() for b in range(2)])
    assert_close(((by_response * values).sum(1) / mask.sum(1)), means)
    assert not torch.allclose(means.mean(), values[chosen].mean())


def odds(probabilities: list[float], count: int) -> dict[frozenset[int], float]:
    """The law of drawing `count` of them one after another without replacement, each time in proportion."""
    found: dict[frozenset[int], float] = {}
    for order in itertools.permutations(range(len(probabilities)), count):
        left, chance = sum(probabilities), 1.0
        for i in order:
            chance *= probabilities[i] / left
            left -= probabilities[i]
        found[frozenset(order)] = found.get(frozenset(order), 0.0) + chance
    return found


@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 0.0), (0.0, 0.0), (0.5, 2.0)])
def test_a_sampled_share_is_drawn_without_replacement_with_its_probabilities(alpha, gamma):
    """20,000 responses of four, two kept: each of the six pairs as often as enumeration says, within 4.5 deviations."""
    draws, h, jsd = 20_000, torch.tensor([0.2, 0.4, 0.8, 1.6]), torch.tensor([0.6, 0.1, 0.3, 0.2])
    noise = keyed.uniform(7, torch.arange(draws)[:, None], torch.arange(4)[None])
    seen = Positions(
        torch.ones(draws, 4, dtype=torch.bool), student_entropy_BR=h.expand(draws, 4),
        jensen_shannon_BR=jsd.expand(draws, 4), noise_BR=noise,
    )  # fmt: skip
    found = SampledShare(0.5, alpha=alpha, gamma=gamma)(seen)
    assert (found.sum(1) == 2).all()
    for pair, chance in odds((h**alpha * jsd**gamma).tolist(), 2).items():
        share = found[:, list(pair)].prod(1).mean().item()
        assert share == pytest.approx(chance, abs=4.5 * math.sqrt(chance * (1 - chance) / draws))


def test_sampled_shares_ask_for_what_they_use():
    assert SampledShare(alpha=0.0).needs == ("noise_BR",)
    assert SampledShare().needs == ("noise_BR", "student_entropy_BR")
    assert SampledShare(alpha=0.0, gamma=1.0).needs == ("noise_BR", "jensen_shannon_BR")
    noise = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    zero = Positions(ONE, student_entropy_BR=torch.zeros(1, 6), jensen_shannon_BR=torch.zeros(1, 6), noise_BR=noise)
    for drawn in (
        SampledShare(0.5),
        SampledShare(0.5, alpha=0.0, gamma=1.0),
    ):  # factors are at least 1e-8: chance decides
        assert kept(drawn, zero) == [3, 4, 5]


def test_quadrants_part_the_counted_positions():
    parts = Quadrants.of(SIX)  # means 5/6 and 1.35
    assert {name: part[0].nonzero()[:, 0].tolist() for name, part in parts.items()} == {
        "q1": [0], "q2": [1, 5], "q3": [2], "q4": [3, 4],
    }  # fmt: skip
    mask = torch.tensor([[True, True, True, True, False, False]])
    masked = Quadrants.of(Positions(mask, student_entropy_BR=H, reverse_kl_BR=REVERSE.masked_fill(~mask, 1e9)))
    assert {name: part[0].nonzero()[:, 0].tolist() for name, part in masked.items()} == {
        "q1": [0], "q2": [1], "q3": [2], "q4": [3],
    }  # fmt: skip


def test_a_share_of_all_keeps_all():
    everything = [EntropyTop(1.0), DivergenceTop(1.0), SoftOR(1.0), SoftOR(1.0, lowest=True), Overconfident(1.0)]
    for weighting in everything:
        assert_close(weighting(SIX), torch.ones(1, 6))


def far(h: Tensor) -> Positions:
    return Positions(ONE, student_entropy_BR=h, reverse_kl_BR=torch.zeros(1, 6))


def test_ties_go_to_the_earlier():
    assert kept(SoftOR(0.34), far(torch.full((1, 6), 0.5))) == [0, 1]
    assert kept(SoftOR(0.34, lowest=True), far(torch.full((1, 6), 0.5))) == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftOR(1.5), r"SoftOR.share must lie in \(0, 1\], got 1.5"),
        (lambda: SoftOR(ranges="row"), "SoftOR.ranges must be one of batch, response, got 'row'"),
        (lambda: SoftOR(clip=0.0), r"SoftOR.clip must lie in \(0, 1\], got 0.0; 1 clips nothing"),
        (lambda: DivergenceTop(divergence="kl"), "DivergenceTop.divergence must be one of reverse_kl, forward_kl"),
        (lambda: SampledShare(alpha=-1.0), "SampledShare takes powers of at least 0, got alpha -1.0"),
        (lambda: SampledShare(gamma=-1.0), "SampledShare takes powers of at least 0, got alpha 1.0, gamma -1.0"),
        (lambda: Overconfident(0.1, "row"), "Overconfident.scope must be one of batch, response, got 'row'"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
