"""Several teachers as one: at every position their mixture, or their product of experts, as whole log-probabilities.

A panel is right where an objective wants one distribution. An objective that compares with each teacher and weighs the
divergences is another thing (`objectives.panels`); `divergences.panels` says where the two agree.

K teachers, B rows, N positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.contracts.batch import Batch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError, SignalError
from potstill.contracts.signals import FullLogits, Signal, TokenLogp, check_signals
from potstill.divergences import log_probs
from potstill.divergences.panels import power_mean
from potstill.teachers.local import check_vocabulary
from potstill.teachers.moving import LiveTeacher, follow, moving_state


class Panel:
    """Teachers combined into one distribution: FullLogits are its normalised log-probabilities [N, V].

    weights: one a teacher; or the name of an entry of `batch.extra` that holds a row's weights, [B, K]; None is equal
        ones. They are divided by their sum. A product takes negative ones too, which subtract a teacher.
    combine: "mixture" is sum_k w_k p_k, what any of them would say; "product" is prod_k p_k^w_k / Z, what all agree on.
    temperature: of the teachers' softmax before they are combined; the result, scaled by it, is the combined
        distribution again for an objective that divides by the same number. A product does not depend on it.
    """

    gives: frozenset[type[Signal]] = frozenset({FullLogits, TokenLogp})

    def __init__(
        self,
        teachers: Sequence[Any],
        weights: Sequence[float] | str | None = None,
        combine: Literal["mixture", "product"] = "mixture",
        *,
        temperature: float = 1.0,
    ) -> None:
        if not teachers:
            raise RecipeError("A panel needs at least one teacher.")
        if combine not in ("mixture", "product"):
            raise RecipeError(f"Panel.combine must be mixture or product, got {combine!r}.")
        if weights is not None and not isinstance(weights, str):
            check_weights(weights, len(teachers), negative=combine == "product")
        for teacher in teachers:
            check_signals("A panel", FullLogits, teacher)
        self.teachers, self.weights, self.combine, self.temperature = tuple(teachers), weights, combine, temperature
        self.vocabulary = min(check_vocabulary(_model(teachers[0]), teacher) for teacher in teachers)
        self.tokenizer = _model(teachers[0]).tokenizer
        self.name = f"{combine} of {', '.join(teacher.name for teacher in teachers)}"
        self.state = moving_state(*teachers) or None  # of those that move

    def to(self, device: torch.device | str) -> "Panel":
        for teacher in self.teachers:
            teacher.to(device)
        return self

    @torch.no_grad()
    def score(self, batch: Batch, need: type[Signal]) -> Signal:
        if need not in self.gives:
            raise SignalError(f"{self.name} gives no {need.__name__}.")
        said = [teacher.score(batch, FullLogits).logits[..., : self.vocabulary] for teacher in self.teachers]
        logp = [log_probs(logits.to(said[0].device), self.temperature) for logits in said]
        order = 1.0 if self.combine == "mixture" else 0.0
        combined_NV = power_mean(logp, self._weights(batch, logp[0]), order) * self.temperature
        if need is TokenLogp:
            assert isinstance(batch, TokenBatch)
            return TokenLogp(log_probs(combined_NV).gather(-1, batch.tokens_counted[:, None])[:, 0])
        return FullLogits(combined_NV)

    def after_step(self, student: nn.Module, step: int = 0) -> None:
        follow(student, step, *self.teachers)

    def _weights(self, batch: Batch, like: Tensor) -> Sequence[float] | Tensor | None:
        """[K], or [K, N] where rows differ."""
        if not isinstance(self.weights, str):
            return self.weights
        assert isinstance(batch, TokenBatch)
        return row_weights(batch, self.weights, len(self.teachers)).to(like).T


def row_weights(batch: TokenBatch, name: str, teachers: int) -> Tensor:
    """The weights [N, K] that `batch.extra[name]`, [B, K] as a list or a tensor, gives the counted positions."""
    if name not in batch.extra:
        raise DataError(f"The rows of this batch have no weights of their teachers: extra[{name!r}] is missing.")
    weights_BK = torch.as_tensor(batch.extra[name], device=batch.tokens_BT.device)
    if tuple(weights_BK.shape) != (len(batch), teachers):
        raise DataError(
            f"extra[{name!r}] must hold a weight a row and teacher, {[len(batch), teachers]}, got {list(weights_BK.shape)}."
        )
    return weights_BK[batch.counted_BT.nonzero()[:, 0]]


def check_weights(weights: Sequence[float], teachers: int, negative: bool = False) -> None:
    """One weight a teacher, of a positive sum, and none below 0 unless `negative`."""
    if len(weights) != teachers:
        raise RecipeError(f"There are {len(weights)} weights for {teachers} teachers. Give one a teacher.")
    if not sum(weights) > 0 or (not negative and min(weights) < 0):
        rule = "a positive sum" if negative else "weights of at least 0 and a positive sum"
        raise RecipeError(f"Weights of teachers need {rule}, got {list(weights)}.")


class TrustRegion(Panel):
    """A teacher kept within reach: mixed with the live student, detached. `student_share` of it is the student's.

    combine: "product" mixes logits, (1 - c) z_T + c z_S (SELFCI, arXiv 2605.20258, its "interp", c = 0.3); "mixture" mixes
    probabilities. At 0 it is the teacher, at 1 the student, from which nothing can be learnt.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        *,
        student_share: float = 0.3,
        combine: Literal["mixture", "product"] = "product",
        temperature: float = 1.0,
    ) -> None:
        if not 0 <= student_share < 1:
            raise RecipeError(f"TrustRegion.student_share must lie in [0, 1), got {student_share}.")
        both = (1 - student_share, student_share)
        super().__init__([teacher, LiveTeacher(student)], both, combine, temperature=temperature)
        self.name = f"{teacher.name}, near the student"


def _model(teacher: Any) -> Any:
    """What knows the teacher's tokenizer and vocabulary."""
    model = getattr(teacher, "model", teacher)
    if not hasattr(model, "tokenizer"):
        raise ModelError(f"{teacher.name} has no vocabulary to share with other teachers.")
    return model
