"""Typed batches. Each carries the keyed ids of its samples and a memo of the step's forward passes.

B batch, T tokens, C H W images. `ids_B` is unique per (sample, epoch), so randomness keyed by it never repeats.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class Batch:
    ids_B: Tensor  # int64, unique per (sample, epoch)
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.ids_B)

    def remember(self, name: Hashable, make: Callable[[], T]) -> T:
        """The value of `make()`, computed once per step: two players that need one forward pass share it."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device, with an empty memo."""
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor | Batch)
        }
        return replace(self, **moved, memo={})


@dataclass
class ImageBatch(Batch):
    images: Tensor  # [B, C, H, W], in the range its task states
    labels_B: Tensor  # int64
    condition: Tensor | None = None  # encoder states of captions [B, T, D], where the source has them


@dataclass
class TokenBatch(Batch):
    """Token sequences and which of them count.

    `counted_BT[b, t]` says that token t of row b is a position to learn: its distribution is predicted from the tokens
    before it (never true at t = 0). Padding, on either side, has `attention_BT` false.
    """

    tokens_BT: Tensor  # int64
    attention_BT: Tensor  # bool
    counted_BT: Tensor  # bool
    sampled_logp_BT: Tensor | None = None  # log-probs under the policy that sampled the counted tokens, else 0
    privileged: "TokenBatch | None" = None  # the same counted tokens after another context, row by row
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_counted(self) -> Tensor:
        """The counted tokens, row by row. [N]."""
        return self.tokens_BT[self.counted_BT]

    @property
    def numbers_BT(self) -> Tensor:
        """The number of each counted token among the N, row by row; meaningless elsewhere."""
        return (self.counted_BT.flatten().cumsum(0) - 1).view(self.counted_BT.shape)

    def placed(self, values_N: Tensor) -> Tensor:
        """Values of the counted tokens where these stand, 0 elsewhere. [N] -> [B, T]"""
        return values_N.new_zeros(self.counted_BT.shape).index_put((self.counted_BT,), values_N)


@dataclass
class PromptBatch(Batch):
    """Left-padded prompts to continue, with what scores or guides their completions."""

    tokens_BT: Tensor  # int64, padded on the left
    attention_BT: Tensor  # bool
    completions: list[list[int]] | None = None  # ground-truth continuations where the data has them
    extra: dict[str, Any] = field(default_factory=dict)  # answers, tasks, privileged contexts: lists of length B


@dataclass
class PointBatch(Batch):
    points_BD: Tensor  # [B, D], samples of a low-dimensional density
