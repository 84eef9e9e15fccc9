"""Which outcomes are compared at a position: all, or the k likeliest with the rest bucketed, renormalised or dropped.

A support maps a pair of log-probabilities [*P, V] to a pair [*P, K] (or K + 1) before a divergence sees them.
P positions (any leading shape), V vocabulary, K support size.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from potstill.contracts.errors import RecipeError
from potstill.contracts.spec import Part
from potstill.divergences.family import one_of, promoted

INF = math.inf


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), [*P, V], in float32 or better. No T^2 here: objectives multiply, by name."""
    if not temperature > 0.0:
        raise RecipeError(f"temperature must be positive, got {temperature}.")
    logits = promoted(logits)
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def log_mass(logp: Tensor) -> Tensor:
    """log sum exp over the last axis, [*P, K] -> [*P]; -inf, with zero gradient, when nothing has mass."""
    empty = (logp == -INF).all(-1)
    return logp.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(empty, -INF)


def tail_logp(kept_logp: Tensor) -> Tensor:
    """log(1 - sum exp(kept)), [*P, K] -> [*P]: the tail's mass where only the kept outcomes are known.

    -inf, with zero gradient, when the kept outcomes have all the mass. It knows the tail to the rounding of 1 only
    (1e-7 in float32); with whole rows at hand `TopK` sums the tail itself.
    """
    kept = kept_logp.exp().sum(-1)
    full = kept >= 1
    return torch.log1p(-kept.masked_fill(full, 0.0)).masked_fill(full, -INF)


class Support:
    """Base: `support(teacher_logp=..., student_logp=...)` -> the pair on the support, teacher first."""

    def __call__(self, *, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


Part(Support)


@dataclass(frozen=True)
class Full(Support):
    """The whole vocabulary: both pass unchanged."""

    def __call__(self, *, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        return teacher_logp, student_logp


@dataclass(frozen=True)
class TopK(Support):
    """The k likeliest outcomes of the teacher, of the student, or of either (up to 2k). A k above V is V.

    tail: "bucket" adds the rest as one outcome [*P, K + 1]: still two distributions, and no f-divergence grows.
    "renormalize" divides by the kept mass [*P, K]: what is left outside costs nothing.
    "drop" keeps raw probabilities [*P, K]. These are no distributions, so minima move: with teacher mass m kept,
    forward KL has minimum m log m (all student mass on the kept), reverse KL -m / e (mass 1 - m / e goes anywhere).
    """

    k: int = 100
    of: Literal["teacher", "student", "union"] = "teacher"
    tail: Literal["bucket", "renormalize", "drop"] = "bucket"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RecipeError(f"TopK.k must be at least 1, got {self.k}.")
        one_of(self, "of", self.of, ("teacher", "student", "union"))
        one_of(self, "tail", self.tail, ("bucket", "renormalize", "drop"))

    def indices(self, *, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """Token ids on the support, [*P, K] (2K for the union, where an id may stand twice, next to its twin)."""
        k = min(self.k, teacher_logp.shape[-1])
        rows = {"teacher": [teacher_logp], "student": [student_logp], "union": [teacher_logp, student_logp]}[self.of]
        ids = torch.cat([row.detach().topk(k, dim=-1).indices for row in rows], -1)
        return ids.sort(-1).values if self.of == "union" else ids

    def __call__(self, *, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.indices(teacher_logp=teacher_logp, student_logp=student_logp)
        twice = torch.zeros_like(ids, dtype=torch.bool)
        if self.of == "union":
            twice[..., 1:] = ids[..., 1:] == ids[..., :-1]
        teacher, student = (self._restrict(logp, ids, twice) for logp in (teacher_logp, student_logp))
        return teacher, student

    def _restrict(self, logp: Tensor, ids: Tensor, twice: Tensor) -> Tensor:
        kept = logp.gather(-1, ids).masked_fill(twice, -INF)
        if self.tail == "drop":
            return kept
        if self.tail == "renormalize":
            mass = log_mass(kept)
            return kept - mass.masked_fill(mass == -INF, 0.0).unsqueeze(-1)
        tail = log_mass(logp.scatter(-1, ids, -INF))  # summed, not 1 - kept: exact for a certain row in float32
        return torch.cat([kept, tail.unsqueeze(-1)], -1)
