"""What a data source gives: typed rows, split into train and test, with the models and metrics that go with them.

A `Dataset` turns row numbers into a typed batch. Order, epochs and shares of ranks are the trainer's; augmentation is
keyed by (seed, sample, epoch), so that nothing here has a state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from potstill.contracts.batch import Batch, ImageBatch


class Dataset(Protocol):
    """Rows by number. `ids_B` of the batch is `row + epoch * len(self)`: unique per (sample, epoch)."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor, epoch: int | Tensor = 0) -> Batch: ...


def sample_ids(rows: Tensor, epoch: int | Tensor, size: int) -> Tensor:
    return rows.long() + epoch * size


@dataclass
class Images:
    """Images in memory. images [N, C, H, W] float32 (the range is the task's), labels [N] int64."""

    images: Tensor
    labels: Tensor
    augment: Callable[[Tensor, Tensor], Tensor] | None = None  # (images_BCHW, ids_B) -> images, keyed by the ids

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor, epoch: int | Tensor = 0) -> ImageBatch:
        ids = sample_ids(rows, epoch, len(self))
        images = self.images[rows]
        return ImageBatch(ids, self.augment(images, ids) if self.augment else images, self.labels[rows])


@dataclass
class Source:
    """One data source, loaded: what a recipe's `data` becomes.

    kind: images, text, prompts, chat, graphs, points. `train` and `test` are a `Dataset` for images and points, and
    plain rows for the language kinds (strings, prompt dictionaries or message lists), which get their tokenizer later;
    graphs are lists of PyG `Data`.
    """

    name: str
    kind: str
    train: Any
    test: Any
    context: Mapping[str, Any] = field(default_factory=dict)  # what a packaged network must know: classes, size, ...
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # default ModelSpec of a role
    teacher: Mapping[str, Any] | None = None  # how a packaged teacher is trained: steps, batch, lr (TeacherTraining)
    score: Callable[[Any], dict[str, float]] | None = None  # metrics that only this source knows: exact densities, ...
    grade: Callable[[Mapping[str, Any], str], float] | None = None  # how right a completion of a prompt row is, 0 to 1

    def subset(self, size: int | None) -> "Source":
        """The first `size` training rows (the sources shuffle once, with a fixed key)."""
        if size is None:
            return self
        if not 0 < size <= len(self.train):
            from potstill.contracts.errors import DataError

            raise DataError(f"data.size must lie in 1..{len(self.train)} for {self.name}, got {size}.")
        train = self.train
        if isinstance(train, Images):
            train = Images(train.images[:size], train.labels[:size], train.augment)
        elif isinstance(train, Sequence):
            train = train[:size]
        else:
            train = torch.utils.data.Subset(train, range(size))
        return replace(self, train=train)
