"""Sums with written-out steps: small enough to learn in minutes, with an exact scorer and two styles of answering."""

import re
from collections.abc import Mapping
from typing import Any

from potstill.contracts import keyed
from potstill.contracts.errors import DataError
from potstill.tasks.base import Source

MODELS: dict[str, dict[str, Any]] = {
    "teacher": {"name": "llama-small", "options": {"layers": 2, "width": 96}},
    "student": {"name": "llama-small", "options": {"layers": 2, "width": 64}},
}


def arithmetic(
    size: int = 4000, test_size: int = 200, terms: int = 3, largest: int = 20, terse: float = 0.5, seed: int = 0
) -> Source:
    """Prompts such as "12+7+5=", completed step by step: "12+7=19. 19+5=24. The answer is 24."

    A share `terse` of the completions leaves the steps out, so that a model of them writes now this way, now that.
    Rows have prompt, completion, answer, and `shortcut`, the answer without its steps: another way to solve the same.
    `test_size` rows are of problems that no training row holds.
    """
    if size < 1 or test_size < 1 or terms < 2 or largest < 2 or not 0 <= terse <= 1:
        raise DataError(
            "data of arithmetic needs size and test_size of at least 1, terms and largest of at least 2, terse in [0, 1], got "
            f"{size}, {test_size}, {terms}, {largest}, {terse}."
        )
    import torch

    draws = keyed.uniform(
        keyed.key("arithmetic", seed), torch.arange(4 * (size + test_size))[:, None], torch.arange(terms)[None]
    )
    problems = list(dict.fromkeys(map(tuple, (1 + draws * largest).long().clamp(max=largest).tolist())))
    if len(problems) < size + test_size:
        raise DataError(
            f"arithmetic has only {len(problems)} different problems here. Ask for fewer rows, or larger numbers."
        )
    chance = keyed.uniform(keyed.key("terse", seed), torch.arange(size + test_size)).tolist()
    rows = [_row(numbers, u < terse) for numbers, u in zip(problems[: size + test_size], chance, strict=True)]
    settings = {"causal_lm": {"steps": 2500, "batch": 64, "lr": 2e-3, "schedule": "cosine", "warmup": 30, "clip": 1.0}}
    return Source(
        "arithmetic", "prompts", rows[test_size:], rows[:test_size], models=MODELS, teacher=settings, grade=grade
    )


def _row(numbers: tuple[int, ...], terse: bool) -> dict[str, str]:
    steps, total = [], numbers[0]
    for n in numbers[1:]:
        steps.append(f"{total}+{n}={total + n}.")
        total += n
    last = f"The answer is {total}."
    return {
        "prompt": "+".join(map(str, numbers)) + "=",
        "completion": last if terse else " ".join([*steps, last]),
        "answer": str(total),
        "shortcut": last,
    }


def grade(row: Mapping[str, Any], text: str) -> float:
    """1 where the last "answer is N" of a text names the right number."""
    found = re.findall(r"answer is (-?\d+)", text)
    return float(bool(found) and found[-1] == row["answer"])
