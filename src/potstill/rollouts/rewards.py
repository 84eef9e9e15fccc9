"""Verifiable rewards: a completion is compared with what its row knows, or scored by the source's own function."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError

Row = Mapping[str, Any]

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_MARKED = re.compile(r"####\s*([^\n]+)")
_FRACTION = re.compile(r"\\d?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?(?!\w)")


class Reward:
    """Rows (what the data knows of each prompt) and completions as text -> rewards [B], float32."""

    def score(self, row: Row, text: str) -> float:
        raise NotImplementedError

    def __call__(self, rows: Sequence[Row], texts: Sequence[str]) -> Tensor:
        scores = [float(self.score(row, text)) for row, text in zip(rows, texts, strict=True)]
        rewards = torch.tensor(scores, dtype=torch.float32)
        if not rewards.isfinite().all():
            i = int((~rewards.isfinite()).nonzero()[0, 0])
            raise DataError(f"The reward of completion {i} is {scores[i]}: a score must be a finite number.")
        return rewards


def _field(row: Row, name: str) -> str:
    if name not in row:
        raise DataError(
            f"A row has no {name} to check completions against; it has {', '.join(sorted(row)) or 'nothing'}."
        )
    return str(row[name])


@dataclass(frozen=True)
class ExactMatch(Reward):
    """1 where the completion is the row's answer, up to outer and repeated white space (and case, if `fold`)."""

    answer: str = "answer"  # the row's field
    fold: bool = False

    def score(self, row: Row, text: str) -> float:
        said, wanted = " ".join(text.split()), " ".join(_field(row, self.answer).split())
        return float(said.casefold() == wanted.casefold() if self.fold else said == wanted)


@dataclass(frozen=True)
class NumericAnswer(Reward):
    r"""1 where the completion's final number is the answer's: the last \boxed{}, else after ####, else the last number.

    Numbers are compared as exact fractions (1,000 = 1000.0, 0.5 = 1/2 = \frac{1}{2}) up to `tolerance`, relative.
    """

    answer: str = "answer"
    tolerance: float = 0.0

    def score(self, row: Row, text: str) -> float:
        wanted = final_number(_field(row, self.answer))
        if wanted is None:
            raise DataError(f"The row's {self.answer} {row[self.answer]!r} holds no number; use ExactMatch.")
        said = final_number(text)
        return float(said is not None and abs(said - wanted) <= Fraction(self.tolerance) * abs(wanted))


@dataclass(frozen=True)
class Scored(Reward):
    """The source's own scorer: (row, completion) -> number."""

    scorer: Callable[[Row, str], float]

    def score(self, row: Row, text: str) -> float:
        return self.scorer(row, text)


def final_number(text: str) -> Fraction | None:
    """The number that a text ends on, None where there is none."""
    for marked in (_BOXED.findall(text), _MARKED.findall(text)):
        if marked:
            text = marked[-1]
            break
    text = _FRACTION.sub(r"\1/\2", text).replace("$", "").replace("\\%", "")
    found = _NUMBER.findall(text)
    if not found:
        return None
    above, _, below = found[-1].replace(",", "").partition("/")
    below_value = Fraction(below or 1)
    return Fraction(above) / below_value if below_value else None


def rows_of(batch: TokenBatch) -> list[Row]:
    """What the batch's `extra` lists say of each row."""
    size = len(batch)
    lists = {name: values for name, values in batch.extra.items() if isinstance(values, list) and len(values) == size}
    return [{name: values[i] for name, values in lists.items()} for i in range(size)]
