import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import RecipeError, SignalError
from potstill.contracts.spec import Part
from potstill.weighting import EarlyPrefix, EntropyTop, Positions, Uniform, Weighting, top_share

NAN = math.nan
MASK = torch.tensor([[True, True, True, True, False], [False, True, True, False, False]])
VALUES = {
    "student_entropy_BR": torch.tensor([[0.1, 0.9, 0.5, 0.3, 9.0], [9.0, 0.2, 0.4, 9.0, 9.0]]),
    "teacher_entropy_BR": torch.tensor([[0.1, 0.9, 0.5, 0.3, 9.0], [9.0, 0.2, 0.4, 9.0, 9.0]]),
    "log_ratio_BR": torch.tensor([[0.3, -0.1, 0.6, 0.0, 9.0], [9.0, -1.0, 3.0, 9.0, 9.0]]),
    "reverse_kl_BR": torch.tensor([[0.3, 0.1, 0.6, 0.0, 9.0], [9.0, 1.0, 3.0, 9.0, 9.0]]),
}
MEMBERS = [
    Uniform(),
    Uniform(normalize="mean"),
    EntropyTop(0.5),
    EntropyTop(0.5, "batch"),
    EntropyTop(0.3, normalize="mean"),
    EarlyPrefix(1.0),
    EarlyPrefix(1.0, normalize="mean"),
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
            w(Positions(MASK))
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
    assert Uniform().couples == EntropyTop(0.5).couples == EarlyPrefix().couples == "row"
    assert Uniform(normalize="mean").couples == EntropyTop(0.5, "batch").couples == "batch"


def test_weightings_are_parts_of_a_recipe():
    read = TypeAdapter(Part(Weighting)).validate_python
    assert read("Uniform") == Uniform()
    assert read({"name": "EntropyTop", "share": 0.2, "normalize": "mean"}) == EntropyTop(0.2, normalize="mean")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyTop(0.0), r"EntropyTop.share must lie in \(0, 1\], got 0.0"),
        (lambda: EntropyTop(0.5, "row"), "EntropyTop.scope must be one of batch, response, got 'row'"),
        (lambda: EarlyPrefix(-1.0), "EarlyPrefix.gamma must not be negative"),
        (lambda: Uniform(normalize="sum"), "Uniform.normalize must be one of none, mean, got 'sum'"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
