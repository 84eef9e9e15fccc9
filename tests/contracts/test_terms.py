import torch
from torch.testing import assert_close

from potstill.contracts.terms import Loss, Term, divided


def test_micro_batches_change_nothing():
    values, mask = torch.randn(4, 7, dtype=torch.float64), torch.rand(4, 7) > 0.4

    def loss(rows: slice) -> dict[str, Term]:
        return {"kd": Term.over(values[rows], mask[rows]), "ce": Term.over(values[rows] ** 2, None, 0.5)}

    assert_close(divided([loss(slice(0, 1)), loss(slice(1, 4))]), divided([loss(slice(None))]))
    assert_close(divided([loss(slice(None))]), values[mask].mean() + 0.5 * (values**2).mean())


def test_padding_may_hold_anything():
    values = torch.tensor([1.0, float("nan"), float("-inf")], requires_grad=True)
    term = Term.over(values, torch.tensor([True, False, False]))
    (gradient,) = torch.autograd.grad(term.mean(), values)
    assert term.mean() == 1.0 and gradient.tolist() == [1.0, 0.0, 0.0]


def test_weights_are_detached_and_do_not_normalise():
    values, weights = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([2.0, 4.0], requires_grad=True)
    term = Term.weighted(values, weights)
    assert term.mean() == (2 + 12) / 2
    assert torch.autograd.grad(term.mean(), weights, allow_unused=True) == (None,)


def test_value_is_the_sum_of_coefficients_times_means():
    loss = Loss({"a": Term.over(torch.tensor([1.0, 3.0]), None, 2.0), "b": Term.over(torch.tensor([10.0]))})
    assert loss.value() == 2 * 2 + 10


def test_an_empty_term_is_zero_not_nan():
    assert Term.over(torch.tensor([5.0]), torch.tensor([False])).mean() == 0
