"""Token distillation from several teachers: a divergence to each, then their weighted sum.

    L = mean over positions of sum_k w_k D(p_k, q)

This is not the divergence to the teachers' mixture: under the forward KL the two have one gradient, under the reverse KL
the sum has that of their product, and Jensen-Shannon has no such teacher (`divergences.panels`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, PromptBatch, TokenBatch
from potstill.contracts.errors import RecipeError
from potstill.objectives.tokens import TokenDistillation
from potstill.teachers import follow, moving_state
from potstill.teachers.debate import Debate
from potstill.teachers.local import check_vocabulary
from potstill.teachers.panel import check_weights, row_weights


class PanelDistillation(TokenDistillation):
    """TokenDistillation with several teachers of one vocabulary.

    weights: one a teacher, as they are (None: equal, of sum 1), or the name of the entry of `batch.extra` that holds a
        row's, [B, K]. A teacher of weight 0 is not looked at.
    debate: held about each batch of prompts before they are answered; its weights are then `extra["weights"]`.
    What is seen of a position (for weightings, metrics and extras) is the weighted mean over the teachers; extras that ask
    for a teacher's logits get the first one's. Teachers that move are told of each update of the student.
    """

    def __init__(
        self,
        student: Any,
        teachers: Sequence[Any],
        *args: Any,
        weights: Sequence[float] | str | None = None,
        debate: Debate | None = None,
        **options: Any,
    ) -> None:
        if not teachers:
            raise RecipeError("A panel needs at least one teacher.")
        if weights is not None and not isinstance(weights, str):
            check_weights(weights, len(teachers))
        super().__init__(student, teachers[0], *args, **options)
        for teacher in teachers[1:]:
            self._check_teacher(teacher)
        self.shared = min(check_vocabulary(student, teacher) for teacher in teachers)
        self.teachers, self.debate = tuple(teachers), debate
        self.weights = [1 / len(teachers)] * len(teachers) if weights is None else weights
        self.others = [t for t in teachers[1:] if getattr(t, "state", None) is not self.teacher_state]
        self.moving = moving_state(*self.others)

    def collect(self, batch: Batch, step: int) -> TokenBatch:
        if self.debate is not None and isinstance(batch, PromptBatch):
            batch = self.debate(batch, keyed.key(self.seed, "debate", step))
        return super().collect(batch, step)

    def _compare(
        self, teacher: Any, hidden_ND: Tensor, batch: TokenBatch, tokens_N: Tensor, weights_N: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum over positions and teachers; `teacher`, the first, is one of them."""
        panel_NK = self._panel_weights(batch, hidden_ND)
        share_NK = panel_NK / panel_NK.sum(1, keepdim=True)
        total, seen = 0.0 * hidden_ND.sum(), dict[str, Tensor]()
        for one, w_N, share_N in zip(self.teachers, panel_NK.unbind(1), share_NK.unbind(1), strict=True):
            if not w_N.any():
                continue
            part, found = super()._compare(
                one, hidden_ND, batch, tokens_N, w_N if weights_N is None else weights_N * w_N
            )
            total = total + part
            for name, values_N in found.items():
                seen[name] = seen.get(name, 0.0) + share_N * values_N
        return total, seen

    def _panel_weights(self, batch: TokenBatch, like: Tensor) -> Tensor:
        if isinstance(self.weights, str):
            return row_weights(batch, self.weights, len(self.teachers)).to(like)
        return torch.tensor(self.weights).to(like).expand(len(like), -1)

    def after_step(self, player: str, step: int) -> None:
        super().after_step(player, step)
        follow(self.student, step, *self.others)
