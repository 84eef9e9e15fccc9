import math

import numpy as np
import pytest
import torch
from tests.divergences.inputs import rows
from torch.testing import assert_close

from potstill.contracts.errors import DataError, ModelError
from potstill.divergences import dist_terms, dkd_terms, kd, log_probs, standardize

INF = math.inf


def test_kd_by_hand_at_a_temperature():
    """At T = 2 the rows (0, 2 log 9) and (0, 0) are (0.1, 0.9) and a fair coin; forward KL, and no T^2."""
    teacher, student = torch.tensor([[0.0, 2 * math.log(9)]]), torch.zeros(1, 2)
    expected = 0.1 * math.log(0.1 / 0.5) + 0.9 * math.log(0.9 / 0.5)
    assert kd(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_kd_at_high_temperature_matches_centred_logits():
    """T^2 KD tends to |z - v|^2 / (2 V) of centred logits (Hinton et al., section 2.1)."""
    student, teacher = rows(3, 7, seed=0), rows(3, 7, seed=1)
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert_close(1e6 * kd(student, teacher, 1e3), gap.square().sum(1) / 14, rtol=1e-2, atol=0)


# Standardisation (arXiv 2403.01427)


def test_standardised_rows_have_mean_zero_and_deviation_one():
    z = standardize(rows(5, 9, seed=0, scale=3) + 4)
    assert_close(z.mean(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(z.std(-1), torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)
    population = standardize(rows(5, 9, seed=0), unbiased=False)
    assert_close(population.square().mean(-1), torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_standardised_rows_ignore_scale_and_shift_and_keep_the_ranking():
    x = rows(5, 9, seed=0)
    assert_close(standardize(5 * x + 3), standardize(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(standardize(x).argsort(-1), x.argsort(-1))


def test_the_bound_is_attained_by_one_hot_logits():
    one_hot = torch.eye(6, dtype=torch.float64)[0]
    assert standardize(one_hot, eps=0.0).max().item() == pytest.approx(5 / math.sqrt(6))
    assert standardize(one_hot, eps=0.0, unbiased=False).max().item() == pytest.approx(math.sqrt(5))
    assert (standardize(rows(99, 6, seed=1)).abs() <= 5 / math.sqrt(6)).all()


def test_the_gradient_never_changes_the_logits_scale():
    z, v = rows(4, 9, seed=0).requires_grad_(), rows(4, 9, seed=1)
    (gradient,) = torch.autograd.grad(kd(standardize(z), standardize(v), 2.0).sum(), z)
    centred = z.detach() - z.detach().mean(-1, keepdim=True)
    assert gradient.norm() > 0.1
    assert gradient.sum(-1).abs().max() < 1e-12
    assert (gradient * centred).sum(-1).abs().max() < 1e-7
    (free,) = torch.autograd.grad(kd(standardize(z, detach=True), standardize(v), 2.0).sum(), z)
    assert (free * centred).sum(-1).abs().max() > 1e-2  # the ablation: detached, it does
    assert_close(standardize(z, detach=True), standardize(z))


def test_scaling_the_teacher_changes_nothing_once_standardised():
    z, v = rows(4, 9, seed=0), rows(4, 9, seed=1)
    assert_close(
        kd(standardize(z), standardize(4 * v), 2.0), kd(standardize(z), standardize(v), 2.0), rtol=1e-5, atol=0
    )
    assert (kd(z, 4 * v, 2.0) - kd(z, v, 2.0)).abs().min() > 1e-2


def test_constant_logits_are_zero_with_small_gradients():
    z = torch.full((2, 5), 3.0, requires_grad=True)
    value = standardize(z)
    assert value.tolist() == [[0.0] * 5] * 2
    assert torch.autograd.grad(value[0, 0], z)[0].abs().max() <= 1


def test_standardize_gradcheck():
    assert torch.autograd.gradcheck(standardize, rows(2, 5, seed=0).requires_grad_())


# Decoupled KD (arXiv 2203.08679)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_target_term_plus_the_weighted_rest(temperature):
    student, teacher, labels = rows(6, 10, seed=0), rows(6, 10, seed=1, scale=3), torch.tensor([0, 3, 9, 1, 1, 5])
    tckd, nckd = dkd_terms(student, teacher, labels, temperature)
    p_target = log_probs(teacher, temperature).exp().gather(1, labels[:, None])[:, 0]
    assert_close(kd(student, teacher, temperature), tckd + (1 - p_target) * nckd, rtol=1e-12, atol=0)
    assert (tckd > 0).all()
    assert (nckd > 0).all()


def test_dkd_terms_by_hand():
    teacher = torch.tensor([[0.5, 0.4, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.2, 0.4, 0.4]], dtype=torch.float64).log()
    tckd, nckd = dkd_terms(student, teacher, torch.tensor([0]))
    assert tckd.item() == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8))
    assert nckd.item() == pytest.approx(0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5))


def test_nckd_does_not_see_the_target_logit():
    student, teacher, labels = rows(3, 6, seed=0), rows(3, 6, seed=1), torch.tensor([2, 0, 5])
    moved = student.scatter_add(1, labels[:, None], torch.full((3, 1), 7.0, dtype=torch.float64))
    before, after = dkd_terms(student, teacher, labels), dkd_terms(moved, teacher, labels)
    assert_close(before[1], after[1])
    assert (before[0] - after[0]).abs().min() > 0.1


def test_dkd_is_finite_at_certain_teachers_and_two_classes():
    teacher = torch.tensor([[0.0, -INF, -INF], [60.0, 0.0, 1.0]])
    student = torch.zeros(2, 3, requires_grad=True)
    tckd, nckd = dkd_terms(student, teacher, torch.tensor([0, 0]))
    assert tckd.isfinite().all()
    assert nckd[0].item() == 0.0
    # in float32 1 - p_target would be 0 in the second row; the rest still has its shape
    assert nckd[1].item() == pytest.approx(kd(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])).item(), rel=1e-4)
    assert torch.autograd.grad((tckd + nckd).sum(), student)[0].isfinite().all()
    assert dkd_terms(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0]))[1].item() == 0.0


def test_dkd_refusals():
    with pytest.raises(ModelError, match=r"student \[2, 3\], teacher \[2, 4\] and labels \[2\]"):
        dkd_terms(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(DataError, match="at least two classes"):
        dkd_terms(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


# DIST (arXiv 2205.10536)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_terms_are_numpy_correlations(temperature):
    student, teacher = rows(8, 5, seed=0), rows(8, 5, seed=1)
    q, p = (log_probs(x, temperature).exp().numpy() for x in (student, teacher))
    inter, intra = dist_terms(student, teacher, temperature)
    assert inter.shape == (8,)
    assert intra.shape == (5,)
    np.testing.assert_allclose(inter, [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p)], rtol=1e-9)
    np.testing.assert_allclose(intra, [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T)], rtol=1e-9)


def test_dist_asks_for_relations_not_for_equality():
    """Probabilities that are an affine image of the teacher's cost nothing between classes, though KD > 0."""
    teacher = rows(4, 5, seed=1)
    student = (0.3 * log_probs(teacher).exp() + 0.7 / 5).log()
    inter, intra = dist_terms(student, teacher)
    assert inter.abs().max() < 1e-9
    assert intra.abs().max() < 1e-9
    assert (kd(student, teacher) > 1e-2).all()


def test_intra_couples_the_batch_and_inter_does_not():
    student, teacher = rows(8, 5, seed=0), rows(8, 5, seed=1)
    inter, intra = dist_terms(student, teacher)
    inter4, intra4 = dist_terms(student[:4], teacher[:4])
    assert_close(inter[:4], inter4)
    assert (intra - intra4).abs().max() > 1e-2


def test_a_batch_of_one_has_no_intra_gradient():
    student = rows(1, 5, seed=0).requires_grad_()
    _, intra = dist_terms(student, rows(1, 5, seed=1))
    assert_close(intra, torch.ones(5, dtype=torch.float64))
    assert torch.autograd.grad(intra.sum(), student)[0].abs().max().item() == 0.0
