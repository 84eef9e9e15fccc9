"""Generated reasoning problems with exact answers, from reasoning-gym: kind "prompts", each row with what scores it."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from potstill.contracts import keyed
from potstill.contracts.errors import DataError, did_you_mean, require
from potstill.tasks.base import Source

MODELS: dict[str, dict[str, Any]] = {"teacher": {"name": "smollm2"}, "student": {"from": "teacher", "layers": 6}}
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?"


def reasoning_gym(
    name: str = "chain_sum",
    size: int = 2000,
    test_size: int = 200,
    instruction: str = "",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Source:
    """`size` problems of one of reasoning-gym's tasks, and `test_size` others that no training row repeats.

    Rows have prompt (the question, then `instruction` on a line of its own), answer, task and entry (what the task's
    own scorer needs). `options` are those of the task: min_terms, max_digits, ...

    Raises:
        DataError: unknown task or option, or a task with too few different questions for the sizes asked.
    """
    if size < 1 or test_size < 1:
        raise DataError(f"data.size and data.test_size must be positive, got {size} and {test_size}.")
    options = dict(options or {})
    train = _rows(name, options, keyed.key(seed, "reasoning", name, "train"), size, instruction)
    seen = {row["prompt"] for row in train}
    pool = _rows(name, options, keyed.key(seed, "reasoning", name, "test"), 3 * test_size, instruction)
    fresh = {row["prompt"]: row for row in reversed(pool) if row["prompt"] not in seen}
    test = [row for row in pool if fresh.get(row["prompt"]) is row][:test_size]
    if len(test) < test_size:
        raise DataError(
            f"reasoning_gym {name} has too few different questions: {len(test)} of {test_size} test rows are not among "
            f"the {size} training rows. Ask for fewer, or make it harder with data.options."
        )
    return Source(f"reasoning-{name}", "prompts", train, test, models=MODELS, score=accuracy, grade=score)


def _rows(name: str, options: dict[str, Any], seed: int, size: int, instruction: str) -> list[dict[str, Any]]:
    gym = require("reasoning_gym", "reasoning")
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise DataError(f"reasoning_gym has no task {name}.{did_you_mean(name, DATASETS)}")
    known = set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"}
    for option in options:
        if option not in known:
            raise DataError(f"data.options.{option} is not an option of {name}.{did_you_mean(option, known)}")
    try:
        made = gym.create_dataset(name, size=size, seed=seed & 0x7FFFFFFF, **options)
        entries = [made[i] for i in range(size)]
    except (AssertionError, TypeError, ValueError) as cause:
        raise DataError(f"reasoning_gym {name} refuses its options {options}: {cause}") from cause
    tail = f"\n{instruction}" if instruction else ""
    return [
        {"prompt": entry["question"] + tail, "answer": str(entry["answer"]), "task": name, "entry": entry}
        for entry in entries
    ]


@cache
def _scorer(name: str) -> Any:
    return require("reasoning_gym", "reasoning").create_dataset(name, size=1, seed=0)


def extract(text: str, answer: str) -> str:
    """The final answer in a model's text, in the form of the right one.

    What stands in the last <answer> tag, else in the last \\boxed{}, else behind the last "####" or "answer is" or
    "answer:", else everything. Where the right answer is a number, the last number of that.
    """
    found = (
        re.findall(r"<answer>(.*?)(?:</answer>|$)", text, re.S)
        or re.findall(r"\\boxed\{([^{}]*)\}", text)
        or re.findall(r"####[ \t]*(.+)", text)
        or re.findall(r"answer(?: is|:)[ \t]*(.+)", text, re.I)
        or [text]
    )
    said = found[-1].strip().strip("*").strip()
    if re.fullmatch(NUMBER, answer.strip()):
        numbers = re.findall(NUMBER, said)
        return numbers[-1].replace(",", "") if numbers else said
    return said.removesuffix(".").strip()


def score(row: Mapping[str, Any], text: str) -> float:
    """1.0 where the text's final answer is right by the task's own exact scorer, else 0.0: no part marks."""
    said = extract(text, row["answer"])
    if said == row["answer"]:
        return 1.0
    return float(_scorer(row["task"]).score_answer(said, row["entry"]) >= 1.0)


def accuracy(answered: Iterable[tuple[Mapping[str, Any], str]]) -> dict[str, float]:
    """Share of (row, text) pairs that are right."""
    scores = [score(row, text) for row, text in answered]
    if not scores:
        raise DataError("accuracy needs at least one answered row.")
    return {"accuracy": sum(scores) / len(scores)}
