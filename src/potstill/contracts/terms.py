"""A loss is a set of named terms: a sum, a count and a coefficient each. The trainer alone divides, once.

Counts are added over all micro-batches and ranks before the one division, so accumulation and data parallelism change
nothing. A sequence mean is weights 1 / length with the sequences as count. There is no `reduction` string.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One part of a loss: `coefficient * total / count`, where total and count are summed over the whole step.

    `total` is a scalar with a gradient, `count` a scalar without. `unit` names what is counted ("token", "sequence",
    "image"); terms of one loss that share a unit must share their count, so that one gradient buffer serves them all.
    """

    total: Tensor
    count: Tensor
    coefficient: float = 1.0
    unit: str = "position"

    @staticmethod
    def over(values: Tensor, mask: Tensor | None = None, coefficient: float = 1.0, unit: str = "position") -> "Term":
        """Sum `values` [*P] where `mask` [*P] is true, counting the true positions. Masked values may hold anything."""
        if mask is None:
            return Term(values.sum(), torch.tensor(float(values.numel()), device=values.device), coefficient, unit)
        # Indexing, not multiplication: a NaN in the padding must reach neither the value nor the gradient.
        return Term(values[mask].sum(), mask.sum().to(values.dtype), coefficient, unit)

    @staticmethod
    def weighted(
        values: Tensor, weights: Tensor, mask: Tensor | None = None, coefficient: float = 1.0, unit: str = "position"
    ) -> "Term":
        """Weighted sum over counted positions, divided by how many they are (not by the weights' sum)."""
        if mask is not None:
            values, weights = values[mask], weights[mask]
        return Term.over(values * weights.detach(), None, coefficient, unit)

    def mean(self) -> Tensor:
        return self.coefficient * self.total / self.count.clamp_min(torch.finfo(torch.float32).tiny)


@dataclass
class Loss:
    """Named terms to minimise, named metrics to watch (terms too, without gradient), and per-position values to keep."""

    terms: dict[str, Term]
    metrics: Mapping[str, Term] = field(default_factory=dict)
    positions: Mapping[str, Tensor] = field(default_factory=dict)  # detached, for the report's pictures

    def value(self) -> Tensor:
        """The loss of this micro-batch alone, as if it were the whole step: for a person's own loop and for tests."""
        return torch.stack([term.mean() for term in self.terms.values()]).sum()


def divided(parts: list[dict[str, Term]]) -> Tensor:
    """The loss of a step made of several micro-batches: what the trainer computes, for tests and own loops."""
    total = torch.zeros(())
    for name in parts[0]:
        terms = [part[name] for part in parts]
        count = torch.stack([term.count for term in terms]).sum()
        total = total + terms[0].coefficient * torch.stack([term.total for term in terms]).sum() / count
    return total
