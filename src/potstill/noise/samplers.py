"""Samplers of the reverse process, all written on the denoiser D(x; sigma) of the variance-exploding process.

    probability-flow ODE:  dx / dsigma = (x - D(x; sigma)) / sigma

`sigmas` falls from the first level to the last, which may be 0. `x` starts as sigmas[0] times unit noise. Noise is
keyed by (seed, step, id). Sources: EDM algorithms 1 and 2 (arXiv 2206.00364); the ancestral step is the exact posterior
q(x_next | x, x0 = D) of DDPM (arXiv 2006.11239) in these terms; `consistency` is algorithm 1 of arXiv 2303.01469.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import RecipeError
from potstill.noise.gaussian import Denoise, karras_grid


def _grid(sigmas: Tensor | Sequence[float], least: int = 2) -> list[float]:
    grid = [float(sigma) for sigma in sigmas]
    if len(grid) < least or grid[-1] < 0 or any(b >= a for a, b in pairwise(grid)):
        raise RecipeError(f"Noise levels must fall strictly to 0 or more, {least} or more of them; got {grid}.")
    return grid


def _at(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    return denoise(x, torch.full((len(x),), sigma, device=x.device, dtype=torch.float64))


def _noise(seed: int, step: int, ids_B: Tensor, like: Tensor) -> Tensor:
    return keyed.normal_like(keyed.key(seed, "sampler", step), ids_B, like)


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor | Sequence[float]) -> Tensor:
    """First-order steps of the probability-flow ODE (DDIM). x [B, ...] at sigmas[0] -> x at sigmas[-1]."""
    grid = _grid(sigmas)
    for sigma, after in pairwise(grid):
        x = x + (after - sigma) * (x - _at(denoise, x, sigma)) / sigma
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    seed: int = 0,
    ids_B: Tensor | None = None,
    churn: float = 0.0,
    churn_from: float = 0.0,
    churn_to: float = float("inf"),
    churn_noise: float = 1.0,
) -> Tensor:
    """EDM's second-order sampler; `churn` > 0 adds noise before each step at levels in [churn_from, churn_to]."""
    grid = _grid(sigmas)
    for step, (sigma, after) in enumerate(pairwise(grid)):
        if churn > 0 and churn_from <= sigma <= churn_to:
            if ids_B is None:
                raise RecipeError("heun with churn needs ids_B, by which its noise is keyed.")
            raised = sigma * (1.0 + min(churn / (len(grid) - 1), 2**0.5 - 1.0))
            x = x + (raised**2 - sigma**2) ** 0.5 * churn_noise * _noise(seed, step, ids_B, x)
            sigma = raised
        slope = (x - _at(denoise, x, sigma)) / sigma
        ahead = x + (after - sigma) * slope
        if after > 0:
            slope = 0.5 * (slope + (ahead - _at(denoise, ahead, after)) / after)
            ahead = x + (after - sigma) * slope
        x = ahead
    return x


def ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor | Sequence[float], *, seed: int, ids_B: Tensor, eta: float = 1.0
) -> Tensor:
    """Stochastic steps: x_next ~ q(x_next | x, x0 = D) at eta = 1, Euler's step at eta = 0."""
    grid = _grid(sigmas)
    for step, (sigma, after) in enumerate(pairwise(grid)):
        x0 = _at(denoise, x, sigma)
        fresh = eta * after * (1.0 - (after / sigma) ** 2) ** 0.5  # standard deviation of the new noise
        x = x0 + (after**2 - fresh**2) ** 0.5 / sigma * (x - x0)
        if fresh > 0:
            x = x + fresh * _noise(seed, step, ids_B, x)
    return x


def consistency(
    denoise: Denoise, x: Tensor, sigmas: Tensor | Sequence[float], *, seed: int = 0, ids_B: Tensor | None = None
) -> Tensor:
    """Few-step sampling: jump to x0, noise it again to the next level, repeat. One call for each level above 0."""
    grid = [sigma for sigma in _grid(sigmas, least=1) if sigma > 0]
    if len(grid) > 1 and ids_B is None:
        raise RecipeError("consistency with more than one level needs ids_B, by which its noise is keyed.")
    x0 = _at(denoise, x, grid[0])
    for step, sigma in enumerate(grid[1:]):
        x0 = _at(denoise, x0 + sigma * _noise(seed, step, ids_B, x0), sigma)  # type: ignore[arg-type]
    return x0


def start(shape: Sequence[int], sigma: float, seed: int, ids_B: Tensor) -> Tensor:
    """sigma times unit noise of `shape` (one sample) for each id. [B, *shape], float32."""
    like = torch.empty(len(ids_B), *shape, device=ids_B.device)
    return sigma * keyed.normal_like(keyed.key(seed, "start"), ids_B, like)


@torch.no_grad()
def sample(
    denoise: Denoise,
    shape: Sequence[int],
    ids_B: Tensor,
    *,
    seed: int = 0,
    sigmas: Tensor | Sequence[float] | None = None,
    solver: Callable[..., Tensor] = heun,
    batch: int = 256,
    **options: float,
) -> Tensor:
    """Samples, functions of (seed, id) alone: Heun on EDM's 18 levels unless told otherwise. [B, *shape]."""
    grid = karras_grid(18) if sigmas is None else torch.as_tensor(sigmas)
    drawn = []
    for ids in ids_B.split(batch):
        x = start(shape, float(grid[0]), seed, ids)
        keys = {} if solver is euler else {"seed": seed, "ids_B": ids}
        drawn.append(solver(denoise, x, grid, **keys, **options))
    return torch.cat(drawn)
