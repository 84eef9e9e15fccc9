import math

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.errors import RecipeError
from potstill.noise.gaussian import karras
from potstill.noise.samplers import ancestral, consistency, euler, heun, sample, start

M, V = 0.4, 0.25


def denoise(x, sigma_B):
    """The optimal denoiser of N(M, V)."""
    sigma = sigma_B.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return (V * x + sigma**2 * M) / (V + sigma**2)


def flow(x, before, after):
    """Closed form of the probability-flow ODE: (x - M) / sqrt(V + sigma^2) is constant."""
    return M + (x - M) * math.sqrt((V + after**2) / (V + before**2))


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(solver, order):
    x, errors = torch.tensor([[3.0], [-1.5]], dtype=torch.float64), []
    for steps in (40, 80):
        grid = karras(torch.linspace(1, 0, steps + 1, dtype=torch.float64), 0.1, 5.0)
        errors.append((solver(denoise, x, grid) - flow(x, 5.0, 0.1)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    assert errors[1] < 0.05


@pytest.mark.parametrize("solver", [euler, heun])
def test_the_last_step_reaches_zero_noise(solver):
    x = torch.tensor([[3.0], [-1.5]], dtype=torch.float64)
    grid = torch.cat([karras(torch.linspace(1, 0, 200, dtype=torch.float64), 0.002, 5.0), torch.zeros(1)])
    assert_close(solver(denoise, x, grid), flow(x, 5.0, 0.0), rtol=0, atol=0.05 if solver is euler else 1e-3)


def test_one_euler_step_to_zero_is_the_denoiser():
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert_close(euler(denoise, x, [2.0, 0.0]), denoise(x, torch.full((3,), 2.0)))


def test_ancestral_is_the_exact_posterior():
    """With point-mass data every noised marginal is N(M, sigma^2): one step and a chain of them must keep it."""
    point = lambda x, sigma: torch.full_like(x, M)
    ids = torch.arange(40000)
    x = M + start((1,), 3.0, 0, ids)
    for grid in ([3.0, 1.0], [3.0, 2.0, 1.5, 1.0]):
        drawn = ancestral(point, x, grid, seed=5, ids_B=ids)
        assert drawn.mean().item() == pytest.approx(M, abs=0.03)
        assert drawn.std().item() == pytest.approx(1.0, abs=0.015)
    slope = torch.linalg.lstsq(x - M, ancestral(point, x, [3.0, 1.0], seed=5, ids_B=ids) - M).solution.item()
    assert slope == pytest.approx(1 / 9, abs=0.01)  # the posterior mean keeps sigma_next^2 / sigma^2 of the offset


def test_ancestral_without_noise_is_euler():
    x, ids = torch.tensor([[3.0], [-1.5]]), torch.arange(2)
    assert_close(ancestral(denoise, x, [3.0, 1.0, 0.0], seed=0, ids_B=ids, eta=0.0), euler(denoise, x, [3.0, 1.0, 0.0]))


def test_churn_keeps_the_marginal_and_is_off_by_default():
    """Enough small steps, with much churn, still end at N(M, V)."""
    ids = torch.arange(20000)
    x = flow_start = M + start((1,), 1.0, 0, ids) * math.sqrt(V + 9.0)  # noised data at level 3
    grid = karras(torch.linspace(1, 0, 60, dtype=torch.float64), 0.01, 3.0)
    drawn = heun(denoise, x, grid, seed=1, ids_B=ids, churn=20.0)
    assert drawn.std().item() == pytest.approx(math.sqrt(V), abs=0.015)
    assert drawn.mean().item() == pytest.approx(M, abs=0.02)
    assert torch.corrcoef(torch.cat([flow_start, drawn], 1).T)[0, 1] < 0.9  # noise took part
    with pytest.raises(RecipeError, match="needs ids_B"):
        heun(denoise, x, grid, churn=1.0)


def test_consistency_returns_to_the_data():
    """With the exact flow map to zero as D, every round of noise and jump keeps N(M, V)."""
    to_data = lambda x, sigma: M + (x - M) * (V / (V + sigma.view(-1, 1).to(x.dtype) ** 2)).sqrt()
    ids = torch.arange(20000)
    x = M + start((1,), 1.0, 0, ids) * math.sqrt(V + 9.0)
    drawn = consistency(to_data, x, [3.0, 1.0, 0.3, 0.0], seed=2, ids_B=ids)
    assert drawn.std().item() == pytest.approx(math.sqrt(V), abs=0.01)
    assert_close(consistency(to_data, x, [3.0]), to_data(x, torch.full((1,), 3.0)))
    with pytest.raises(RecipeError, match="needs ids_B"):
        consistency(to_data, x, [3.0, 1.0])


@pytest.mark.parametrize("solver", [euler, heun, ancestral, consistency])
def test_a_sample_is_a_function_of_its_id(solver):
    ids = torch.tensor([7, 3, 11, 5])
    whole = sample(denoise, (2, 3), ids, seed=9, sigmas=[3.0, 1.0, 0.2, 0.0], solver=solver)
    cut = sample(denoise, (2, 3), ids.flip(0), seed=9, sigmas=[3.0, 1.0, 0.2, 0.0], solver=solver, batch=3)
    assert whole.shape == (4, 2, 3)
    assert_close(cut.flip(0), whole)
    assert not torch.allclose(sample(denoise, (2, 3), ids, seed=8, sigmas=[3.0, 1.0, 0.2, 0.0], solver=solver), whole)


@pytest.mark.parametrize("grid", [[1.0], [1.0, 2.0], [1.0, -0.5]])
def test_rising_levels_are_refused(grid):
    with pytest.raises(RecipeError, match="must fall strictly"):
        euler(denoise, torch.zeros(1, 1), grid)
