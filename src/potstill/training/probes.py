"""How noisy a gradient is: measured by repeating the sampling of one batch at fixed weights, or read off Adam's moments.

    total variance = sum over parameters of Var(g) = (sum_r |g_r|^2 - |sum_r g_r|^2 / R) / (R - 1)

over R repetitions: two running sums, one of them a vector as large as the parameters. Source: vOPD, arXiv 2605.07865.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from potstill.contracts.batch import Batch
from potstill.contracts.errors import DataError
from potstill.contracts.files import load_tensors, read_json
from potstill.contracts.players import Objective
from potstill.models.causal import evaluating


@dataclass(frozen=True)
class GradientNoise:
    """`variance` is the total variance of one gradient; `squared_mean` estimates |E g|^2 without bias (it may be negative)."""

    variance: float
    squared_mean: float
    repeats: int


class _Moments:
    """Running sums of gradients: what `GradientNoise` is made of."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        self.squares, self.count = 0.0, 0

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        self.count += 1
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total += gradient
                self.squares += gradient.double().square().sum().item()

    def noise(self) -> GradientNoise:
        norm = sum(total.square().sum().item() for total in self.sums)  # |sum g|^2
        variance = (self.squares - norm / self.count) / (self.count - 1)
        return GradientNoise(variance, (norm / self.count - variance) / self.count, self.count)


def gradient_noise(objective: Objective, player: str, batch: Batch, repeats: int) -> GradientNoise:
    """Collect one batch `repeats` times, each with samples of its own, and compare the gradients of `player`'s loss.

    The weights stay as they are, and dropout is off. The samples are those of steps -1, -2, ..., which no training has.
    """
    if repeats < 2:
        raise DataError(f"A variance needs at least 2 repetitions, got {repeats}.")
    steps = ((batch, -1 - repeat) for repeat in range(repeats))
    return gradient_noise_by(objective, player, steps, lambda collected: 0)[0]


def gradient_noise_by(
    objective: Objective, player: str, batches: Iterable[tuple[Batch, int]], kind: Callable[[Batch], Hashable]
) -> dict[Hashable, GradientNoise]:
    """The same across batches, each collected at its step, among those of a kind: `kind` is asked of what was collected.

    Kinds of a single batch have no variance and are left out.
    """
    parameters = list(objective.players[player].parameters())
    found: dict[Hashable, _Moments] = {}
    with evaluating(objective):
        for batch, step in batches:
            with torch.no_grad():
                collected = objective.collect(batch, step)
            loss = objective.loss(player, collected, step).value()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            found.setdefault(kind(collected), _Moments(parameters)).add(gradients)
    return {name: moments.noise() for name, moments in found.items() if moments.count > 1}


def adam_variance(checkpoint: Path, player: str, betas: tuple[float, float]) -> float:
    """sum(v_hat) - sum(m_hat^2) of a checkpoint's Adam moments: a free proxy of the total variance, over many steps."""
    aliases = read_json(checkpoint / "state.json")["optimizer_aliases"]
    tensors = load_tensors(checkpoint / "optimizers.safetensors", aliases)
    total = 0.0
    for name, first in tensors.items():
        if not name.startswith(f"{player}/") or not name.endswith("/exp_avg"):
            continue
        place = name.removesuffix("exp_avg")
        step, second = tensors[f"{place}step"].item(), tensors[f"{place}exp_avg_sq"]
        mean = first.double() / (1 - betas[0] ** step)
        total += (second.double() / (1 - betas[1] ** step)).sum().item() - mean.square().sum().item()
    return total
