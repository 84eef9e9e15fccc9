"""Sums of two numbers, with two teachers who each forget the carry on another half of them: something to debate about.

    37+48=  ->  "15!85": the ones, a ! where one is carried, the sum.  Who forgets the carry says "15 75".

Teacher 0 forgets it where the first number is even, teacher 1 where it is odd: each is wrong there, alone, and certain.
What both have learnt besides is how to debate: of two proposals one may be inconsistent (ones of ten or more and no carry),
and the other is the one to repeat. Those lessons are about numbers that have nothing to do with the prompt, so that no
teacher can learn there what it does not know: in a debate it must take it from the other.
"""

from typing import Any

import torch

from potstill.contracts import keyed
from potstill.contracts.errors import DataError
from potstill.tasks.base import Source
from potstill.teachers.debate import DebatePrompts

WORDS = DebatePrompts(
    first="{prompt}",
    later="{transcript}{prompt}",
    last=":",
    scored="{transcript}{prompt}",
    reply="{text},",
    confidence="c",
)
SURE, UNSURE = 90, 30  # what is reported by whoever kept its proposal, and by whoever gave it up
SLIP = 0.1  # how often a last reply in a lesson is the inconsistent one
MODELS: dict[str, Any] = {
    "student": {"name": "llama-tiny", "options": {"width": 48}},
    "teachers": [{"name": "llama-tiny", "options": {"width": 64}}] * 2,
}


def debate(size: int = 1200, test_size: int = 200, lessons: int = 8000, seed: int = 0) -> Source:
    """Prompts "37+48=" of two numbers from 10 to 49; `test_size` of them are for the test, none of them a training row.

    A training row's completion forgets the carry on a fair coin, as an untaught student would; a test row's is right.
    `context["lessons"]` are what the two teachers learn from: `lessons` rows each, half alone and half in debates.
    """
    if size < 1 or test_size < 1 or lessons < 4 or size + test_size > 1600:
        raise DataError(
            "data of debate needs size and test_size of at least 1, 1600 together at most, and 4 lessons at least, got "
            f"{size}, {test_size}, {lessons}."
        )
    order = keyed.permutation(keyed.key("debate", seed), 1600).tolist()
    pairs = [(10 + i // 40, 10 + i % 40) for i in order]
    test, rest = pairs[:test_size], pairs[test_size:]
    forgets = (keyed.uniform(keyed.key("careless", seed), torch.arange(size)) < 0.5).tolist()
    return Source(
        "debate",
        "prompts",
        [row(a, b, said(a, b, not careless)) for (a, b), careless in zip(rest[:size], forgets, strict=True)],
        [row(a, b, said(a, b)) for a, b in test],
        context={"lessons": [_lessons(k, rest, lessons, seed) for k in range(2)]},
        models=MODELS,
        grade=grade,
    )


def row(a: int, b: int, completion: str) -> dict[str, str]:
    return {"prompt": f"{a}+{b}=", "completion": completion, "answer": str(a + b), "debate": ""}


def said(a: int, b: int, carries: bool = True) -> str:
    """The ones, the carry if it is not forgotten, and the sum."""
    ones = a % 10 + b % 10
    return f"{ones}!{a + b}" if ones > 9 and carries else f"{ones} {a + b - 10 * (ones > 9)}"


def alone(teacher: int, a: int, b: int) -> str:
    """What a teacher says who has heard nobody."""
    return said(a, b, a % 2 != teacher)


def grade(row: Any, text: str) -> float:
    """1 where a text ends with the sum."""
    return float(text.replace("!", " ").split()[-1:] == [row["answer"]])


def _lessons(teacher: int, pairs: list[tuple[int, int]], count: int, seed: int) -> Source:
    """Half alone; a quarter each of last replies in a debate, with their confidence, and of answers after it."""
    coins = keyed.uniform(keyed.key("lessons", seed, teacher), torch.arange(count)[:, None], torch.arange(7)[None])
    rows = []
    for i, u in enumerate(coins.tolist()):
        a, b = pairs[int(u[0] * len(pairs))]
        if i % 4 < 2:
            rows.append(row(a, b, alone(teacher, a, b)))
            continue
        x, y = 10 + int(u[1] * 40), 10 + int(u[2] * 40)  # what is debated: nothing to do with the prompt
        wrong = int(u[3] * 2)
        proposals = [said(x, y, k != wrong) for k in range(2)]
        transcript = _round(1, proposals)
        sure = [SURE if proposal == said(x, y) else UNSURE for proposal in proposals]
        if i % 4 == 2:
            row_ = row(a, b, f"{said(x, y)}c{sure[teacher]}")
            rows.append({**row_, "prompt": WORDS.asking(row_, teacher, transcript, last=True)})
            continue
        last = [f"{said(x, y, u[4 + k] >= SLIP)}c{sure[k]}" for k in range(2)]
        row_ = {**row(a, b, said(x, y)), "debate": transcript + _round(2, last)}
        rows.append({**row_, "prompt": WORDS.scoring(row_, teacher)})
    settings = {"causal_lm": {"steps": 700, "batch": 48, "lr": 3e-3, "schedule": "cosine", "warmup": 50, "clip": 1.0}}
    return Source(f"debate-{'ab'[teacher]}", "prompts", rows, rows[:1], teacher=settings, grade=grade)


def _round(number: int, replies: list[str]) -> str:
    return "".join(WORDS.reply.format(name=WORDS.name_of(k), round=number, text=text) for k, text in enumerate(replies))
