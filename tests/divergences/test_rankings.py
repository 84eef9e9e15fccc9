"""Rankings by enumeration of all orders, by special cases, and by their gradients."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from potstill.contracts.errors import ModelError
from potstill.divergences import ForwardKL, log_probs
from potstill.divergences.rankings import (
    bradley_terry,
    list_mle,
    listwise_kl,
    plackett_luce,
    pld,
    ranknet,
    teacher_order,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_probabilities_of_all_orders_sum_to_one():
    scores = draw(5)
    orders = torch.tensor(list(itertools.permutations(range(5))))
    values = list_mle(scores.expand(len(orders), 5), orders)
    assert_close(torch.exp(-values).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_by_hand():
    """Scores log 1, log 2, log 3 in the order 2, 0, 1: 3/6 times 1/3 times 1."""
    value = list_mle(torch.tensor([1.0, 2.0, 3.0]).log(), torch.tensor([2, 0, 1]))
    assert value.item() == pytest.approx(math.log(6), rel=1e-6)


def test_the_first_place_alone_is_the_cross_entropy():
    student, teacher, labels = draw(4, 6), draw(4, 6, seed=1), torch.tensor([0, 5, 2, 2])
    order = teacher_order(teacher, labels)
    first = torch.zeros(4, 6).double()
    first[:, 0] = 1
    assert_close(plackett_luce(student, order, first), cross_entropy(student, labels, reduction="none"))


def test_pld_by_its_definition_and_its_gradient():
    """sum_k w_k (sigma_k - e_k), sigma_k the softmax among the classes not yet chosen."""
    student, teacher = draw(3, 5).requires_grad_(), draw(3, 5, seed=1)
    labels = torch.tensor([4, 0, 1])
    gradient = torch.zeros(3, 5, dtype=torch.float64)
    total = 0.0
    for b in range(3):
        rest = sorted((c for c in range(5) if c != labels[b]), key=lambda c: -teacher[b, c].item())
        order = [int(labels[b]), *rest]
        weight = (teacher[b] / 2).softmax(-1)
        for k, c in enumerate(order):
            left = order[k:]
            total = total + weight[c] * (student[b, left].logsumexp(-1) - student[b, c])
            gradient[b, left] += weight[c] * student[b, left].softmax(-1).detach()
            gradient[b, c] -= weight[c]
    value = pld(student, teacher, labels, teacher_temperature=2.0)
    assert value.shape == (3,)
    assert_close(value.sum(), total)
    assert_close(torch.autograd.grad(value.sum(), student)[0], gradient)


def test_pld_forgets_an_offset_but_not_a_scale_and_gives_the_teacher_no_gradient():
    student, teacher, labels = draw(3, 5), draw(3, 5, seed=1).requires_grad_(), torch.tensor([4, 0, 1])
    value = pld(student, teacher, labels)
    assert_close(pld(student + 7, teacher, labels), value)
    assert not torch.allclose(pld(2 * student, teacher, labels), value)
    assert not value.requires_grad


def test_convex_in_the_scores():
    a, b, order = draw(50, 6), draw(50, 6, seed=1), teacher_order(draw(50, 6, seed=2))
    middle = list_mle((a + b) / 2, order)
    assert (middle <= (list_mle(a, order) + list_mle(b, order)) / 2 + 1e-12).all()


def test_the_order_of_a_teacher():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9]])
    assert teacher_order(scores).tolist() == [[1, 3, 2, 0]]
    assert teacher_order(scores, torch.tensor([2])).tolist() == [[2, 1, 3, 0]]
    assert teacher_order(scores, mask=torch.tensor([[True, False, True, True]])).tolist() == [[3, 2, 0, 1]]


@pytest.mark.parametrize("function", ["list_mle", "ranknet", "listwise_kl"])
def test_absent_entries_reach_nothing(function):
    student, teacher = draw(2, 4), draw(2, 4, seed=1)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])

    def value(scores, theirs, mask):
        if function == "list_mle":
            return list_mle(scores, teacher_order(theirs, mask=mask), mask)
        return {"ranknet": ranknet, "listwise_kl": listwise_kl}[function](scores, theirs, mask=mask)

    with_junk = student.masked_fill(~mask, math.nan).requires_grad_()
    got = value(with_junk, teacher.masked_fill(~mask, math.nan), mask)
    short = value(student[1:, :2], teacher[1:, :2], torch.ones(1, 2, dtype=torch.bool))
    assert_close(got[1:], short)
    assert_close(got[:1], value(student[:1], teacher[:1], mask[:1]))
    gradient = torch.autograd.grad(got.sum(), with_junk)[0]
    assert gradient.isfinite().all() and (gradient[~mask] == 0).all()


def test_ranknet_by_hand_and_its_gradient():
    """Two documents, binary labels: the target of positive before negative is sigma(1), not 1."""
    scores = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    target = 1 / (1 + math.exp(-1))
    value = ranknet(scores, torch.tensor([1.0, 0.0]))
    sigma = 1 / (1 + math.exp(-0.5))
    assert value.item() == pytest.approx(-target * math.log(sigma) - (1 - target) * math.log(1 - sigma))
    assert_close(torch.autograd.grad(value, scores)[0], torch.tensor([sigma - target, target - sigma]).double())


def test_ranknet_is_least_where_differences_agree():
    teacher = draw(1, 5)
    at = ranknet(teacher + 3, teacher)
    assert (ranknet(teacher + 0.1 * draw(200, 5, seed=1), teacher.expand(200, 5)) > at).all()
    student = (teacher + 3).requires_grad_()
    assert torch.autograd.grad(ranknet(student, teacher).sum(), student)[0].abs().max() < 1e-12
    assert ranknet(draw(2, 1), draw(2, 1)).tolist() == [0.0, 0.0]


def test_listwise_kl_is_the_forward_kl_from_teacher_to_student():
    student, teacher = draw(3, 4), draw(3, 4, seed=1)
    expected = ForwardKL()(teacher_logp=log_probs(teacher, 2.0), student_logp=log_probs(student, 2.0))
    assert_close(listwise_kl(student, teacher, 2.0), expected)


def test_bradley_terry_is_ranknet_with_a_certain_teacher_and_plackett_luce_of_two():
    chosen, rejected = draw(6), draw(6, seed=1)
    value = bradley_terry(chosen, rejected)
    assert_close(value, list_mle(torch.stack([chosen, rejected], -1), torch.tensor([[0, 1]]).expand(6, 2)))
    assert_close(bradley_terry(chosen, rejected, margin=0.5), bradley_terry(chosen - 0.5, rejected))
    certain = torch.tensor([200.0, 0.0]).expand(6, 2)
    assert_close(value, ranknet(torch.stack([chosen, rejected], -1), certain))


def test_extreme_scores_and_low_precision_stay_finite():
    scores = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    for value in (list_mle(scores, torch.tensor([[1, 0, 2]])), ranknet(scores, torch.zeros(1, 3))):
        assert value.isfinite().all() and torch.autograd.grad(value.sum(), scores)[0].isfinite().all()
    assert pld(draw(2, 3).bfloat16(), draw(2, 3).bfloat16(), torch.tensor([0, 1])).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranknet(draw(2, 3), draw(2, 4)), r"ranknet compares lists of one shape"),
        (lambda: list_mle(draw(2, 3), torch.zeros(2, 3).long(), torch.ones(2, 2).bool()), r"and a mask \[2, 2\]"),
        (lambda: bradley_terry(draw(2), draw(3)), r"compares pairs, got \[2\] chosen and \[3\]"),
        (lambda: teacher_order(draw(2, 3), torch.zeros(3).long()), r"labels have shape \[3\]"),
    ],
)
def test_wrong_shapes_are_said(call, message):
    with pytest.raises(ModelError, match=message):
        call()
