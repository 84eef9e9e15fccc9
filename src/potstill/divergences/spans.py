"""Distillation between two vocabularies, on spans of text at whose ends both tokenizations have a boundary.

A span's log-probability is the sum of its tokens', so over a text that is covered by spans they add up to the text's. With
them as [N], `SampledReverseKL()` and `FDivergence.estimate` serve as on tokens; `event_divergence` compares each span with
everything else, and `Shared` whole rows where a span is one token on both sides.

Exact: each span's probability under its own tokenization, given that of what came before; the sum over the text; the
comparison of the events named. Approximate: taking it for the probability of the text of the span. That has other
segmentations too, which are not counted, and a token decides more than its text: a tokenizer that has "ab" says, by
emitting "a", that no b follows, where one without it says that in the next span. For the same reason where a span ends
may depend on what comes next: sampled gradients are unbiased when the advantages of all spans of a text multiply all of
its tokens, and not quite when a span answers for itself and later ones only.

N spans, P positions (any leading shape), B texts, T tokens, V vocabulary, K shared entries. p teacher, q student.
"""

import math

import torch
from torch import Tensor

from potstill.contracts.errors import ModelError
from potstill.divergences.family import FDivergence, promoted
from potstill.divergences.supports import Support, log_mass

INF = math.inf


def span_logp(token_logp_BT: Tensor, ranges_N2: Tensor, row_N: Tensor | None = None) -> Tensor:
    """sum of log p(token) over the tokens [start, end) of each span, [B, T] -> [N], in nats, in float32 or better.

    `token_logp_BT[b, t]` is that of token t itself. row_N: the row of each span; without it all lie in one row [T]. A
    range without tokens gives 0.
    """
    logp = promoted(token_logp_BT)
    logp, row_N = (logp[None], ranges_N2.new_zeros(len(ranges_N2))) if row_N is None else (logp, row_N)
    if logp.dim() != 2 or ranges_N2.shape != (len(row_N), 2):
        raise ModelError(
            f"span_logp needs log-probabilities [B, T] with ranges [N, 2] and rows [N] (or [T] without rows), got "
            f"{list(token_logp_BT.shape)}, {list(ranges_N2.shape)} and {list(row_N.shape)}."
        )
    start_N, end_N = ranges_N2.unbind(1)
    wrong = (start_N < 0) | (end_N < start_N) | (end_N > logp.shape[1]) | (row_N < 0) | (row_N >= len(logp))
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ModelError(
            f"span_logp: span {n} is tokens {start_N[n]} to {end_N[n]} of row {row_N[n]}, outside log-probabilities of "
            f"shape {list(logp.shape)}. Align the tokens that were scored."
        )
    length_N = end_N - start_N
    span_M = torch.arange(len(row_N), device=logp.device).repeat_interleave(length_N)  # M tokens in spans
    first_N = row_N * logp.shape[1] + start_N - (length_N.cumsum(0) - length_N)
    token_M = first_N[span_M] + torch.arange(len(span_M), device=logp.device)
    return logp.new_zeros(len(row_N)).index_add(0, span_M, logp.flatten()[token_M])


def complement_logp(logp: Tensor) -> Tensor:
    """log(1 - exp(logp)), elementwise, without cancellation near 0 or 1; -inf, with zero gradient, from 1 on."""
    logp = promoted(logp)
    certain, likely = logp >= 0, logp > -math.log(2)
    small = torch.log1p(-logp.masked_fill(likely, -INF).exp())
    large = torch.log(-torch.expm1(logp.masked_fill(certain, -1.0)))
    return torch.where(likely, large, small).masked_fill(certain, -INF)


def event_divergence(divergence: FDivergence, *, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    """The divergence of the pairs (p, 1 - p) and (q, 1 - q): a span (or token) against everything else. [*P] -> [*P].

    A coarsening of what can happen, so at most the divergence over the outcomes themselves.
    """
    return divergence(teacher_logp=_event(teacher_logp), student_logp=_event(student_logp))


def _event(logp: Tensor) -> Tensor:
    rest = complement_logp(logp)
    return torch.stack([logp.to(rest.dtype), rest], -1)


class Shared(Support):
    """The outcomes that two vocabularies share, and the rest of each as one outcome: [*P, V] and [*P, V'] -> [*P, K + 1].

    teacher_K, student_K: the ids of the same K outcomes on each side. Both results are distributions, of the next token
    being one of these or another, whatever else the two vocabularies hold. No dataclass, since no recipe can write it:
    it is made from two tokenizers.
    """

    def __init__(self, *, teacher_K: Tensor, student_K: Tensor) -> None:
        if teacher_K.dim() != 1 or teacher_K.shape != student_K.shape:
            raise ModelError(
                f"Shared pairs K ids of the teacher with K of the student, got {list(teacher_K.shape)} and "
                f"{list(student_K.shape)}."
            )
        for whose, ids in (("teacher", teacher_K), ("student", student_K)):
            if len(ids.unique()) < len(ids):
                raise ModelError(f"Shared: an id of the {whose} stands twice, so its mass would count twice. Drop one.")
        self.teacher_K, self.student_K = teacher_K, student_K
        self._least = [int(ids.max()) + 1 if len(ids) else 0 for ids in (teacher_K, student_K)]

    def of_teacher(self, logp: Tensor) -> Tensor:
        """The teacher's side alone, [*P, V] -> [*P, K + 1]."""
        return shared_rows(logp, self.teacher_K)

    def __repr__(self) -> str:
        return f"Shared({len(self.teacher_K)} outcomes)"

    def __call__(self, *, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        for whose, logp, least in zip(("teacher", "student"), (teacher_logp, student_logp), self._least):
            if logp.shape[-1] < least:
                raise ModelError(
                    f"Shared: the {whose}'s rows have {logp.shape[-1]} outcomes, but ids go up to {least - 1}. "
                    "Teacher and student may be swapped, or the tokenizer is another model's."
                )
        return shared_rows(teacher_logp, self.teacher_K), shared_rows(student_logp, self.student_K)


def shared_rows(logp: Tensor, ids_K: Tensor) -> Tensor:
    """One side of `Shared`: the outcomes named, and the rest as one. [*P, V] -> [*P, K + 1]."""
    logp, ids_K = promoted(logp), ids_K.to(logp.device)
    rest = log_mass(logp.index_fill(-1, ids_K, -INF))  # summed, not 1 - kept: exact where nearly all is shared
    return torch.cat([logp.index_select(-1, ids_K), rest.unsqueeze(-1)], -1)
