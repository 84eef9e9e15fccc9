"""Rankings by enumeration of all orders, by special cases, and by their gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.stats import kendalltau
from torch.nn.functional import binary_cross_entropy, cross_entropy
from torch.testing import assert_close

from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.spec import Part, written
from potstill.divergences import ForwardKL, entropy, log_probs
from potstill.divergences.rankings import (
    DPO,
    IPO,
    Decreasing,
    FirstPlaces,
    Hinge,
    KTOPair,
    PlaceWeights,
    Preference,
    TeacherSoftmax,
    bradley_terry,
    kendall_tau,
    lambda_rank,
    list_mle,
    listwise_kl,
    plackett_luce,
    pld,
    ranknet,
    teacher_order,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5])
def test_the_probabilities_of_all_orders_sum_to_one(N):
    """And those of the orders that begin with an entry sum to its softmax."""
    scores = 2 * draw(N)
    orders = torch.tensor(list(itertools.permutations(range(N))))
    probabilities = torch.exp(-list_mle(scores.expand(len(orders), N), orders))
    assert_close(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
    first = torch.stack([probabilities[orders[:, 0] == entry].sum() for entry in range(N)])
    assert_close(first, scores.softmax(-1))


def test_the_likeliest_order_is_the_scores_own():
    scores = draw(5)
    cost = lambda order: list_mle(scores, torch.tensor(order)).item()
    assert list(min(itertools.permutations(range(5)), key=cost)) == teacher_order(scores).tolist()


def test_a_normaliser_over_what_was_drawn_before_is_the_reversed_order():
    """TSD-KD's released code (arXiv 2603.13260): it pushes away from the teacher's ranking."""
    scores, order = draw(3, 5), teacher_order(draw(3, 5, seed=1))
    ordered = scores.gather(-1, order)
    prefix = (ordered.logcumsumexp(-1) - ordered).sum(-1)
    assert_close(list_mle(scores, order.flip(-1)), prefix)
    assert (list_mle(scores, order) - prefix).abs().min() > 0.1


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


WEIGHTS = [TeacherSoftmax(2.0), FirstPlaces(), FirstPlaces(3), Decreasing()]


@pytest.mark.parametrize("part", WEIGHTS, ids=repr)
def test_other_weights_of_the_places_in_loops(part):
    student, teacher, label = draw(5), draw(5, seed=1), 3
    order = [label, *sorted({0, 1, 2, 4}, key=lambda c: -teacher[c].item())]
    weights = {
        TeacherSoftmax(2.0): (teacher / 2).softmax(-1)[order].tolist(),
        FirstPlaces(): [1.0] * 5,
        FirstPlaces(3): [1.0, 1, 1, 0, 0],
        Decreasing(): [w / 26 for w in (15, 7, 3, 1, 0)],
    }[part]
    expected = sum(w * (student[order[k:]].logsumexp(-1) - student[order[k]]) for k, w in enumerate(weights))
    assert_close(pld(student, teacher, torch.tensor(label), weights=part), expected)
    mask = torch.tensor([True, True, True, True, False])
    alone = pld(student[:4], teacher[:4], torch.tensor(label), weights=part)
    assert_close(pld(student, teacher, torch.tensor(label), weights=part, mask=mask), alone)


def test_two_classes_weigh_cross_entropy_by_the_teacher():
    student, teacher, labels = draw(6, 2), draw(6, 2, seed=1), torch.arange(6) % 2
    share = teacher.softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert_close(pld(student, teacher, labels), share * cross_entropy(student, labels, reduction="none"))


def test_a_hot_teacher_is_listmle_over_the_number_of_classes():
    student, teacher = draw(3, 5), draw(3, 5, seed=1)
    value = pld(student, teacher, None, teacher_temperature=1e9)
    assert_close(value, list_mle(student, teacher_order(teacher)) / 5)


@pytest.mark.parametrize("n", [1, 2, 10, 2000])
def test_decreasing_weights_have_sum_one_at_any_length(n):
    ordered = torch.zeros(n + 2).masked_fill(torch.arange(n + 2) >= n, -math.inf)
    weights = Decreasing()(ordered)
    assert weights.isfinite().all() and (weights[n - 1 :] == 0).all()
    assert_close(weights.sum(), torch.tensor(float(n > 1)))


def test_an_ignored_label_costs_nothing():
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
    value = pld(student, teacher, torch.tensor([1, -100, 2]))
    assert value[1] == 0 and (torch.autograd.grad(value.sum(), student)[0][1] == 0).all()
    assert_close(value[2], pld(student[2], teacher[2], torch.tensor(2)))


def test_ties_are_drawn_from_all_their_equals():
    teacher, student = torch.tensor([1.0, 2, 1, 2, 0]), draw(5)
    expected = 2 * student.logsumexp(0) + 2 * student[[0, 2, 4]].logsumexp(0) - student[:4].sum()
    for shuffle in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        order = teacher_order(teacher[shuffle])
        assert_close(plackett_luce(student[shuffle], order, tied_by=teacher[shuffle]), expected)
    order = teacher_order(student)
    assert_close(plackett_luce(student, order, tied_by=student), list_mle(student, order))


def test_a_label_and_the_absent_are_no_part_of_a_tie():
    student, label, mask = draw(4), torch.tensor(2), torch.tensor([True, True, True, False])
    order = teacher_order(torch.zeros(4), label, mask)
    tied_by = torch.tensor([0.0, 0.0, math.inf, 0.0])
    expected = student[:3].logsumexp(0) + 2 * student[:2].logsumexp(0) - student[:3].sum()
    assert_close(plackett_luce(student, order, mask=mask, tied_by=tied_by), expected)


def test_an_entry_never_drawn_costs_infinity_unless_last_or_without_weight():
    scores = torch.tensor([1.0, -math.inf, 0.0], requires_grad=True)
    assert list_mle(scores, torch.tensor([0, 1, 2])) == math.inf
    for weights, order in ((None, [0, 2, 1]), (torch.tensor([1.0, 0, 0]), [0, 1, 2])):
        value = plackett_luce(scores, torch.tensor(order), weights)
        assert_close(value, torch.tensor(math.log1p(math.exp(-1))))
        gradient = torch.autograd.grad(value, scores)[0]
        assert_close(gradient, torch.tensor([-1 / (1 + math.e), 0.0, 1 / (1 + math.e)]))


def test_a_certain_teacher_is_cross_entropy_with_its_choice():
    student = draw(3).requires_grad_()
    teacher = torch.tensor([-math.inf, 0.0, -math.inf])
    for value in (pld(student, teacher, None), listwise_kl(student, teacher)):
        assert_close(value, cross_entropy(student, torch.tensor(1)))
        assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_the_hessian_has_no_negative_eigenvalue():
    student, teacher = draw(5), draw(5, seed=1)
    value = lambda s: pld(s, teacher, torch.tensor(2))
    hessian = torch.autograd.functional.hessian(value, student)
    assert torch.linalg.eigvalsh(hessian).min() > -1e-12 and hessian.abs().max() > 1e-3


def test_convex_in_the_scores():
    a, b, order = draw(50, 6), draw(50, 6, seed=1), teacher_order(draw(50, 6, seed=2))
    middle = list_mle((a + b) / 2, order)
    assert (middle <= (list_mle(a, order) + list_mle(b, order)) / 2 + 1e-12).all()


def test_the_order_of_a_teacher():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9]])
    assert teacher_order(scores).tolist() == [[1, 3, 2, 0]]
    assert teacher_order(scores, torch.tensor([2])).tolist() == [[2, 1, 3, 0]]
    assert teacher_order(scores, mask=torch.tensor([[True, False, True, True]])).tolist() == [[3, 2, 0, 1]]


LISTS = {
    "list_mle": lambda s, t, mask: list_mle(s, teacher_order(t, mask=mask), mask),
    "pld": lambda s, t, mask: pld(s, t, None, mask=mask),
    "ranknet": lambda s, t, mask: ranknet(s, t, mask=mask),
    "listwise_kl": lambda s, t, mask: listwise_kl(s, t, mask=mask),
    "lambda_rank": lambda s, t, mask: lambda_rank(s, t.abs(), mask=mask),
}
lists = pytest.mark.parametrize("loss", LISTS.values(), ids=LISTS)


@lists
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 3e38])
def test_absent_entries_reach_nothing(loss, junk):
    """Each list costs what it costs alone, wherever its entries stand; an empty one costs 0."""
    student, teacher = draw(5, 6), draw(5, 6, seed=1)
    mask = torch.arange(6) < torch.tensor([6, 4, 2, 1, 0])[:, None]
    mask = mask.gather(-1, draw(5, 6, seed=2).argsort(-1))
    with_junk = student.masked_fill(~mask, junk).requires_grad_()
    got = loss(with_junk, teacher.masked_fill(~mask, junk), mask)
    gradient = torch.autograd.grad(got.sum(), with_junk)[0]
    assert got[4] == 0 and (gradient[~mask] == 0).all()
    for row in range(4):
        alone = student[row][mask[row]].requires_grad_()
        expected = loss(alone, teacher[row][mask[row]], None)
        assert_close(got[row], expected)
        assert_close(gradient[row][mask[row]], torch.autograd.grad(expected, alone)[0])


@lists
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), N=st.integers(1, 7), scale=st.sampled_from([0.1, 3.0, 60.0]))
def test_laws(loss, seed, N, scale):
    teacher, student = scale * draw(2, 3, N, seed=seed), (scale * draw(2, 3, N, seed=seed + 1)).requires_grad_()
    value = loss(student, teacher, None)
    assert value.shape == (2, 3) and (value >= -1e-12).all()
    order = draw(N, seed=seed).argsort(-1)
    assert_close(loss(student[..., order], teacher[..., order], None), value)
    assert_close(loss(student + 5.0, teacher, None), value)
    gradient = torch.autograd.grad(value.sum(), student)[0]
    assert gradient.sum(-1).abs().max() < 1e-9


@lists
def test_derivatives_types_and_the_teacher(loss):
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False, True, True, False]])
    value = lambda s: loss(s, teacher.detach(), mask)
    assert torch.autograd.gradcheck(value, student) and torch.autograd.gradgradcheck(value, student)
    loss(student, teacher, mask).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    low, theirs = student.detach().bfloat16(), teacher.detach().bfloat16()
    assert loss(low, theirs, mask).dtype == torch.float32
    assert_close(loss(low, theirs, mask), loss(low.float(), theirs.float(), mask))


@lists
def test_far_apart_scores_neither_overflow_nor_cancel(loss):
    teacher = torch.tensor([0.0, 1e2, 1e-2, 30.0])
    student = torch.tensor([1e4, -1e4, 0.0, 60.0], requires_grad=True)
    value = loss(student, teacher, None)
    assert_close(value.double(), loss(student.double(), teacher.double(), None), rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_ranknet_by_hand_and_its_gradient():
    """Two documents, binary labels: the target of positive before negative is sigma(1), not 1."""
    scores = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    target = 1 / (1 + math.exp(-1))
    value = ranknet(scores, torch.tensor([1.0, 0.0]))
    sigma = 1 / (1 + math.exp(-0.5))
    assert value.item() == pytest.approx(-target * math.log(sigma) - (1 - target) * math.log(1 - sigma))
    assert_close(torch.autograd.grad(value, scores)[0], torch.tensor([sigma - target, target - sigma]).double())


def test_ranknet_in_loops_and_its_least_value():
    student, teacher = draw(4), torch.tensor([1.0, 0, 0, 2], dtype=torch.float64)
    pairs, sigma = list(itertools.combinations(range(4), 2)), lambda x, i, j: (x[i] - x[j]).sigmoid()
    each = [binary_cross_entropy(sigma(student, i, j), sigma(teacher, i, j)) for i, j in pairs]
    assert_close(ranknet(student, teacher), torch.stack(each).mean())
    p = torch.stack([sigma(teacher, i, j) for i, j in pairs])
    assert_close(ranknet(teacher, teacher), entropy(torch.stack([p, 1 - p], -1).log()).mean())


def test_two_entries_make_ranknet_and_the_listwise_kl_one():
    student, teacher = draw(6, 2).requires_grad_(), draw(6, 2, seed=1)
    pair, whole = ranknet(student / 2, teacher / 2), listwise_kl(student, teacher, 2.0)
    assert_close(pair - entropy(log_probs(teacher, 2.0)), whole)
    gradient = torch.autograd.grad(4 * whole.sum(), student)[0]
    assert_close(gradient, 2 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)).detach())


def test_lambda_weights_are_changes_of_ndcg():
    """With every place in IDCG: swap two entries, and see by how much NDCG changes."""
    grades, student = [2.0, 0.0, 1.0, 1.0], draw(4)

    def dcg(order, of=None):
        return sum((2 ** grades[i] - 1) / math.log2(2 + k) for k, i in enumerate(order))

    order, best = student.argsort(descending=True).tolist(), dcg(sorted(range(4), key=lambda i: -grades[i]))
    total = 0.0
    for i, j in itertools.permutations(range(4), 2):
        if grades[i] > grades[j]:
            swapped = [{i: j, j: i}.get(x, x) for x in order]
            total += abs(dcg(swapped) - dcg(order)) / best * math.log1p(math.exp(student[j] - student[i]))
    assert lambda_rank(student, torch.tensor(grades)).item() == pytest.approx(total / 6)
    three = dcg([0, 2, 3, 1][:2])
    assert lambda_rank(student, torch.tensor(grades), cutoff=2).item() == pytest.approx(total / 6 * best / three)


def test_equal_grades_ask_nothing():
    student = draw(4).requires_grad_()
    for grades in (torch.zeros(4), torch.ones(4)):
        value = lambda_rank(student, grades)
        assert value == 0 and (torch.autograd.grad(value, student)[0] == 0).all()


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


def test_kendall_tau_by_scipy_with_entries_absent_and_ties_counting_nothing():
    a, b = draw(4, 6), draw(4, 6, seed=1)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 4:] = False
    found = kendall_tau(a.requires_grad_(), b, mask)
    expected = [kendalltau(x[m], y[m]).statistic for x, y, m in zip(a.detach(), b, mask)]
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert not found.requires_grad
    assert_close(kendall_tau(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, 2.0, 1.0])), torch.tensor(2 / 3))
    assert_close(kendall_tau(b, -b), torch.full((4,), -1.0, dtype=torch.float64))
    assert kendall_tau(draw(2, 1), draw(2, 1)).tolist() == [0, 0]


def test_bradley_terry_is_ranknet_with_a_certain_teacher_and_plackett_luce_of_two():
    chosen, rejected = draw(6), draw(6, seed=1)
    value = bradley_terry(chosen, rejected)
    assert_close(value, list_mle(torch.stack([chosen, rejected], -1), torch.tensor([[0, 1]]).expand(6, 2)))
    assert_close(bradley_terry(chosen, rejected, margin=0.5), bradley_terry(chosen - 0.5, rejected))
    assert_close(
        bradley_terry(chosen, rejected, margin=draw(6, seed=2)), bradley_terry(chosen - draw(6, seed=2), rejected)
    )
    certain = torch.tensor([200.0, 0.0]).expand(6, 2)
    assert_close(value, ranknet(torch.stack([chosen, rejected], -1), certain))


ANSWERS = ("teacher_chosen", "teacher_rejected", "student_chosen", "student_rejected")
PREFERENCES = [DPO(0.3), Hinge(0.3), IPO(0.3), KTOPair(0.3), KTOPair(0.3, detach=True)]


def answers(shift=0.0):
    found = {name: 10 * draw(5, seed=i) for i, name in enumerate(ANSWERS)}
    return found | {name: found[name] + shift for name in ANSWERS[2:]}


@pytest.mark.parametrize("shift", [0.0, 20.0, -20.0])
def test_preferences_by_their_formulas(shift):
    """At a shift of 20 both of KTO's baselines are above 0, at -20 neither is."""
    x = answers(shift)
    c, r = x["student_chosen"] - x["teacher_chosen"], x["student_rejected"] - x["teacher_rejected"]
    z_c, z_r = max(c.mean().item(), 0.0), max(r.mean().item(), 0.0)
    assert (z_c > 0) == (z_r > 0) or not shift
    kto = ((1 - (0.3 * (c - z_r)).sigmoid()) + (1 - (0.3 * (z_c - r)).sigmoid())) / 2
    values = [-(0.3 * (c - r)).sigmoid().log(), (1 - 0.3 * (c - r)).clamp_min(0), (c - r - 1 / 0.6) ** 2, kto, kto]
    for part, value in zip(PREFERENCES, values, strict=True):
        assert_close(part(**x), value)


def test_a_student_that_is_its_reference():
    x = answers()
    x |= {"student_chosen": x["teacher_chosen"], "student_rejected": x["teacher_rejected"]}
    for part, value in {DPO(): math.log(2), Hinge(): 1.0, IPO(): 25.0, KTOPair(): 0.5}.items():
        assert_close(part(**x), torch.full((5,), value, dtype=torch.float64))


@pytest.mark.parametrize("part", PREFERENCES, ids=repr)
def test_preferences_reach_the_student_alone(part):
    x = {name: value.requires_grad_() for name, value in answers(20.0).items()}
    part(**x).sum().backward()
    assert x["teacher_chosen"].grad is None and x["teacher_rejected"].grad is None
    assert x["student_chosen"].grad.abs().sum() > 0 and x["student_rejected"].grad.abs().sum() > 0
    assert part(**{name: value.detach().bfloat16() for name, value in x.items()}).dtype == torch.float32


def test_the_baselines_of_kto_are_detached_on_demand():
    x = answers(20.0)
    log_ratio = {name: x[f"student_{name}"] - x[f"teacher_{name}"] for name in ("chosen", "rejected")}
    slopes = {}
    for detach in (True, False):
        student = {name: x[name].clone().requires_grad_() for name in ANSWERS[2:]}
        value = KTOPair(0.1, detach)(**(x | student))
        slopes[detach] = torch.autograd.grad(value.sum(), list(student.values()))
    wins = (0.1 * (log_ratio["rejected"].mean() - log_ratio["chosen"])).sigmoid()
    loses = (0.1 * (log_ratio["rejected"] - log_ratio["chosen"].mean())).sigmoid()
    bends = [0.1 * s * (1 - s) / 2 for s in (wins, loses)]
    assert_close(slopes[True], (-bends[0], bends[1]))
    assert_close(slopes[False][0], -bends[0] - bends[1].mean())
    assert_close(slopes[False][1], bends[1] + bends[0].mean())


def test_parts_are_written_by_name():
    assert TypeAdapter(Part(PlaceWeights)).validate_python("Decreasing") == Decreasing()
    part = TypeAdapter(Part(Preference)).validate_python({"name": "KTOPair", "detach": True})
    assert part == KTOPair(detach=True) and written(part) == {"name": "KTOPair", "beta": 0.1, "detach": True}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TeacherSoftmax(0.0), r"TeacherSoftmax.temperature must be positive, got 0"),
        (lambda: FirstPlaces(0), r"FirstPlaces.count must be at least 1, got 0. Leave it out"),
        (lambda: IPO(-1.0), r"IPO.beta must be positive, got -1"),
        (lambda: lambda_rank(draw(3), draw(3), cutoff=0), r"cutoff must be at least 1, got 0"),
        (lambda: pld(draw(3), draw(3), None, 2.0, weights=Decreasing()), r"teacher_temperature or weights, not both"),
    ],
)
def test_wrong_options_are_said(call, message):
    with pytest.raises(RecipeError, match=message):
        call()


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
        (lambda: pld(draw(2, 3), draw(2, 4), None), r"pld compares lists of one shape"),
        (lambda: DPO()(**(answers() | {"teacher_rejected": draw(3)})), r"DPO takes .*\[3\]. Sum those of the tokens"),
    ],
)
def test_wrong_shapes_are_said(call, message):
    with pytest.raises(ModelError, match=message):
        call()
