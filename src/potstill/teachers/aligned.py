"""A teacher with another tokenizer: it reads the student's text in its own tokens, and answers by spans of text."""

from typing import Any, cast

import torch
from torch import Tensor

from potstill.contracts.batch import Batch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, SignalError
from potstill.contracts.signals import FullLogits, HiddenAndHead, Signal, SpanLogp, TokenLogp
from potstill.divergences import log_probs, span_logp
from potstill.models.alignment import Aligner, shared_entries, spelled, token_bytes
from potstill.models.tokenizers import pad_id
from potstill.rollouts.local import completions_of, joined
from potstill.tasks.tokens import prompt_batch, prompt_of


class AlignedTeacher:
    """Another teacher, here or served, of a vocabulary that is not the student's.

    It reads each prompt as its own tokenizer and chat template write it, then the text of the student's completion. Spans
    of that text at whose ends both have a token's end are what it gives: a log-probability each (`SpanLogp`), and, where a
    span is one token on both sides and the teacher gives whole rows, those over the tokens that both vocabularies spell
    alike, with the rest as one. What the student wrote last and makes no whole character has no span.
    """

    gives = frozenset({SpanLogp})

    def __init__(self, teacher: Any, tokenizer: Any, *, length: int = 4096) -> None:
        """tokenizer: the student's. length: the longest row that the teacher reads, in its own tokens."""
        self.teacher, self.length = teacher, length
        self.name = f"{teacher.name} by spans of text"
        self.temperature: float = getattr(teacher, "temperature", 1.0)
        self.model = getattr(teacher, "model", teacher)
        self.theirs, self.own = self.model.tokenizer, tokenizer
        self.aligner = Aligner(teacher_tokenizer=self.theirs, student_tokenizer=tokenizer)
        self.pieces = token_bytes(tokenizer)
        self.whole = bool(teacher.gives & {HiddenAndHead, FullLogits})
        if not self.whole and TokenLogp not in teacher.gives:
            raise SignalError(f"{teacher.name} gives no tokens' log-probabilities, and spans are made of them.")
        self.shared = shared_entries(self.theirs, tokenizer) if self.whole else None

    def to(self, device: torch.device | str) -> "AlignedTeacher":
        self.teacher.to(device)
        return self

    @torch.no_grad()
    def score(self, batch: Batch, need: type[Signal] = SpanLogp) -> SpanLogp:
        if need is not SpanLogp or not isinstance(batch, TokenBatch):
            raise SignalError(f"{self.name} gives spans of a token batch alone, not {need.__name__}.")
        texts, spelt_BT, seen, offsets = self._seen(batch)
        spans = self.aligner(
            texts,
            teacher={"input_ids": seen.tokens_BT, "attention_mask": seen.counted_BT, **offsets},
            student={"input_ids": batch.tokens_BT, "attention_mask": spelt_BT},
        ).to(batch.tokens_BT.device)
        logp_N, rows_NV = self._scored(seen)
        logp_S = span_logp(seen.placed(logp_N), spans.teacher_N2, spans.row_N)
        shared = self.shared
        if rows_NV is None or shared is None:
            return SpanLogp(logp_S, spans.student_N2, spans.row_N)
        single_S = spans.single_N
        chosen_M = seen.numbers_BT[spans.row_N[single_S], spans.teacher_N2[single_S, 0]]
        rows = lambda where: shared.of_teacher(rows_NV(chosen_M[where])).detach()
        return SpanLogp(logp_S, spans.student_N2, spans.row_N, single_S, rows, shared.student_K)

    def _seen(self, batch: TokenBatch) -> tuple[list[str], Tensor, TokenBatch, dict[str, Any]]:
        """The completions as texts, the tokens that spell them, the batch as the teacher reads it, and where its tokens lie
        in the texts, if known."""
        if "rows" not in batch.extra:
            raise DataError(
                f"{self.name} writes its own prompts from rows, and this batch has none. Use prompts: gkd, with "
                "on_policy 0 for the data's own completions."
            )
        ends, fast = {self.own.eos_token_id} - {None}, self.theirs.is_fast
        prompts, completions, texts = [], [], []
        places: list[Any] = []
        spelt_BT = batch.counted_BT.clone()
        for b, (row, said) in enumerate(zip(batch.extra["rows"], completions_of(batch), strict=True)):
            before = batch.attention_BT[b] & (batch.counted_BT[b].cumsum(0) == 0)
            shown = self.own.decode(batch.tokens_BT[b][before], skip_special_tokens=True)
            text, count = spelled([self._piece(i) for i in said])
            spelt_BT[b, batch.counted_BT[b].nonzero()[count:, 0]] = False  # behind the last whole character
            encoded = self.theirs(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
            tokens = list(encoded["input_ids"])
            if said and said[-1] in ends and self.theirs.eos_token_id is not None:
                tokens.append(self.theirs.eos_token_id)
            prompt = prompt_of(row, self.theirs, shown)
            if len(prompt) + len(tokens) > self.length:
                raise DataError(
                    f"{self.name}: a row has {len(prompt) + len(tokens)} of its tokens, and {self.length} are allowed. "
                    "Shorten prompts or completions (data.prompt_length, method.rollouts.max_new_tokens)."
                )
            prompts.append(prompt)
            completions.append(tokens)
            texts.append(text)
            places.append(encoded["offset_mapping"] if fast else None)
        rows = prompt_batch(prompts, self.theirs, batch.ids_B)
        seen = joined(rows, completions, pad_id(self.theirs), extra=dict(batch.extra))
        if None in places:
            return texts, spelt_BT, seen, {}
        front, total = rows.tokens_BT.shape[1], seen.tokens_BT.shape[1]
        offsets = [[(0, 0)] * front + [*place, *[(0, 0)] * (total - front - len(place))] for place in places]
        return texts, spelt_BT, seen, {"offset_mapping": offsets}

    def _piece(self, token: int) -> bytes | None:
        return self.pieces[token] if token < len(self.pieces) else None

    def _scored(self, seen: TokenBatch) -> tuple[Tensor, Any]:
        """The teacher's log p of its counted tokens [N], and the rows of log p [M, V] at some of them, where it has them."""
        if not self.whole:
            return cast(TokenLogp, self.teacher.score(seen, TokenLogp)).logp_N, None
        need = HiddenAndHead if HiddenAndHead in self.teacher.gives else FullLogits
        signal = self.teacher.score(seen, need)
        tokens_N = seen.tokens_counted
        pick = signal.logits if isinstance(signal, HiddenAndHead) else lambda where: signal.logits[where]
        rows = lambda where: log_probs(pick(where))
        logp = [
            rows(where).gather(-1, tokens_N[where, None])[:, 0]
            for where in torch.arange(len(tokens_N), device=tokens_N.device).split(64)
        ]
        return torch.cat([torch.zeros(0, device=tokens_N.device), *logp]), rows


def check_tokenizers(teacher: Any, student: Any) -> None:
    """Refuse to align what needs no alignment: token distributions say more than spans."""
    if teacher.tokenizer is not None and teacher.tokenizer.get_vocab() == student.tokenizer.get_vocab():
        raise ModelError(
            f"{teacher.name} and {student.name} have one vocabulary, so nothing is to be aligned. Leave teacher.aligned out."
        )
