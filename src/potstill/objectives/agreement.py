"""Distillation from a teacher that is asked in several contexts, and two terms that go with it.

The K other contexts are scored once a rollout, on the tokens that stand there, by one teacher: `context_logp_KBT` of the
batch, from which a weighting reads how far they agree (`weighting.Agreement`). N counted positions in B rows of T tokens, V
vocabulary, D features; p the teacher, q the student.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.contracts.batch import Batch, TokenBatch
from potstill.contracts.errors import RecipeError, SignalError
from potstill.contracts.signals import HiddenAndHead, TokenLogp
from potstill.contracts.terms import Term
from potstill.divergences import Clipped, Exact, log_probs
from potstill.divergences.family import one_of, promoted
from potstill.objectives.states import TokenStates, TokenTerm, by_rows, teacher_logp
from potstill.objectives.tokens import TokenDistillation
from potstill.teachers import PrivilegedTeacher

Context = Callable[[TokenBatch], TokenBatch]


def context_logp(teacher: Any, contexts: Sequence[Context], batch: TokenBatch) -> Tensor:
    """log p of the batch's counted tokens in each context, at temperature 1; 0 elsewhere. [K, B, T], float32."""
    out = torch.zeros(len(contexts), *batch.counted_BT.shape, device=batch.tokens_BT.device)
    for logp_BT, context in zip(out, contexts, strict=True):
        signal = PrivilegedTeacher(teacher, context).score(batch, TokenLogp)
        assert isinstance(signal, TokenLogp)
        logp_BT[batch.counted_BT] = signal.logp_N.to(out)
    return out


class ContextDistillation(TokenDistillation):
    """`TokenDistillation` whose teacher is asked in further contexts, and whose divergence may be clipped at a quantile.

    contexts: K of them (none, or at least 2), scored by the teacher in the place of its own context.
    quantile: a position's divergence counts up to this quantile of the batch's, above which it has no gradient.
    """

    def __init__(
        self,
        *args: Any,
        contexts: Sequence[Context] = (),
        quantile: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if len(contexts) == 1:
            raise RecipeError("One context has nothing to agree with: give at least 2, or none.")
        self.contexts = tuple(contexts)
        self.asked = self.teacher.teacher if isinstance(self.teacher, PrivilegedTeacher) else self.teacher
        if self.contexts and (self.asked is None or TokenLogp not in self.asked.gives):
            raise SignalError(
                f"Contexts are compared by TokenLogp, which {getattr(self.asked, 'name', 'no teacher')} does not give."
            )
        if quantile is not None and not 0.0 < quantile < 1.0:
            raise RecipeError(f"The quantile to clip at must lie strictly between 0 and 1, got {quantile}.")
        if quantile is not None and not isinstance(self.estimator, Exact):
            raise RecipeError(f"{type(self.estimator).__name__} has no divergence to clip. Choose an exact one.")
        self.quantile, self.unclipped = quantile, self.estimator

    @property
    def couples(self) -> Literal["position", "group", "batch"]:  # type: ignore[override]
        return "batch" if self.quantile is not None else super().couples

    def collect(self, batch: Batch, step: int) -> TokenBatch:
        out = super().collect(batch, step)
        if self.contexts:
            out.extra = {**out.extra, "context_logp_KBT": context_logp(self.asked, self.contexts, out)}
        return out

    def _divergence(self, states: TokenStates, step: int) -> Tensor:
        if self.quantile is not None:
            values_N = self._values(states)
            limit = values_N.quantile(self.quantile).item() if len(values_N) else 0.0
            assert isinstance(self.unclipped, Exact)
            clipped = Clipped(self.unclipped.divergence, max(limit, 1e-12), per="position")
            self.estimator = Exact(clipped, self.unclipped.support)
        return super()._divergence(states, step)

    @torch.no_grad()
    def _values(self, states: TokenStates) -> Tensor:
        """The divergence at each position, unclipped. [N]."""
        teacher_logits = states.teacher_logits()

        def values(rows_MV: Tensor, where: slice) -> Tensor:
            logp = {"student_logp": rows_MV, "teacher_logp": teacher_logits[where]}
            logp = {name: log_probs(logits, self.temperature) for name, logits in logp.items()}
            return self.unclipped.per_position(**logp, tokens_N=states.tokens_N[where])

        return by_rows(values, states.student_logits())


@dataclass(frozen=True)
class ContrastiveTerm(TokenTerm):
    """max(0, margin + |log q - log p| - |log q - log p-|) at the tokens there: nearer to p than to a misled teacher.

    against: gives p-, the same tokens after a negative context. log q alone has a gradient, with the sign of either gap
    (it can push a token's probability down as well as up), and none where p- is farther than p by the margin.
    Source: UniSD, arXiv 2605.06597, Eqs. 4-5 and its code (coefficient 0.1, margin 0.5, at the sampling temperature).
    """

    against: Any
    coefficient: float = 0.1
    margin: float = 0.5
    temperature: float = 1.0
    name = "contrast"

    def __call__(self, states: TokenStates) -> Term:
        if "log_ratio" not in states.seen:
            raise SignalError(
                "ContrastiveTerm needs the teacher's log-probabilities of the tokens: use a live teacher."
            )
        log_q_N = states.student_logp(self.temperature)
        log_p_N = log_q_N.detach() + states.seen["log_ratio"]
        negative_N = teacher_logp(self.against, states.batch, self.temperature, states.vocabulary).to(log_q_N)
        gap_N = (self.margin + (log_q_N - log_p_N).abs() - (log_q_N - negative_N).abs()).clamp_min(0.0)
        return Term((states.share_N * gap_N).sum(), states.count, self.coefficient, unit=states.unit)


@dataclass(frozen=True)
class FeatureTerm(TokenTerm):
    """Squared distance of the last hidden states of student and teacher: the mean over features, or their sum.

    over "mean" is UniSD's code, "sum" its Eq. 6 (the squared norm); they differ by the factor D. Source: arXiv 2605.06597.
    """

    coefficient: float = 0.1
    over: Literal["mean", "sum"] = "mean"
    name = "features"

    def __post_init__(self) -> None:
        one_of(self, "over", self.over, ("mean", "sum"))

    def __call__(self, states: TokenStates) -> Term:
        if not isinstance(states.signal, HiddenAndHead) or states.signal.hidden_ND.shape != states.hidden_ND.shape:
            raise SignalError(
                "FeatureTerm compares hidden states of one width, which this teacher does not give. Use the student's own "
                "start or average as the teacher, or leave features out."
            )
        square_ND = (promoted(states.hidden_ND) - promoted(states.signal.hidden_ND)).square()
        distance_N = square_ND.mean(-1) if self.over == "mean" else square_ND.sum(-1)
        return Term((states.share_N * distance_N).sum(), states.count, self.coefficient, unit=states.unit)
