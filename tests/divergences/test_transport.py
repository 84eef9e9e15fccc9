"""Plans against linear programs, sorting and closed forms; three gradients against each other and finite differences."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import ModelError, RecipeError
from potstill.divergences.transport import Sinkhorn, pairwise_cost

EXACT = {"tolerance": 1e-12, "max_iterations": 10000}


def probabilities(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return (scale * normal(*shape, seed=seed)).softmax(-1)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grad(value: Tensor, *at: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), at)


def ratio_form(
    cost: Tensor, epsilon: float, iterations: int, a: Tensor | float = 1.0, b: Tensor | float = 1.0
) -> Tensor:
    """The paper's iterations as its code writes them: a kernel, divided by its row sums and by its column sums."""
    kernel = (-cost / epsilon).exp()
    for _ in range(iterations):
        kernel = a * kernel / kernel.sum(1, keepdim=True)
        kernel = b * kernel / kernel.sum(0, keepdim=True)
    return kernel


# Costs


@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_costs_by_numpy(norm, power):
    student, teacher = normal(2, 3, 5, seed=0), normal(2, 4, 5, seed=1)
    gap = student.numpy()[:, :, None] - teacher.numpy()[:, None]
    expected = np.linalg.norm(gap, ord=norm, axis=-1) ** power
    assert_close(pairwise_cost(student=student, teacher=teacher, norm=norm, power=power), torch.from_numpy(expected))


@pytest.mark.parametrize("norm", [1.0, 2.0])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_coincident_rows_cost_nothing_with_a_finite_gradient(norm, power):
    student = normal(30, 5, seed=0).float().requires_grad_()  # 30 rows: where torch would turn to a matrix product
    cost = pairwise_cost(student=student, teacher=student.detach(), norm=norm, power=power)
    assert cost.diagonal().abs().max() == 0
    assert torch.equal(grad(cost.diagonal(), student)[0], torch.zeros(30, 5))


# The paper's algorithm (batch 1, batch 2, the ratio form, permutations, the assignment, the bias)


def test_one_pair_is_twice_the_total_variation():
    student, teacher = probabilities(1, 5, seed=0), probabilities(1, 5, seed=1)
    assert_close(Sinkhorn()(teacher=teacher, student=student), (student - teacher).abs().sum(-1))


def test_two_pairs_in_closed_form():
    (a, c), (d, e) = cost = torch.tensor([[0.3, 1.1], [0.4, 0.7]], dtype=torch.float64)
    p = torch.sigmoid(-(a + e - c - d) / (2 * 0.1))
    plan = Sinkhorn(gradient="implicit", **EXACT).solve(cost).plan
    assert_close(plan, torch.stack([torch.stack([p, 1 - p]), torch.stack([1 - p, p])]))


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_every_iterate_and_its_gradient_are_those_of_the_ratio_form(iterations):
    student, teacher = probabilities(7, 3, seed=0).requires_grad_(), probabilities(7, 3, seed=1)
    value = Sinkhorn(iterations=iterations)(teacher=teacher, student=student)
    cost = (student[:, None] - teacher).abs().sum(-1)
    expected = (ratio_form(cost, 0.1, iterations) * cost).sum(1)
    assert_close(value, expected)
    assert_close(grad(value.sum(), student), grad(expected.sum(), student))
    in_float = Sinkhorn(iterations=iterations)(teacher=teacher.float(), student=student.detach().float())
    assert_close(in_float, expected.detach().float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("iterations", [1, 3])
def test_every_iterate_with_masses_too(iterations):
    cost, a, b = normal(4, 6, seed=0).abs(), probabilities(4, seed=1).requires_grad_(), probabilities(6, seed=2)
    solved = Sinkhorn(iterations=iterations).solve(cost, student_mass=a, teacher_mass=b)
    expected = ratio_form(cost, 0.1, iterations, a[:, None], b)
    assert_close(solved.plan, expected)
    assert_close(grad(solved.value, a)[0], grad((expected * cost).sum(1), a)[0])
    off = (expected.sum(1) - a).abs().sum() + (expected.sum(0) - b).abs().sum()
    assert off > 1e-2
    assert_close(solved.error, off.detach())


def test_the_error_is_a_share_of_the_mass_on_both_sides():
    solved = Sinkhorn(iterations=1).solve(normal(2, 6, 6, seed=0).abs())
    wrong = replace(solved, plan=solved.plan * torch.tensor([1.1, 1.0, 0.9, 1.0, 1.0, 1.0]))
    rows, columns = wrong.plan.sum(2) - 1, wrong.plan.sum(1) - 1
    assert_close(wrong.error, (rows.abs().sum(1) + columns.abs().sum(1)) / 6)
    assert_close(columns.abs().sum(1), torch.tensor([0.2, 0.2]).double(), atol=1e-7, rtol=0)


def test_columns_come_last():
    """Columns have exactly mass 1, rows about."""
    plan = Sinkhorn().solve(3 * normal(6, 6, seed=0).abs()).plan
    assert_close(plan.sum(0), torch.ones(6, dtype=torch.float64))
    assert (plan.sum(1) - 1).abs().max() > 1e-6


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_order_is_free(gradient):
    """The teacher's order means nothing, the student's moves the values along: the batch is matched by content alone."""
    student, teacher, order = probabilities(6, 4, seed=0), probabilities(6, 4, seed=1), torch.tensor([3, 5, 0, 1, 4, 2])
    d = Sinkhorn(gradient=gradient)
    value = d(teacher=teacher, student=student)
    assert_close(d(teacher=teacher[order], student=student), value, rtol=1e-12, atol=1e-12)
    assert_close(d(teacher=teacher, student=student[order]), value[order], rtol=1e-12, atol=1e-12)


def test_small_epsilon_is_the_best_assignment():
    """Falls to it from above as epsilon falls (5.8223, 5.4243, 5.4193 to 5.4138 in its example)."""
    student, teacher = probabilities(8, 3, seed=0), probabilities(8, 3, seed=1)
    cost = pairwise_cost(student=student, teacher=teacher)
    rows, columns = linear_sum_assignment(cost.numpy())
    best = cost[rows, columns].sum().item()
    values = [
        Sinkhorn(epsilon=e, gradient="detached", **EXACT).solve(cost).value.sum().item() for e in (1, 0.1, 0.01, 2e-4)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] - best > 1e-2
    assert values[-1] == pytest.approx(best, abs=1e-6)


def test_small_epsilon_is_the_linear_program():
    cost, a, b = normal(4, 6, seed=0).abs(), probabilities(4, seed=1, scale=0.5), probabilities(6, seed=2, scale=0.5)
    marginals = np.concatenate([np.kron(np.eye(4), np.ones(6)), np.kron(np.ones(4), np.eye(6))])
    best = linprog(cost.numpy().ravel(), A_eq=marginals, b_eq=torch.cat([a, b]).numpy()).fun
    solved = Sinkhorn(epsilon=1e-3, gradient="detached", **EXACT).solve(cost, student_mass=a, teacher_mass=b)
    assert solved.error.item() < 1e-11
    assert solved.value.sum().item() == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_on_a_line_the_sorted_are_matched(power):
    student, teacher = normal(7, 1, seed=0), normal(7, 1, seed=1) + 2
    d = Sinkhorn(epsilon=1e-3, power=power, marginals="uniform", gradient="detached", **EXACT)
    expected = (student.sort(0).values - teacher.sort(0).values).abs().pow(power).mean()
    assert d(teacher=teacher, student=student).sum().item() == pytest.approx(expected.item(), abs=1e-6)


def test_equal_batches_still_cost_something():
    student = probabilities(8, 3, seed=0)
    assert Sinkhorn()(teacher=student, student=student).sum() > 1e-2


def test_classes_within_a_sample_are_groups_of_one_number():
    """Sample-wise, with a small epsilon: the L1 distance of the sorted probabilities."""
    student, teacher = probabilities(3, 5, seed=0), probabilities(3, 5, seed=1)
    d = Sinkhorn(epsilon=1e-4, gradient="detached", **EXACT)
    value = d(teacher=teacher[..., None], student=student[..., None])
    assert value.shape == (3, 5)
    assert_close(value.sum(1), (student.sort(1).values - teacher.sort(1).values).abs().sum(1), atol=1e-5, rtol=0)


def test_uniform_masses_scale_the_plan_only():
    student, teacher = probabilities(5, 3, seed=0), probabilities(5, 3, seed=1)
    ones, uniform = (Sinkhorn(marginals=m)(teacher=teacher, student=student) for m in ("ones", "uniform"))
    assert_close(ones, 5 * uniform)
    given_ones = Sinkhorn().solve(pairwise_cost(student=student, teacher=teacher), student_mass=torch.ones(5).double())
    assert_close(given_ones.value, ones)


# The fixed point


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.03, 0.3, 3.0]), st.booleans(), st.integers(0, 2**31))
def test_newton_and_sinkhorn_end_at_the_plan_with_these_marginals(rows, columns, epsilon, weighted, seed):
    """Optimality: both marginals hold, and C + epsilon log P splits into f_i + g_j. That pins the plan down."""
    cost = 2 * torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    masses = {
        "student_mass": probabilities(2, rows, seed=seed, scale=1),
        "teacher_mass": probabilities(columns, seed=seed),
    }
    d = Sinkhorn(epsilon, tolerance=1e-11, max_iterations=2000, gradient="detached", marginals="uniform", iterations=1)
    solved = d.solve(cost, **(masses if weighted else {}))
    plan = solved.plan
    assert_close(plan.sum(-1), solved.student_mass.expand(2, rows), atol=1e-10, rtol=0)
    assert_close(plan.sum(-2), solved.teacher_mass.expand(2, columns), atol=1e-10, rtol=0)
    split = cost + epsilon * solved.log_plan
    left_over = split - split[..., :1] - split[..., :1, :] + split[..., :1, :1]
    assert left_over.abs().max() < 1e-8
    assert (solved.error < 1e-10).all()


def test_newton_does_in_tens_of_steps_what_takes_sinkhorn_thousands():
    cost = pairwise_cost(student=probabilities(16, 2, seed=0), teacher=probabilities(16, 2, seed=1))
    newton = Sinkhorn(0.02, tolerance=1e-9, gradient="implicit").solve(cost)
    plain = Sinkhorn(0.02, tolerance=1e-9, max_iterations=100000).solve(cost)
    assert newton.steps < 100 < 1000 < plain.steps
    assert_close(newton.plan, plain.plan, atol=1e-6, rtol=0)


@pytest.mark.parametrize("gradient", ["unrolled", "detached"])
def test_a_tolerance_is_a_share_of_the_mass(gradient):
    cost = pairwise_cost(student=probabilities(64, 2, seed=0), teacher=probabilities(64, 2, seed=1))
    ones, uniform = (
        Sinkhorn(0.02, iterations=1, tolerance=1e-2, marginals=m, gradient=gradient).solve(cost)
        for m in ("ones", "uniform")
    )
    assert ones.steps == uniform.steps > 1
    assert 5e-5 < ones.error < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-2, 1e-3, 1e-5])
def test_a_tiny_epsilon_neither_overflows_nor_stalls(epsilon, dtype):
    cost = (2 * torch.rand(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    solved = Sinkhorn(epsilon, tolerance=1e-6, gradient="detached").solve(cost)
    rows, columns = linear_sum_assignment(cost.numpy())
    assert solved.plan.dtype == dtype and solved.teacher_potential.isfinite().all()
    assert solved.error.item() < (1e-2 if dtype == torch.float32 else 2e-6)  # log P is rounded at cost / epsilon
    assert solved.value.sum().item() == pytest.approx(cost[rows, columns].sum().item(), abs=20 * epsilon + 1e-3)


def test_the_other_direction_is_the_transposed_plan():
    cost = normal(5, 7, seed=0).abs()
    d = Sinkhorn(marginals="uniform", gradient="detached", **EXACT)
    assert_close(d.solve(cost.mT).plan, d.solve(cost).plan.mT)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached"])
def test_groups_are_problems_of_their_own(gradient):
    student, teacher = probabilities(2, 3, 5, 4, seed=0), probabilities(2, 3, 6, 4, seed=1)
    d = Sinkhorn(marginals="uniform", gradient=gradient, tolerance=1e-9)
    value = d(teacher=teacher, student=student)
    assert value.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            assert_close(value[i, j], d(teacher=teacher[i, j], student=student[i, j]), atol=1e-7, rtol=0)


def test_adding_to_the_rows_or_columns_of_the_cost_changes_no_plan():
    cost = normal(5, 5, seed=0).abs()
    moved = cost + normal(5, 1, seed=1) + normal(5, seed=2)
    d = Sinkhorn(gradient="detached", **EXACT)
    assert_close(d.solve(moved).plan, d.solve(cost).plan)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_a_warm_start_ends_at_the_same_plan_sooner(gradient):
    cost = pairwise_cost(student=probabilities(16, 3, seed=0), teacher=probabilities(16, 3, seed=1))
    d = Sinkhorn(0.05, iterations=1, tolerance=1e-8, gradient=gradient)
    cold, near = d.solve(cost), d.solve(cost + 1e-6 * normal(16, 16, seed=2))
    warm = d.solve(cost, start=near.teacher_potential)
    assert warm.steps < cold.steps
    assert d.solve(cost, start=cold.teacher_potential).steps == 1
    assert_close(warm.plan, cold.plan, atol=1e-6, rtol=0)


def test_a_row_without_mass_takes_no_part():
    cost, a = normal(4, 3, seed=0).abs().requires_grad_(), torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64)
    d = Sinkhorn(marginals="uniform", gradient="implicit", **EXACT)
    solved, kept = d.solve(cost, student_mass=a), d.solve(cost[a > 0], student_mass=a[a > 0])
    assert_close(solved.plan[a > 0], kept.plan)
    assert solved.plan[1].max() < 1e-29
    assert_close(grad(solved.value, cost), grad(kept.value, cost))


# Gradients


def test_implicit_and_unrolled_gradients_meet_at_convergence():
    student, teacher = probabilities(6, 3, seed=0).requires_grad_(), probabilities(6, 3, seed=1).requires_grad_()
    weight = normal(6, seed=2)  # values by row, each with a gradient of its own
    results = [
        grad(weight * Sinkhorn(0.2, gradient=g, **EXACT)(teacher=teacher, student=student), student, teacher)
        for g in ("unrolled", "implicit", "detached")
    ]
    assert_close(results[0], results[1])
    assert (results[0][0] - results[2][0]).abs().max() > 1e-3


@pytest.mark.parametrize("epsilon", [0.02, 0.5])
def test_implicit_gradients_by_finite_differences(epsilon):
    d = Sinkhorn(epsilon, gradient="implicit", tolerance=1e-13, marginals="uniform")
    masses = lambda x, y: {"student_mass": x.softmax(-1), "teacher_mass": y.softmax(-1)}
    plan = lambda cost, x, y: d.solve(cost, **masses(x, y)).plan
    inputs = normal(2, 3, 4, seed=0).abs(), normal(2, 3, seed=1), normal(4, seed=2)
    inputs = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(plan, inputs, eps=1e-5 * epsilon, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.1, 5e-3])
def test_implicit_gradients_keep_their_digits_in_float32(epsilon):
    cost = pairwise_cost(student=probabilities(12, 3, seed=0), teacher=probabilities(12, 3, seed=1)).requires_grad_()
    in_float = cost.detach().float().requires_grad_()
    exact, value = (Sinkhorn(epsilon, gradient="implicit", tolerance=1e-7).solve(c).value for c in (cost, in_float))
    assert_close(grad(value, in_float)[0], grad(exact, cost)[0].float(), rtol=0, atol=2e-6)


def test_gradients_of_masses_are_fixed_by_a_mean_of_zero():
    cost, a, b = normal(4, 5, seed=0).abs(), probabilities(4, seed=1), probabilities(5, seed=2).requires_grad_()
    solved = Sinkhorn(gradient="implicit", **EXACT).solve(cost, student_mass=a, teacher_mass=b)
    (gradient,) = grad(solved.value, b)
    assert gradient.abs().max() > 0.1
    assert abs((b * gradient).sum()) < 1e-12


def test_implicit_gradients_differentiate_again():
    d = Sinkhorn(0.5, gradient="implicit", tolerance=1e-14, marginals="uniform")
    masses = lambda x, y: {"student_mass": x.softmax(-1), "teacher_mass": y.softmax(-1)}
    value = lambda cost, x, y: d.solve(cost, **masses(x, y)).value
    inputs = normal(2, 3, seed=0).abs(), normal(2, seed=1), normal(3, seed=2)
    inputs = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradgradcheck(value, inputs, atol=1e-4)
    assert torch.autograd.gradgradcheck(lambda cost: d.entropic(cost), inputs[:1], atol=1e-4)


def test_a_detached_plan_leaves_the_plan_as_gradient():
    cost = normal(5, 5, seed=0).abs().requires_grad_()
    solved = Sinkhorn(gradient="detached").solve(cost)
    assert not solved.plan.requires_grad
    assert torch.equal(grad(solved.value, cost)[0], solved.plan)


@pytest.mark.parametrize("gradient", ["implicit", "detached", "unrolled"])
def test_the_envelope_theorem(gradient):
    cost = normal(3, 4, seed=0).abs().requires_grad_()
    d = Sinkhorn(0.3, gradient=gradient, marginals="uniform", **EXACT)
    assert_close(grad(d.entropic(cost), cost)[0], d.solve(cost).plan.detach())
    assert torch.autograd.gradcheck(d.entropic, (cost,))


def test_gradients_stay_finite_at_one_hot_rows_and_tiny_epsilon():
    student, teacher = (
        torch.eye(4).requires_grad_(),
        torch.eye(4)[[0, 0, 1, 2]],
    )  # ties: Sinkhorn's error falls as 1 / n
    for gradient in ("unrolled", "implicit", "detached"):
        for epsilon in (0.1, 1e-3):
            d = Sinkhorn(
                epsilon, gradient=gradient, tolerance=2e-2 if gradient == "unrolled" else 1e-6, max_iterations=99
            )
            value = d(teacher=teacher, student=student)
            assert_close(value.sum(), torch.tensor(2.0), atol=5e-2, rtol=0)  # one of four is out of place
            assert grad(value, student)[0].isfinite().all()


# The entropic value and the debiased divergence


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 2**31))
def test_no_other_plan_has_a_lower_entropic_value(rows, columns, seed):
    cost = normal(rows, columns, seed=seed).abs()
    d = Sinkhorn(0.2, marginals="uniform", gradient="detached", **EXACT)
    value, plan = d.entropic(cost), d.solve(cost).plan
    other = (
        Sinkhorn(1.0, marginals="uniform", gradient="detached", **EXACT)
        .solve(normal(rows, columns, seed=seed + 1))
        .plan
    )
    objective = lambda p: (p * cost).sum() + 0.2 * (p * (p * rows * columns).log()).sum()
    assert_close(objective(plan), value)
    assert value <= min(objective(other), objective(torch.full_like(cost, 1 / (rows * columns)))) + 1e-9
    assert value >= (plan * cost).sum() - 1e-12


def test_entropic_values_weigh_with_the_mass():
    cost = normal(5, 5, seed=0).abs()
    ones, uniform = (Sinkhorn(marginals=m, gradient="detached", **EXACT).entropic(cost) for m in ("ones", "uniform"))
    assert_close(ones, 5 * uniform)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
@pytest.mark.parametrize("norm, power", [(1.0, 1.0), (2.0, 1.0), (2.0, 2.0)])
def test_the_divergence_is_zero_between_equals_and_positive_else(norm, power, gradient):
    d = Sinkhorn(1.0, marginals="uniform", norm=norm, power=power, gradient=gradient, tolerance=1e-8)
    x = (normal(6, 3, seed=0) / 2).requires_grad_()
    value = d.divergence(teacher=x.detach()[torch.randperm(6)], student=x)
    assert abs(value.item()) < 1e-6
    assert grad(value, x)[0].abs().max() < 1e-5
    for seed in range(5):
        for rows in (6, 4):
            assert d.divergence(teacher=x.detach(), student=normal(rows, 3, seed=seed + 1) / 2) > 1e-2


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 20.0])
def test_a_shift_costs_its_square_at_every_epsilon(epsilon):
    """|x_i - x_j - v|^2 differs from |x_i - x_j|^2 by |v|^2 and terms of i or j alone, which no plan can change."""
    x, shift = normal(6, 3, seed=0), normal(3, seed=1).requires_grad_()
    d = Sinkhorn(epsilon, marginals="uniform", norm=2.0, power=2.0, gradient="implicit", **EXACT)
    value = d.divergence(teacher=x, student=x + shift)
    assert_close(value, shift.square().sum())
    assert_close(grad(value, shift)[0], 2 * shift.detach())


def test_between_single_rows_the_divergence_is_their_cost():
    x, y = normal(4, 1, 3, seed=0), normal(4, 1, 3, seed=1)
    assert_close(Sinkhorn().divergence(teacher=y, student=x), (x - y).abs().sum((1, 2)))


def test_large_epsilon_is_the_energy_distance():
    x, y = normal(5, 2, seed=0), normal(7, 2, seed=1)
    d = Sinkhorn(1e5, marginals="uniform", norm=2.0, gradient="detached", **EXACT)
    energy = torch.cdist(x, y).mean() - torch.cdist(x, x).mean() / 2 - torch.cdist(y, y).mean() / 2
    assert_close(d.divergence(teacher=y, student=x), energy, rtol=1e-4, atol=0)


def test_three_problems_at_once_are_three_problems():
    x, y = normal(2, 4, 3, seed=0), normal(2, 4, 3, seed=1)
    d = Sinkhorn(0.3, gradient="implicit", **EXACT)
    one = lambda s, t: d.entropic(pairwise_cost(student=s, teacher=t))
    assert_close(d.divergence(teacher=y, student=x), one(x, y) - one(x, x) / 2 - one(y, y) / 2)


# Input


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached"])
def test_half_precision_is_computed_in_float32(gradient):
    student, teacher = probabilities(4, 3, seed=0).bfloat16().requires_grad_(), probabilities(4, 3, seed=1).bfloat16()
    d = Sinkhorn(gradient=gradient)
    value = d(teacher=teacher, student=student)
    assert value.dtype == torch.float32
    assert_close(value, d(teacher=teacher.float(), student=student.float()))
    assert grad(value, student)[0].dtype == torch.bfloat16
    d = Sinkhorn(gradient=gradient, tolerance=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = d(teacher=teacher, student=student)
    assert_close(value, d(teacher=teacher.float(), student=student.float()))


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached"])
def test_a_cost_in_half_precision_and_no_gradient_where_none_is_recorded(gradient):
    cost = normal(4, 4, seed=0).abs().bfloat16().requires_grad_()
    solve = Sinkhorn(gradient=gradient).solve
    assert solve(cost).plan.dtype == torch.float32
    assert_close(solve(cost).plan, solve(cost.float()).plan)
    in_float = cost.detach().float().requires_grad_()
    with torch.no_grad():
        solved = solve(in_float)
    assert not solved.plan.requires_grad and not solved.log_plan.requires_grad


def test_an_empty_batch_has_no_values():
    for gradient in ("unrolled", "implicit"):
        d = Sinkhorn(gradient=gradient, tolerance=1e-6)
        assert d(teacher=torch.zeros(0, 3), student=torch.zeros(0, 3)).shape == (0,)


def test_nan_is_passed_on():
    student = torch.full((3, 2), math.nan)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        solved = Sinkhorn(gradient="detached", tolerance=1e-6).solve(torch.full((3, 3), math.nan))
        assert solved.value.isnan().all() and solved.steps == 20  # no thousand steps on nothing
        assert Sinkhorn()(teacher=torch.ones(3, 2), student=student).isnan().all()


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_an_unfinished_problem_warns(gradient):
    d = Sinkhorn(0.01, tolerance=1e-9, max_iterations=22, gradient=gradient)
    with pytest.warns(UserWarning, match=r"stopped after \d+ steps with marginals off by .*Raise max_iterations"):
        assert d.solve(2 * normal(9, 9, seed=0).abs()).steps == 22
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sinkhorn(0.01).solve(2 * normal(9, 9, seed=0).abs())  # no tolerance, no promise


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon": 0.0}, "Sinkhorn.epsilon must be positive, got 0.0"),
        ({"power": -1.0}, "Sinkhorn.power must be positive"),
        ({"iterations": 0}, "Sinkhorn.iterations must be at least 1, got 0"),
        ({"max_iterations": 0}, "Sinkhorn.max_iterations must be at least 1"),
        ({"tolerance": -1e-3}, "Sinkhorn.tolerance must be at least 0"),
        ({"norm": 0.5}, "Sinkhorn.norm must be at least 1, got 0.5"),
        ({"gradient": "envelope"}, "Sinkhorn.gradient must be one of unrolled, implicit, detached, got 'envelope'"),
        ({"marginals": "one"}, "Sinkhorn.marginals must be one of ones, uniform, got 'one'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(RecipeError, match=message):
        Sinkhorn(**options)


def test_shapes_are_checked():
    with pytest.raises(ModelError, match=r"rows of equal width.*\[3, 4\] and \[3, 5\]. Project"):
        Sinkhorn()(teacher=torch.ones(3, 5), student=torch.ones(3, 4))
    with pytest.raises(ModelError, match="rows of equal width"):
        pairwise_cost(student=torch.ones(3), teacher=torch.ones(3))
    with pytest.raises(ModelError, match=r"equally many, got 3 and 2. Take marginals 'uniform'"):
        Sinkhorn()(teacher=torch.ones(2, 4), student=torch.ones(3, 4))
    solve = Sinkhorn(marginals="uniform").solve
    with pytest.raises(ModelError, match=r"takes a cost \[\*G, B, C\], got \[3\]"):
        solve(torch.ones(3))
    with pytest.raises(ModelError, match=r"needs teacher_mass \[2\] for a cost \[3, 2\], got \[3\]"):
        solve(torch.ones(3, 2), teacher_mass=torch.ones(3))
    with pytest.raises(ModelError, match="must have the same sum. Divide each by its own"):
        solve(torch.ones(3, 2), teacher_mass=torch.ones(2))
    with pytest.raises(ModelError, match=r"teacher's potential \[\*G, 2\], got \[3\]"):
        solve(torch.ones(3, 2), start=torch.ones(3))
