"""The weightings that papers share. B rows, R positions of a row."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from potstill.contracts.errors import RecipeError
from potstill.divergences.family import one_of
from potstill.weighting.base import Positions, Weighting


@dataclass(frozen=True)
class Uniform(Weighting):
    """Every counted position weighs 1."""

    def weigh(self, values: Positions) -> Tensor:
        return torch.ones_like(values.mask_BR, dtype=torch.float32)


@dataclass(frozen=True)
class EntropyTop(Weighting):
    """1 for the share of counted positions with the highest student entropy, else 0 (TIP, arXiv 2604.14084).

    Of n positions floor(share n) are kept, but at least one; of equals, the earlier. scope: n counts each response, or
    the batch. The mean over kept positions alone, TIP's Eq. 9, is normalize="mean".
    """

    share: float = 0.5
    scope: Literal["batch", "response"] = "response"
    needs = ("student_entropy_BR",)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "scope", self.scope, ("batch", "response"))
        if not 0.0 < self.share <= 1.0:
            raise RecipeError(f"EntropyTop.share must lie in (0, 1], got {self.share}.")

    @property
    def couples(self) -> Literal["row", "batch"]:
        return "batch" if self.scope == "batch" else super().couples

    def weigh(self, values: Positions) -> Tensor:
        assert values.student_entropy_BR is not None
        mask = values.mask_BR.bool()
        return top_share(values.student_entropy_BR, mask, self.share, self.scope).float()


@dataclass(frozen=True)
class EarlyPrefix(Weighting):
    """1 + gamma (1 - share of the row's |log_ratio| spent before the position): 1 + gamma first, then falling to 1.

    Source: arXiv 2606.22600, Algorithm 1. gamma = 0 is Uniform. A row without any |log_ratio| weighs 1 + gamma.
    """

    gamma: float = 0.5
    needs = ("log_ratio_BR",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma >= 0.0:
            raise RecipeError(f"EarlyPrefix.gamma must not be negative, got {self.gamma}.")

    def weigh(self, values: Positions) -> Tensor:
        assert values.log_ratio_BR is not None
        size = values.log_ratio_BR.float().abs().masked_fill(~values.mask_BR.bool(), 0.0)
        before = size.cumsum(1) - size
        return 1 + self.gamma * (1 - before / size.sum(1, keepdim=True).clamp_min(1e-12))


def top_share(score_BR: Tensor, mask_BR: Tensor, share: float, scope: Literal["batch", "response"]) -> Tensor:
    """Which counted positions are among the top floor(share n), at least one, by score; bool [B, R]. Ties: the earlier."""
    score, mask = (x.reshape(1, -1) if scope == "batch" else x for x in (score_BR.float(), mask_BR))
    order = score.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    # Counted positions go first even where their score is -inf or padding comes earlier.
    order = order.gather(1, mask.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    keep = (mask.sum(1, keepdim=True).double() * share + 1e-9).floor().clamp_min(1)  # 0.29 * 100 is 28.999...
    return ((rank < keep) & mask).reshape(mask_BR.shape)
