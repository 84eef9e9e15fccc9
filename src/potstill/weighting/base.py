"""Which positions count, and how much. B rows (responses), R positions of a row, padded to the longest.

A weighting sees detached quantities, never a graph, and its weights multiply the values of a term, whose count stays the
number of counted positions. `normalize` is explicit because it changes the effective learning rate.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from potstill.contracts.errors import RecipeError, SignalError
from potstill.contracts.spec import Part
from potstill.divergences.family import one_of


@dataclass(frozen=True)
class Positions:
    """What is known of the positions, detached. Only the mask is always there; padding may hold anything."""

    mask_BR: Tensor  # bool: counted
    student_entropy_BR: Tensor | None = None  # nats
    teacher_entropy_BR: Tensor | None = None  # nats
    log_ratio_BR: Tensor | None = None  # log p - log q of the tokens there
    reverse_kl_BR: Tensor | None = None  # KL(q || p), nats
    forward_kl_BR: Tensor | None = None  # KL(p || q), nats
    jensen_shannon_BR: Tensor | None = None  # of equal shares, nats
    segment_BR: Tensor | None = None  # int64: the step or turn that a position belongs to, from 0
    noise_BR: Tensor | None = None  # uniform numbers in (0, 1), keyed by seed, step, sample and position
    context_logp_KBR: Tensor | None = None  # log p of the tokens there in K other contexts
    reward_B: Tensor | None = None  # of each row's completion
    group: int = 1  # rows of one prompt, side by side


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """Base: a subclass names in `needs` the fields of `Positions` it reads, and writes `weigh`.

    normalize: "none" leaves the weights; "mean" divides by their mean over the counted positions, which couples the batch.
    """

    normalize: Literal["none", "mean"] = "none"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        one_of(self, "normalize", self.normalize, ("none", "mean"))

    @property
    def couples(self) -> Literal["row", "batch"]:
        """How far a weight looks: within its row, or over the whole batch, which then must not be cut."""
        return "row" if self.normalize == "none" else "batch"

    def weigh(self, values: Positions) -> Tensor:
        """Weights [B, R]; what stands at padded positions is ignored."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, values: Positions) -> Tensor:
        """Detached float32 weights [B, R], 0 at padded positions."""
        mask = values.mask_BR.bool()
        for name in self.needs:
            given = getattr(values, name)
            if given is None:
                raise SignalError(
                    f"{type(self).__name__} needs {name}, which this objective does not give. "
                    "Choose an estimator that computes it (rows of both models), or another weighting."
                )
            expected = (given.shape[0], *mask.shape) if name.endswith("_KBR") else mask.shape[: 1 + name.endswith("R")]
            if given.shape != expected:
                raise RecipeError(
                    f"{type(self).__name__}: {name} has shape {list(given.shape)}, but the mask {list(mask.shape)}."
                )
        weights = self.weigh(values).float().masked_fill(~mask, 0.0)
        if self.normalize == "mean":
            weights = weights * mask.sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
        return weights


Part(Weighting)
