"""Targets of teacher and label: closed forms, the losses that they are special cases of, and what is refused."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.spec import Part, Spec
from potstill.divergences import Decreasing, FirstPlaces, TeacherSoftmax, entropy, plackett_luce, pld
from potstill.divergences.features import exit_loss
from potstill.objectives.logits import KD, SoftTarget
from potstill.objectives.targets import GroundTruthMix, Powered, Target, TeacherProbabilities, ranking

B, V = 6, 5
LABELS = torch.arange(B) % V


def rows(seed):
    return 2 * torch.randn(B, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradient(loss, student, teacher):
    z = student.clone().requires_grad_()
    value = torch.stack(list(loss(z, teacher, LABELS).values())).sum(0)
    return value, torch.autograd.grad(value.sum(), z)[0]


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("gamma, temperature", [(1.0, 1.0), (1.4, 1.0), (0.7, 2.0)])
def test_powered_is_the_exit_loss(form, gamma, temperature):
    value, _ = value_and_gradient(SoftTarget(Powered(gamma, temperature, form), temperature), rows(0), rows(1))
    options = dict(gamma=gamma, temperature=temperature, form=form)
    assert_close(value, exit_loss(teacher_logits=rows(1), student_logits=rows(0), labels=LABELS, **options))


def test_powered_by_hand():
    """p = (0.5, 0.25, 0.25), label 1, gamma 2: 1.25^2 - 1 there, p^2 elsewhere; the paper's form keeps the 1 and p."""
    teacher, labels = torch.tensor([[2.0, 1.0, 1.0]]).double().log(), torch.tensor([1])
    assert_close(Powered(2.0)(teacher, labels), torch.tensor([[0.25, 0.5625, 0.0625]]).double())
    assert_close(Powered(2.0, form="paper")(teacher, labels), torch.tensor([[0.5, 1.5625, 0.25]]).double())


def test_gamma_one_is_kd_and_the_teachers_entropy():
    value, gradient = value_and_gradient(SoftTarget(Powered(1.0)), rows(0), rows(1))
    kd, kd_gradient = value_and_gradient(KD(1.0), rows(0), rows(1))
    assert_close(value, kd + entropy(rows(1).log_softmax(-1)))
    assert_close(gradient, kd_gradient)
    assert_close(SoftTarget(Powered(1.0, form="paper"))(rows(0), rows(1), LABELS)["target"],
                 value + F.cross_entropy(rows(0), LABELS, reduction="none"))  # fmt: skip


def test_with_cross_entropy_the_label_weighs_its_power():
    """CE + L_OFA: -(1 + p_y)^gamma log q_y beside the other classes; and the weight grows with p_y."""
    gamma, p = 1.5, rows(1).softmax(-1)
    label = F.one_hot(LABELS, V).double()
    weights = label + Powered(gamma)(rows(1), LABELS)
    assert_close((weights * label).sum(-1), (1 + (p * label).sum(-1)) ** gamma)
    sure = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]).double()
    at_label = Powered(gamma)(sure, torch.zeros(3, dtype=torch.long))[:, 0]
    assert (at_label.diff() > 0).all()


def test_mixing_the_ground_truth_is_mixing_the_losses():
    """share CE + (1 - share) KD at temperature 1, up to the teacher's entropy; at both ends one of them alone."""
    for share in (0.0, 0.3, 1.0):
        value, gradient = value_and_gradient(SoftTarget(GroundTruthMix(share)), rows(0), rows(1))
        ce, kd = F.cross_entropy(rows(0), LABELS, reduction="none"), KD(1.0)(rows(0), rows(1), LABELS)["kd"]
        assert_close(value, share * ce + (1 - share) * (kd + entropy(rows(1).log_softmax(-1))))
        target = share * F.one_hot(LABELS, V) + (1 - share) * rows(1).softmax(-1)
        assert_close(gradient, rows(0).softmax(-1) - target)


def test_targets_have_no_gradient():
    teacher = rows(1).requires_grad_()
    for target in (TeacherProbabilities(2.0), Powered(1.3), GroundTruthMix(0.5)):
        assert not target(teacher, LABELS).requires_grad
    assert not any(x.requires_grad for x in ranking(teacher, LABELS))


@pytest.mark.parametrize("places", [TeacherSoftmax(2.0), FirstPlaces(), FirstPlaces(2), Decreasing()], ids=repr)
def test_ranking_is_what_pld_is_made_of(places):
    order, weights = ranking(rows(1), LABELS, places)
    assert_close(plackett_luce(rows(0), order, weights), pld(rows(0), rows(1), LABELS, weights=places))
    assert torch.equal(order[:, 0], LABELS)
    assert torch.equal(order.sort(-1).values, torch.arange(V).expand(B, V))  # every class once
    later = rows(1).gather(-1, order)[:, 1:]
    assert (later.diff(dim=-1) <= 0).all()
    assert_close(ranking(rows(1), LABELS, places, normalised=True)[1].sum(-1), torch.ones(B).double())


def test_ranking_by_hand():
    order, weights = ranking(torch.tensor([[1.0, 3.0, 2.0, 0.0]]).double(), torch.tensor([3]))
    assert order.tolist() == [[3, 1, 2, 0]]
    assert_close(weights, torch.tensor([[0.0, 3.0, 2.0, 1.0]]).double().softmax(-1))
    assert ranking(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), None)[0].tolist() == [[1, 2, 0, 3]]


def test_targets_are_written_by_name():
    class Config(Spec):
        target: Part(Target) = TeacherProbabilities()

    mixed = {"name": "GroundTruthMix", "share": 0.2, "target": {"name": "Powered", "gamma": 1.5}}
    assert Config(target=mixed).target == GroundTruthMix(0.2, Powered(1.5))


def test_bad_input_is_refused():
    with pytest.raises(RecipeError, match=r"GroundTruthMix.share must lie in 0 <= share <= 1, got 1.5"):
        GroundTruthMix(1.5)
    with pytest.raises(RecipeError, match=r"Powered.gamma must be positive, got 0"):
        Powered(0.0)
    with pytest.raises(RecipeError, match=r"form must be"):
        Powered(form="other")
    with pytest.raises(RecipeError, match=r"TeacherProbabilities.temperature must be positive"):
        TeacherProbabilities(0.0)
    with pytest.raises(ModelError, match=r"one label a row, got \[6, 5\] and labels \[6, 5\]"):
        Powered()(rows(0), torch.zeros(B, V))
