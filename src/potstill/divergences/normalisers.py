"""Density ratios from discriminators, and the two normalisations that keep their weights near 1.

f-distill, arXiv 2502.15681 (FastGen's settings): everything is detached and in float32. B samples.
"""

import torch
from torch import Tensor, nn

from potstill.contracts.errors import RecipeError


def ratio_from_logits(
    logits: Tensor, limit: float = 10.0, lower: float = 0.1, upper: float = 20.0, clip: bool = True
) -> Tensor:
    """r = p / q [B] from logits [B, ...] of a discriminator that calls the teacher's samples real, detached.

    The logits of all heads and places of a sample are averaged, clamped to +-limit, exponentiated, then clipped.
    `clip=False` leaves the last step out.
    """
    mean = logits.detach().float().flatten(1).mean(1) if logits.dim() > 1 else logits.detach().float()
    ratio = mean.clamp(-limit, limit).exp()
    return ratio.clamp(lower, upper) if clip else ratio


class TimeBins(nn.Module):
    """Divides ratios by their running mean in equal bins of time. The means are a buffer, saved with the module.

    Of a step: `sums` of each micro-batch and rank, added up, go to `update` once; then `divide`. A call does all three,
    for a batch in one piece. Only bins that hold samples move: mean <- rho * mean + (1 - rho) * batch mean, from 1.
    With rho = 0 a bin of one sample gives exactly 1, whatever the ratio.
    """

    means: Tensor

    def __init__(self, low: float, high: float, bins: int = 10, rho: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        if not low < high or bins < 1 or not 0.0 <= rho < 1.0:
            raise RecipeError(
                f"TimeBins needs low < high, bins >= 1 and 0 <= rho < 1, got {low}, {high}, {bins} and {rho}."
            )
        self.low, self.high, self.rho, self.eps = low, high, rho, eps
        self.register_buffer("means", torch.ones(bins))

    def bin(self, times_B: Tensor) -> Tensor:
        """The bin of each time, [B] int64; times outside the range fall into the outermost bins."""
        share = (times_B.detach().float() - self.low) / (self.high - self.low)
        return (share * len(self.means)).long().clamp(0, len(self.means) - 1)

    def sums(self, ratio_B: Tensor, times_B: Tensor) -> tuple[Tensor, Tensor]:
        """(total [bins], count [bins]) of the ratios: what micro-batches and ranks add up."""
        zeros, index = torch.zeros_like(self.means), self.bin(times_B)
        ratio = ratio_B.detach().to(zeros.dtype)
        return zeros.index_add(0, index, ratio), zeros.index_add(0, index, torch.ones_like(ratio))

    def update(self, total: Tensor, count: Tensor) -> None:
        fresh = self.rho * self.means + (1 - self.rho) * total / count.clamp_min(1)
        self.means.copy_(torch.where(count > 0, fresh, self.means))

    def divide(self, ratio_B: Tensor, times_B: Tensor) -> Tensor:
        return ratio_B.detach() / (self.means[self.bin(times_B)] + self.eps)

    def forward(self, ratio_B: Tensor, times_B: Tensor) -> Tensor:
        self.update(*self.sums(ratio_B, times_B))
        return self.divide(ratio_B, times_B)


def batch_normalised(weight_B: Tensor, mean: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """h / (mean h + eps), detached, [B]: scale-free weights with mean 1.

    Couples the batch: with micro-batches or ranks give the `mean` over all of them.
    """
    weight_B = weight_B.detach().float()
    return weight_B / ((weight_B.mean() if mean is None else mean.detach()) + eps)
