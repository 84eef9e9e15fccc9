"""Metrics over finished models. `evaluate` gives the standard ones of a model's kind."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from potstill.contracts.batch import Batch
from potstill.contracts.errors import ModelError

STANDARD = {
    "image_classifier": "potstill.evaluation.images:evaluate_classifier",
    "causal_lm": "potstill.evaluation.text:evaluate_language_model",
    "masked_lm": "potstill.evaluation.masked:evaluate_masked_model",
    "graph_classifier": "potstill.evaluation.graphs:evaluate_graphs",
}


@dataclass(frozen=True)
class First:
    """The first `size` rows of a dataset."""

    dataset: Any
    size: int

    def __len__(self) -> int:
        return min(self.size, len(self.dataset))

    def batch(self, rows: Tensor, epoch: int | Tensor = 0) -> Batch:
        return self.dataset.batch(rows, epoch)


def evaluate(model: Any, dataset: Any, *, batch: int, limit: int | None = None, **options: Any) -> dict[str, float]:
    """The standard metrics of a finished model on a dataset of its kind. `options` go to the kind's own function
    (a teacher to compare with, for one)."""
    if model.kind not in STANDARD:
        raise ModelError(f"A {model.kind} has no standard metrics.")
    module, _, name = STANDARD[model.kind].partition(":")
    function: Callable[..., dict[str, float]] = getattr(import_module(module), name)
    if limit is not None:
        dataset = dataset[:limit] if isinstance(dataset, list) else First(dataset, limit)
    return function(model, dataset, batch=batch, **options)
