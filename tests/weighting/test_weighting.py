import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import RecipeError, SignalError
from potstill.contracts.spec import Part
from potstill.weighting import (
    Agreement,
    DivergenceTop,
    EarlyPrefix,
    EntropyTop,
    Opener,
    Overconfident,
    PerResponse,
    Positions,
    Product,
    RelativeConfidence,
    SampledShare,
    SoftOR,
    Uniform,
    Weighting,
    top_share,
)

NAN = math.nan
MASK = torch.tensor([[True, True, True, True, False], [False, True, True, False, False]])
VALUES = {
    "student_entropy_BR": torch.tensor([[0.1, 0.9, 0.5, 0.3, 9.0], [9.0, 0.2, 0.4, 9.0, 9.0]]),
    "teacher_entropy_BR": torch.tensor([[0.1, 0.2, 0.5, 0.9, 9.0], [9.0, 0.3, 0.1, 9.0, 9.0]]),
    "log_ratio_BR": torch.tensor([[0.3, -0.1, 0.6, 0.0, 9.0], [9.0, -1.0, 3.0, 9.0, 9.0]]),
    "reverse_kl_BR": torch.tensor([[0.3, 0.1, 0.6, 0.0, 9.0], [9.0, 1.0, 3.0, 9.0, 9.0]]),
    "forward_kl_BR": torch.tensor([[0.7, 0.2, 0.3, 0.1, 9.0], [9.0, 2.0, 1.5, 9.0, 9.0]]),
    "jensen_shannon_BR": torch.tensor([[0.2, 0.1, 0.3, 0.0, 9.0], [9.0, 0.4, 0.6, 9.0, 9.0]]),
    "noise_BR": torch.tensor([[0.2, 0.1, 0.3, 0.9, 0.5], [0.5, 0.4, 0.6, 0.5, 0.5]]),
}
MEMBERS = [
    Uniform(),
    Uniform(normalize="mean"),
    EntropyTop(0.5),
    EntropyTop(0.5, "batch"),
    EntropyTop(0.3, normalize="mean"),
    DivergenceTop(0.5),
    DivergenceTop(0.5, divergence="forward_kl"),
    SoftOR(0.5),
    SoftOR(0.5, ranges="response"),
    SoftOR(0.5, lowest=True),
    Overconfident(0.5, "batch"),
    SampledShare(0.5),
    SampledShare(0.5, alpha=0.5, gamma=2.0),
    SampledShare(0.5, alpha=0.0),
    EarlyPrefix(1.0),
    EarlyPrefix(1.0, normalize="mean"),
    RelativeConfidence(0.5),
    Opener(0.4),
    Opener(1.0),
    PerResponse(EarlyPrefix(1.0)),
    PerResponse(SoftOR(0.5), least=2.0),
    Product(EntropyTop(0.5), EarlyPrefix(0.5)),
]


def positions(**changed: Tensor) -> Positions:
    return Positions(MASK, **{**VALUES, **changed})


@pytest.mark.parametrize("w", MEMBERS, ids=repr)
@pytest.mark.parametrize("padding", [NAN, math.inf, -math.inf, 1e9])
def test_padding_never_matters(w, padding):
    expected = w(positions())
    filled = {name: value.masked_fill(~MASK, padding) for name, value in VALUES.items()}
    assert_close(w(positions(**filled)), expected)
    assert expected[~MASK].abs().sum() == 0
    assert expected.isfinite().all()


@pytest.mark.parametrize("w", MEMBERS, ids=repr)
def test_side_and_amount_of_padding_never_matter(w):
    """The same rows with three more padded columns on the left."""
    wide = {name: torch.nn.functional.pad(value, (3, 0), value=7.0) for name, value in VALUES.items()}
    found = w(Positions(torch.nn.functional.pad(MASK, (3, 0)), **wide))
    assert_close(found[:, 3:], w(positions()))


@pytest.mark.parametrize("w", MEMBERS, ids=repr)
def test_weights_are_detached_and_float32(w):
    free = {name: value.double().requires_grad_() for name, value in VALUES.items()}
    weights = w(positions(**free))
    assert not weights.requires_grad
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("w", MEMBERS, ids=repr)
def test_only_what_is_needed_is_asked_for(w):
    needed = {name: VALUES[name] for name in w.needs}
    assert_close(w(Positions(MASK, **needed)), w(positions()))
    for name in w.needs:
        with pytest.raises(SignalError, match=f"{type(w).__name__} needs {name}, which this objective does not give"):
            w(positions(**{name: None}))
        with pytest.raises(RecipeError, match=rf"{name} has shape \[1, 5\], but the mask \[2, 5\]"):
            w(positions(**{name: VALUES[name][:1]}))


@pytest.mark.parametrize("w", MEMBERS, ids=repr)
def test_nothing_counted_is_zero_not_nan(w):
    nothing = Positions(torch.zeros_like(MASK), **VALUES)
    assert w(nothing).abs().sum() == 0


def test_mean_normalisation_makes_the_mean_weight_one():
    weights = EarlyPrefix(1.0, normalize="mean")(positions())
    assert weights[MASK].mean().item() == pytest.approx(1.0)
    raw = EarlyPrefix(1.0)(positions())
    assert raw[MASK].mean().item() > 1.3
    assert_close(weights, raw / raw[MASK].mean())


def test_early_prefix_by_hand():
    expected = torch.tensor([[2.0, 1.7, 1.6, 1.0, 0.0], [0.0, 2.0, 1.75, 0.0, 0.0]])
    assert_close(EarlyPrefix(1.0)(positions()), expected)
    assert_close(EarlyPrefix(0.0)(positions()), Uniform()(positions()))
    still = positions(log_ratio_BR=torch.zeros(2, 5))
    assert_close(EarlyPrefix(0.5)(still), 1.5 * MASK.float())


def test_entropy_top_by_hand():
    response = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.float32)
    batch = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.float32)
    assert_close(EntropyTop(0.5)(positions()), response)
    assert_close(EntropyTop(0.5, "batch")(positions()), batch)  # 0.9, 0.5, 0.4 of six
    assert_close(EntropyTop(0.34, "batch")(positions()), torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]))
    assert_close(
        EntropyTop(0.34)(positions()), torch.tensor([[0.0, 1, 0, 0, 0], [0, 0, 1, 0, 0]])
    )  # at least one a row
    assert_close(EntropyTop(1.0)(positions()), MASK.float())
    # TIP's mean over kept positions: sum of weights = number of counted positions
    assert EntropyTop(0.5, normalize="mean")(positions()).sum().item() == pytest.approx(6.0)


def test_ties_keep_the_earlier_and_shares_round_as_written():
    mask = torch.ones(1, 100, dtype=torch.bool)
    kept = top_share(torch.zeros(1, 100), mask, 0.29, "response")
    assert kept.sum().item() == 29
    assert kept[0, :29].all()


def test_counted_positions_of_score_minus_infinity_precede_padding():
    mask = torch.tensor([[False, True, True]])
    kept = top_share(torch.tensor([[5.0, -math.inf, -math.inf]]), mask, 1.0, "response")
    assert_close(kept, mask)
    assert not top_share(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool), 1.0, "response").any()


def test_how_far_a_weight_looks():
    within = [Uniform(), EntropyTop(0.5), EarlyPrefix(), Opener(), RelativeConfidence(), SoftOR(ranges="response")]
    within += [Agreement("sequence"), PerResponse(EntropyTop()), Product(Opener(), EarlyPrefix()), SampledShare()]
    assert {w.couples for w in within} == {"row"}
    over = [Uniform(normalize="mean"), EntropyTop(0.5, "batch"), SoftOR(), Overconfident(), Agreement()]
    over += [SoftOR(scope="batch", ranges="response"), PerResponse(SoftOR()), Product(Opener(), Agreement())]
    over += [Agreement("sequence", normalize="mean")]
    assert {w.couples for w in over} == {"batch"}


def test_relative_confidence_by_hand():
    weights = RelativeConfidence(0.5)(positions())
    assert weights[0, 0] == weights[0, 2] == 0.5
    assert weights[0, 1].item() == pytest.approx(1 / (1 + math.exp(-0.7 / 0.5)))
    assert weights[1, 1].item() == pytest.approx(1 / (1 + math.exp(0.1 / 0.5)))


def test_the_opener_is_the_fewest_first_positions_with_the_share_of_the_entropy():
    # Sums 0.1, 1.0, 1.5, 1.8: half of 1.8 is reached at the second; 0.2 of 0.6 is a third of the second row.
    assert_close(Opener(0.5)(positions()), torch.tensor([[1.0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]))
    assert_close(Opener(0.05)(positions()), torch.tensor([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]))
    assert_close(Opener(1.0)(positions()), MASK.float())
    none = Opener(0.5)(positions(student_entropy_BR=torch.zeros(2, 5)))
    assert_close(none, torch.tensor([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]))


@pytest.mark.parametrize("length", [1, 7, 10, 30, 99, 100])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_the_opener_of_equal_entropies_is_the_share_rounded_up(length, share):
    same = Positions(torch.ones(1, length, dtype=torch.bool), student_entropy_BR=torch.full((1, length), 0.37))
    assert Opener(share)(same).sum().item() == math.ceil(round(share * length, 9))


def opened(share: float, *entropies: float) -> int:
    """How many of a response's positions are its opener."""
    h = torch.tensor([entropies], dtype=torch.float64)
    return int(Opener(share)(Positions(torch.ones_like(h, dtype=torch.bool), student_entropy_BR=h)).sum())


def test_rounding_does_not_lengthen_the_opener_and_entropy_does():
    assert 0.07 * 100.0 > 7.0, "or nothing is tested"
    assert opened(0.07, *[1.0] * 100) == 7
    assert opened(0.1, 0.1 + 1e-6, 0.5, 0.4 - 1e-6) == 1
    assert opened(0.1, 0.1 - 1e-6, 0.5, 0.4 + 1e-6) == 2


def test_certain_words_at_the_end_open_nothing_unless_all_do():
    assert opened(0.999, 1.0, 1.0, 0.0, 0.0) == 2
    assert opened(1.0, 1.0, 1.0, 0.0, 0.0) == 4


CONTEXTS = torch.tensor(
    [
        [[-1.0, -2.0, -0.5, -1.0, NAN], [NAN, -1.0, -1.0, NAN, NAN]],
        [[-1.0, -1.0, -0.5, -1.5, NAN], [NAN, -3.0, -1.0, NAN, NAN]],
        [[-1.0, -3.0, -0.5, -1.7, NAN], [NAN, -2.0, -1.0, NAN, NAN]],
    ]
)


@pytest.mark.parametrize("statistic", ["variance", "range"])
def test_token_agreement_by_hand(statistic):
    weights = Agreement(gamma=0.5, statistic=statistic)(Positions(MASK, context_logp_KBR=CONTEXTS))
    d = {"variance": [0, 1.0, 0, 0.13, 1.0, 0], "range": [0, 2.0, 0, 0.7, 2.0, 0]}[statistic]
    expected = [1 / (1 + 0.5 * x / max(d)) for x in d]  # the 95 % quantile of six, two of them the largest
    assert_close(weights[MASK], torch.tensor(expected))
    assert weights[~MASK].sum() == 0


def test_disagreement_is_measured_in_its_95_percent_quantile():
    """Of 0, 1 ... 20 that is 19, not the largest and not the mean; padding has no say."""
    apart = torch.stack([torch.zeros(1, 23), torch.arange(23.0)[None]])
    mask = torch.arange(23)[None] < 21
    weights = Agreement(gamma=0.5, statistic="range")(Positions(mask, context_logp_KBR=apart))
    assert_close(weights[mask], 1 / (1 + 0.5 * torch.arange(21.0) / 19))


def test_token_agreement_is_capped_and_floored():
    wide = torch.zeros(2, 1, 100)
    wide[0, 0, 0], wide[0, 0, 1:] = 1e6, 1e-9
    whole = torch.ones(1, 100, dtype=torch.bool)
    weights = Agreement(gamma=0.5, statistic="range")(Positions(whole, context_logp_KBR=wide))
    assert weights[0, 0].item() == pytest.approx(1 / 6)  # n is capped at 10
    assert weights[0, 1].item() == pytest.approx(1 / (1 + 0.5e-3))  # the scale is at least 1e-6
    assert Agreement(gamma=1e9)(Positions(whole, context_logp_KBR=wide)).min().item() == pytest.approx(0.01)


def test_sequence_agreement_by_hand():
    known = Positions(MASK, context_logp_KBR=CONTEXTS)
    means = torch.tensor([[-4.5, -4.0, -6.2], [-2.0, -4.0, -3.0]]) / torch.tensor([[4.0], [2.0]])
    expected = (-0.5 * means.var(1, correction=0)).exp()
    assert_close(Agreement("sequence", 0.5)(known), expected[:, None] * MASK)
    spread = means.amax(1) - means.amin(1)
    assert_close(Agreement("sequence", 0.5, "range")(known), (-0.5 * spread).exp()[:, None] * MASK)
    assert Agreement("sequence", 1e9)(known)[MASK].min().item() == pytest.approx(1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_contexts_that_agree_leave_the_weights_at_one(level):
    same = CONTEXTS[:1].expand(3, -1, -1)
    assert_close(Agreement(level, 3.0)(Positions(MASK, context_logp_KBR=same)), MASK.float())
    assert_close(Agreement(level, 0.0)(Positions(MASK, context_logp_KBR=CONTEXTS)), MASK.float())
    with pytest.raises(RecipeError, match="at least 2 contexts to compare, got 1"):
        Agreement(level)(Positions(MASK, context_logp_KBR=CONTEXTS[:1]))


def test_per_response_makes_the_mean_over_a_response_a_weighted_mean():
    raw = EarlyPrefix(1.0)(positions())
    weights = PerResponse(EarlyPrefix(1.0))(positions())
    length = MASK.sum(1, keepdim=True)
    assert_close((weights / length).sum(1), torch.ones(2))
    assert_close(weights / weights.sum(1, keepdim=True), raw / raw.sum(1, keepdim=True))
    guarded = PerResponse(EarlyPrefix(1.0), least=5.0)(positions())  # the weights add up to 6.3 and 3.75
    assert_close(guarded[0], weights[0])
    assert_close(guarded[1], raw[1] * 2 / 5.0)


def test_weights_of_a_whole_response_cancel_in_its_own_weighted_mean():
    known = Positions(MASK, context_logp_KBR=CONTEXTS)
    assert_close(PerResponse(Agreement("sequence", 2.0))(known), MASK.float())


def test_products_multiply_and_ask_for_what_both_need():
    both = Product(EntropyTop(0.5), EarlyPrefix(0.5))
    assert both.needs == ("student_entropy_BR", "log_ratio_BR")
    assert_close(both(positions()), EntropyTop(0.5)(positions()) * EarlyPrefix(0.5)(positions()))


def test_weightings_are_parts_of_a_recipe():
    read = TypeAdapter(Part(Weighting)).validate_python
    assert read("Uniform") == Uniform()
    assert read({"name": "EntropyTop", "share": 0.2, "normalize": "mean"}) == EntropyTop(0.2, normalize="mean")
    nested = {"name": "PerResponse", "of": {"name": "SoftOR", "share": 0.2}, "least": 1.0}
    assert read(nested) == PerResponse(SoftOR(0.2), least=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyTop(0.0), r"EntropyTop.share must lie in \(0, 1\], got 0.0"),
        (lambda: EntropyTop(0.5, "row"), "EntropyTop.scope must be one of batch, response, got 'row'"),
        (lambda: EarlyPrefix(-1.0), "EarlyPrefix.gamma must not be negative"),
        (lambda: RelativeConfidence(0.0), "RelativeConfidence.tau must be positive, got 0.0"),
        (lambda: Opener(0.0), r"Opener.share must lie in \(0, 1\], got 0.0"),
        (lambda: Agreement("tokens"), "Agreement.level must be one of token, sequence, got 'tokens'"),
        (lambda: Agreement(statistic="std"), "Agreement.statistic must be one of variance, range, got 'std'"),
        (lambda: Agreement(gamma=-1.0), "Agreement.gamma must not be negative"),
        (lambda: PerResponse(least=-1.0), "PerResponse.least must not be negative"),
        (lambda: Uniform(normalize="sum"), "Uniform.normalize must be one of none, mean, got 'sum'"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
