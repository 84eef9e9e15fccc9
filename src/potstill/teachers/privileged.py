"""Contexts that a teacher sees and the student does not: a solution, demonstrations, feedback, a transcript.

A context rewrites the prompt of each row and keeps the completion, token by token, so that the counted positions of both
batches are the same ones in the same order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError
from potstill.rollouts.local import completions_of, joined
from potstill.tasks.tokens import pad_id, prompt_batch, prompt_tokens
from potstill.teachers.contexts import solution

Write = Callable[[Any, str], str]


@dataclass(frozen=True)
class PrivilegedContext:
    """`context(batch)`: the batch's completions after other prompts, for a `PrivilegedTeacher`.

    tokenizer: the teacher's (of the student's vocabulary). write: a prompt row and the student's completion as text ->
    what the teacher is asked, in words; a chat template, where the tokenizer has one, is put around it, as around the
    student's (`chat` says otherwise). length: the longest such prompt, in tokens.
    """

    tokenizer: Any
    write: Write
    length: int = 1024
    chat: bool | None = None

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        if "rows" not in batch.extra:
            raise DataError("A privileged context is written from prompt rows, and this batch has none. Use prompts.")
        completions = completions_of(batch)
        prompts = []
        for row, completion in zip(batch.extra["rows"], completions, strict=True):
            said = self.tokenizer.decode(completion, skip_special_tokens=True)
            tokens = prompt_tokens(self.write(row, said), self.tokenizer, self.chat)
            if not 0 < len(tokens) <= self.length:
                raise DataError(
                    f"A privileged prompt has {len(tokens)} tokens, and between 1 and {self.length} are allowed. "
                    "Raise the context's length, or leave such rows out of the data."
                )
            prompts.append(tokens)
        rows = prompt_batch(prompts, self.tokenizer, batch.ids_B)
        return joined(rows, completions, pad_id(self.tokenizer), extra=dict(batch.extra))


@dataclass(frozen=True)
class Solution:
    """Writes the prompt, the row's solution (its `field`) and an instruction to solve it again in one's own way.

    Source: OPSD, arXiv 2601.18734, whose teacher sees problem, reference solution and such an instruction; the words here
    are our own.
    """

    field: str = "completion"
    template: str = (
        "{prompt}\nA correct solution: {solution}\nWith it understood, solve the problem in your own words.\n{prompt}"
    )

    def __call__(self, row: Any, completion: str) -> str:
        shown = solution(row, self.field)
        return self.template.format(prompt=row["prompt"], solution=shown)
