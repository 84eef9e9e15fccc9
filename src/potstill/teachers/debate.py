"""A debate of teachers: they answer a prompt, see what the others said, answer again and say how sure they are.

    round 1:  h_1^k ~ p_k(. | s)          round r > 1:  h_r^k ~ p_k(. | s, all h of rounds before r)         (Eq. 5)
    w_k = exp(c_k / 100 / tau) / sum_j exp(c_j / 100 / tau),  c_k the confidence at the end of the last reply   (Eqs. 6-7)

It is blind: no teacher sees the student's answer or a reference. What comes out is privileged context for the teachers,
the transcript, and their weights at each row. Source: MAD-OPD, arXiv 2605.01347. The words of the prompts are this
library's; a reply without a readable confidence makes the weights of its row equal, a teacher that says nothing in the
last round has weight 0 there (all weight to those who do), and where nobody speaks the weights are equal again.

K speakers, B rows.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError, RecipeError
from potstill.contracts.spec import Spec
from potstill.divergences.panels import confidence_weights
from potstill.models.causal import CausalLM
from potstill.rollouts.local import completions_of, sample
from potstill.tasks.tokens import prompt_batch, prompt_tokens
from potstill.teachers.privileged import PrivilegedContext

Speaker = Callable[[Sequence[str], Tensor, int], list[str]]  # (prompts, ids_B, seed) -> replies, "" where it fails


class DebatePrompts(Spec):
    """The words around a debate. {prompt}, {transcript} and {name} (the teacher's own) may stand in all but `reply`."""

    first: str = "{prompt}"
    later: str = (
        "{prompt}\n\nSeveral experts work on this. They have said so far:\n{transcript}\n"
        "You are {name}. Weigh every argument, your own too, and give the best answer you can."
    )
    last: str = "\nClose with a line 'Confidence: N', N a whole number from 0 (a guess) to 100 (certain)."  # added
    scored: str = (
        "{prompt}\n\nExperts have discussed this:\n{transcript}\n"
        "You are {name}. With the discussion in mind, answer the question itself and do not speak of the discussion."
    )
    reply: str = "[{name}, round {round}]\n{text}\n"  # how one reply stands in the transcript
    confidence: str = Field("confidence", min_length=1)  # the word in front of the number, in any case
    names: list[str] | None = None  # of the speakers; None: Expert A, Expert B, ...

    @field_validator("first", "later", "last", "scored", "reply")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        known = ("name", "round", "text") if info.field_name == "reply" else ("prompt", "transcript", "name")
        try:
            value.format(**dict.fromkeys(known, ""))
        except (KeyError, IndexError, ValueError) as cause:
            raise ValueError(
                f"only {', '.join('{' + k + '}' for k in known)} may stand in braces, got {value!r}"
            ) from cause
        return value

    def name_of(self, speaker: int) -> str:
        return self.names[speaker] if self.names is not None else f"Expert {chr(ord('A') + speaker)}"

    def asking(self, row: Mapping[str, Any], speaker: int, transcript: str, last: bool) -> str:
        """What a speaker is asked in a round; the first shows no transcript."""
        form = (self.later if transcript else self.first) + (self.last if last else "")
        return form.format(prompt=row["prompt"], transcript=transcript, name=self.name_of(speaker))

    def scoring(self, row: Mapping[str, Any], speaker: int) -> str:
        """The prompt under which a speaker scores the student's tokens: the plain one where nothing was said."""
        if not row.get("debate"):
            return str(row["prompt"])
        return self.scored.format(prompt=row["prompt"], transcript=row["debate"], name=self.name_of(speaker))


def reported_confidence(text: str, word: str = "confidence") -> float:
    """The last whole number from 0 to 100 behind the word, over 100; NaN where there is none."""
    found = re.findall(re.escape(word) + r"\W{0,5}(\d+)", text, re.I)
    return int(found[-1]) / 100 if found and int(found[-1]) <= 100 else math.nan


def reply_weights(replies: Sequence[str], word: str = "confidence", temperature: float = 1.0) -> list[float]:
    """The weights [K] that the last replies of K speakers give them, of sum 1."""
    alive = [k for k, text in enumerate(replies) if text.strip()] or list(range(len(replies)))
    confidence = torch.tensor([reported_confidence(replies[k], word) for k in alive], dtype=torch.float64)
    weights = dict(zip(alive, confidence_weights(confidence, temperature).tolist(), strict=True))
    return [weights.get(k, 0.0) for k in range(len(replies))]


@dataclass(frozen=True)
class LocalSpeaker:
    """A causal language model that replies. Prompts of more than `length` tokens it cannot read: its reply is empty.

    sampling: options of `rollouts.local.sample`. Replies are keyed by (seed, row, position): batches change nothing.
    """

    model: CausalLM
    length: int
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"max_new_tokens": 64})

    def __call__(self, prompts: Sequence[str], ids_B: Tensor, seed: int) -> list[str]:
        tokenizer = self.model.tokenizer
        rows = [prompt_tokens({"prompt": prompt}, tokenizer, None) for prompt in prompts]
        read = [b for b, row in enumerate(rows) if 0 < len(row) <= self.length]
        said = [""] * len(rows)
        if read:
            asked = prompt_batch([rows[b] for b in read], tokenizer, ids_B.cpu()[read])
            out = completions_of(sample(self.model, asked, seed=seed, **self.sampling))
            for b, text in zip(read, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
                said[b] = text
        return said


@dataclass(frozen=True)
class Debate:
    """`rounds` rounds among the speakers about each row of a batch of prompts, before anyone has answered it.

    The same prompts come back: their rows as mappings with the transcript under "debate", and `extra["weights"]`, a list
    of K for each row. temperature: tau of the confidences; None leaves the weights out (they are then the objective's).
    """

    speakers: Sequence[Speaker]
    rounds: int = 2
    prompts: DebatePrompts = field(default_factory=DebatePrompts)
    temperature: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.speakers or self.rounds < 1:
            raise RecipeError(
                f"A debate needs a speaker and a round at least, got {len(self.speakers)} and {self.rounds}."
            )
        if self.prompts.names is not None and len(self.prompts.names) != len(self.speakers):
            raise RecipeError(f"There are {len(self.prompts.names)} names for {len(self.speakers)} speakers.")

    def __call__(self, batch: PromptBatch, seed: int) -> PromptBatch:
        rows = [stated(row) for row in batch.extra.get("rows", ())]
        if len(rows) != len(batch):
            raise DataError('A debate needs the prompts as text: a row for each in extra["rows"].')
        transcripts, replies = [""] * len(rows), [[""] * len(rows)]
        for r in range(self.rounds):
            last = r + 1 == self.rounds
            replies = [
                speak(
                    [self.prompts.asking(row, k, h, last) for row, h in zip(rows, transcripts, strict=True)],
                    batch.ids_B,
                    keyed.key(seed, "debate", r, k),
                )
                for k, speak in enumerate(self.speakers)
            ]
            for k, said in enumerate(replies):
                for b, text in enumerate(said):
                    if text.strip():
                        name = self.prompts.name_of(k)
                        transcripts[b] += self.prompts.reply.format(name=name, round=r + 1, text=text)
        debated = [{**row, "debate": h} for row, h in zip(rows, transcripts, strict=True)]
        extra = {**batch.extra, "rows": debated}
        if self.temperature is not None:
            each = zip(*replies, strict=True)
            extra["weights"] = [reply_weights(said, self.prompts.confidence, self.temperature) for said in each]
        return replace(batch, extra=extra, memo={})


def transcript_context(prompts: DebatePrompts, speaker: int, tokenizer: Any, length: int) -> PrivilegedContext:
    """What a speaker sees when it scores a debated row; a transcript that does not fit into `length` tokens is left out."""

    def write(row: Mapping[str, Any], completion: str) -> str:
        text = prompts.scoring(row, speaker)
        return text if len(prompt_tokens({"prompt": text}, tokenizer, None)) <= length else str(row["prompt"])

    return PrivilegedContext(tokenizer, write, length)


def stated(row: Any) -> dict[str, Any]:
    """A row as a mapping with its prompt as text: a conversation up to the last user turn becomes one text."""
    if isinstance(row, Mapping):
        return dict(row)
    if isinstance(row, str):
        raise DataError("A debate is about prompts, and this data is plain text: give prompts or conversations.")
    turns = max(i for i, message in enumerate(row) if message["role"] == "user") + 1
    text = row[0]["content"] if turns == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in row[:turns])
    return {"prompt": text, "messages": row}
