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
    size: int = 4000,
    test_size: int = 200,
    terms: int = 3,
    largest: int = 20,
    terse: float = 0.5,
    wrong: float = 0.0,
    seed: int = 0,
) -> Source:
    """Prompts such as "12+7+5=", completed step by step: "12+7=19. 19+5=24. The answer is 24."

    A share `terse` of the completions leaves the steps out, so that a model of them writes now this way, now that.
    A share `wrong` of the training completions miscounts one step, and goes on from it.
    Rows have prompt, completion, answer, `solution`, all steps and right, and `shortcut`, the answer without its steps:
    other ways to solve the same.
    `test_size` rows are of problems that no training row holds.
    """
    if size < 1 or test_size < 1 or terms < 2 or largest < 2 or not 0 <= terse <= 1 or not 0 <= wrong <= 1:
        raise DataError(
            "data of arithmetic needs size and test_size of at least 1, terms and largest of at least 2, terse and wrong in "
            f"[0, 1], got {size}, {test_size}, {terms}, {largest}, {terse}, {wrong}."
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
    miscounts = keyed.uniform(keyed.key("wrong", seed), torch.arange(size + test_size)[:, None], torch.arange(3)[None])
    rows = []
    for i, numbers in enumerate(problems[: size + test_size]):
        u, place, by = miscounts[i].tolist()
        off = (1 + int(place * (terms - 1)), 1 + int(9 * by)) if i >= test_size and u < wrong else None
        rows.append(_row(numbers, chance[i] < terse, off))
    settings = {"causal_lm": {"steps": 2500, "batch": 64, "lr": 2e-3, "schedule": "cosine", "warmup": 30, "clip": 1.0}}
    return Source(
        "arithmetic", "prompts", rows[test_size:], rows[:test_size], models=MODELS, teacher=settings, grade=grade
    )


def _row(numbers: tuple[int, ...], terse: bool, off: tuple[int, int] | None = None) -> dict[str, str]:
    """off: (which number is added wrongly, by how much too many)."""
    right, total = _steps(numbers, None)
    written, said = _steps(numbers, off)
    last = "The answer is {}."
    return {
        "prompt": "+".join(map(str, numbers)) + "=",
        "completion": last.format(said) if terse else " ".join([*written, last.format(said)]),
        "answer": str(total),
        "solution": " ".join([*right, last.format(total)]),
        "shortcut": last.format(total),
    }


def _steps(numbers: tuple[int, ...], off: tuple[int, int] | None) -> tuple[list[str], int]:
    steps, total = [], numbers[0]
    for i, n in enumerate(numbers[1:], start=1):
        after = total + n + (off[1] if off and off[0] == i else 0)
        steps.append(f"{total}+{n}={after}.")
        total = after
    return steps, total


def grade(row: Mapping[str, Any], text: str) -> float:
    """1 where the last "answer is N" of a text names the right number."""
    found = re.findall(r"answer is (-?\d+)", text)
    return float(bool(found) and found[-1] == row["answer"])
