"""What a teacher gives and an objective needs. N positions, V vocabulary or classes, D features, K support size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from potstill.contracts.batch import Batch
from potstill.contracts.errors import SignalError


@dataclass(frozen=True)
class Signal:
    """Base of what teachers give."""


@dataclass(frozen=True)
class FullLogits(Signal):
    logits: Tensor  # [N, V] (or [B, V] for one position a sample)


@dataclass(frozen=True)
class HiddenAndHead(Signal):
    """Last hidden states and the output layer; logits are softcap tanh(scale (h W^T + b) / softcap), uncapped if None."""

    hidden_ND: Tensor
    head_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, where: Tensor | None = None) -> Tensor:
        """The logits [M, V] of all positions, or of those picked by a mask or by numbers."""
        hidden = self.hidden_ND if where is None else self.hidden_ND[where]
        logits = self.scale * torch.nn.functional.linear(hidden, self.head_VD, self.bias_V)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


@dataclass(frozen=True)
class TopKLogp(Signal):
    logp_NK: Tensor
    indices_NK: Tensor


@dataclass(frozen=True)
class TokenLogp(Signal):
    logp_N: Tensor  # of the tokens that the batch holds


@dataclass(frozen=True)
class SpanLogp(Signal):
    """What a teacher of another vocabulary says of S spans of the batch's text.

    At the M spans that are `single` tokens on both sides it may give whole rows: `rows(where)`, log-probabilities [m, K + 1]
    at some of the M, of the K outcomes that both vocabularies share, and last of all others as one.
    """

    logp_S: Tensor
    ranges_S2: Tensor  # [start, end) among the tokens of the student's row
    row_S: Tensor
    single_S: Tensor | None = None
    rows: Callable[[Any], Tensor] | None = None
    student_K: Tensor | None = None  # the shared outcomes as the student numbers them


@dataclass(frozen=True)
class Features(Signal):
    by_name: dict[str, Tensor]


@runtime_checkable
class Teacher(Protocol):
    """Scores states, never receives gradients."""

    name: str
    gives: frozenset[type[Signal]]

    def score(self, batch: Batch, need: type[Signal]) -> Signal: ...


def check_signals(needed_by: str, needs: type[Signal], teacher: Any) -> None:
    """Refuse, before any weight is loaded where the caller can, a teacher that lacks the signal."""
    if needs not in teacher.gives:
        given = ", ".join(sorted(s.__name__ for s in teacher.gives)) or "nothing"
        raise SignalError(
            f"{needed_by} needs {needs.__name__}, but teacher {teacher.name} gives {given}. "
            f"Use a live teacher (a model folder or id), or an objective that needs less."
        )
