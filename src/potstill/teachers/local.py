"""Teachers whose weights are in this process: a trained model, the student's frozen start, and any teacher seeing a
privileged context."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from potstill.contracts.batch import Batch, ImageBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, SignalError
from potstill.contracts.signals import FullLogits, HiddenAndHead, Signal, TokenLogp
from potstill.models.build import freeze

SIGNALS: dict[str, frozenset[type[Signal]]] = {
    "causal_lm": frozenset({FullLogits, HiddenAndHead, TokenLogp}),
    "image_classifier": frozenset({FullLogits}),
}


class LocalTeacher:
    """A model adapter, frozen and in evaluation mode. Held outside the objective's modules: never trained or saved."""

    def __init__(self, model: Any, name: str | None = None) -> None:
        self.model: Any = freeze(model)
        self.name = name or model.name
        self.gives = SIGNALS[model.kind]

    def to(self, device: torch.device | str) -> "LocalTeacher":
        self.model.to(device)
        return self

    @torch.no_grad()
    def score(self, batch: Batch, need: type[Signal]) -> Signal:
        """The signal at the batch's positions: the N counted tokens of a TokenBatch, the B images of an ImageBatch."""
        if need not in self.gives:
            raise SignalError(f"teacher {self.name} gives no {need.__name__}.")
        if isinstance(batch, TokenBatch):
            hidden = self.model.counted_hidden(batch)
            if need is HiddenAndHead:
                return self.model.with_head(hidden)
            logits = self.model.head(hidden)
            if need is TokenLogp:
                logp = logits.float().log_softmax(-1)
                return TokenLogp(logp.gather(-1, batch.tokens_counted[:, None])[:, 0])
            return FullLogits(logits)
        if isinstance(batch, ImageBatch):
            return FullLogits(self.model(batch.images))
        raise SignalError(f"teacher {self.name} cannot score a {type(batch).__name__}.")


class FrozenStart(LocalTeacher):
    """The student as it was when training began."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(copy.deepcopy(student), name="frozen start of the student")


class PrivilegedTeacher(LocalTeacher):
    """Another teacher, here or served, that sees more: it scores the same counted tokens after a context of its own.

    context: makes the privileged TokenBatch of a batch (a solution before the prompt, feedback, a transcript); or None,
    where the batches carry it as `batch.privileged`. Row by row, the counted tokens must be the same.
    """

    def __init__(self, teacher: Any, context: Callable[[TokenBatch], TokenBatch] | None = None) -> None:
        self.teacher, self.context = teacher, context
        self.temperature: float = getattr(teacher, "temperature", 1.0)
        self.name, self.gives = f"{teacher.name} with privileged context", teacher.gives

    @property
    def model(self) -> Any:  # type: ignore[override]
        """What knows the vocabulary: the model, or the teacher itself where that is served."""
        return getattr(self.teacher, "model", self.teacher)

    @property
    def state(self) -> nn.Module | None:
        """What the teacher must keep where it moves (`teachers.moving`)."""
        return getattr(self.teacher, "state", None)

    def after_step(self, student: nn.Module, step: int = 0) -> None:
        if self.state is not None:
            self.teacher.after_step(student, step)

    def to(self, device: torch.device | str) -> "PrivilegedTeacher":
        self.teacher.to(device)
        return self

    def score(self, batch: Batch, need: type[Signal]) -> Signal:
        assert isinstance(batch, TokenBatch)
        seen = self.context(batch) if self.context else batch.privileged
        if seen is None:
            raise DataError(f"{self.name} needs batches with a privileged context; these have none.")
        if not torch.equal(seen.tokens_counted, batch.tokens_counted):
            raise DataError(f"{self.name}: the privileged rows hold other counted tokens than the student's.")
        return cast(Signal, self.teacher.score(seen, need))


def check_vocabulary(student: Any, teacher: Any) -> int:
    """How many vocabulary entries student and teacher share, refusing pairs whose tokens mean different things.

    Models of one family may pad their heads to different sizes; with equal tokenizers the smaller is compared.
    """
    a, b = student.tokenizer, getattr(teacher, "model", teacher).tokenizer
    same = a is None or b is None or a is b or a.get_vocab() == b.get_vocab()
    size_a, size_b = student.vocabulary, getattr(teacher, "model", teacher).vocabulary
    if not same or ((a is None or b is None) and size_a != size_b):
        raise ModelError(
            f"Student and teacher have different vocabularies ({size_a} and {size_b} entries). Token distributions can be "
            "compared only over one tokenizer: choose a student of the teacher's family, or student: {from: teacher, layers: N}."
        )
    return min(size_a, size_b)
