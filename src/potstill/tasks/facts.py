"""Where people live: facts to be learnt by heart from a source that errs, by a model that knows other people already."""

from collections.abc import Mapping
from typing import Any

import torch

from potstill.contracts import keyed
from potstill.contracts.errors import DataError
from potstill.tasks.base import Source

QUESTIONS = ("where is {}? ", "{} lives in ", "home of {}: ", "find {}; ", "{} is from ", "town of {}: ")
SYLLABLES = [c + v for c in "cdfghlmnprstv" for v in "aeio"]  # letters that every row has, so that alphabets are equal
STRANGERS = 20  # rows of strangers for each of the known people
MODELS: dict[str, dict[str, Any]] = {"student": {"name": "llama-tiny"}}
TEACHER = {"causal_lm": {"steps": 1000, "batch": 64, "lr": 3e-3, "schedule": "cosine", "warmup": 50, "clip": 1.0}}


def facts(people: int = 40, places: int = 20, wrong: float = 1 / 3, known: bool = False, seed: int = 0) -> Source:
    """Prompts such as "where is ceno? ", completed by a place; everybody is asked for in six ways.

    Training rows leave the last way out and test rows have no other, so that the fact itself must be learnt. A share `wrong`
    of the training completions names another place: `answer` is right, `wrong` is a third place. With `known` the people are
    others, about whom all is right, asked for in every way, the test rows among them; and as training rows come strangers,
    each after an example that tells where they live this time ("home of ceno: rilat. where is ceno? "). It is what a model
    knows and must keep, and where it has learnt to use what it is shown.
    """
    if not (1 <= people <= 1000 and 3 <= places <= len(SYLLABLES) and 0 <= wrong <= 1):
        raise DataError(
            f"data of facts needs 1 to 1000 people, 3 to {len(SYLLABLES)} places and wrong in [0, 1], got {people}, {places} "
            f"and {wrong}."
        )
    key = keyed.key("facts", seed)
    second = _picks(keyed.key(key, "places"), places, len(SYLLABLES))
    first = keyed.permutation(keyed.key(key, "first syllables"), len(SYLLABLES)).tolist()
    towns = [f"{SYLLABLES[a]}{SYLLABLES[b]}t" for a, b in zip(first, second)]
    pairs = keyed.permutation(keyed.key(key, "people"), len(SYLLABLES) ** 2).tolist()
    names = [f"{SYLLABLES[n // len(SYLLABLES)]}{SYLLABLES[n % len(SYLLABLES)]}" for n in pairs]
    mine = names[1000 : 1000 + people] if known else names[:people]
    kind = "known" if known else "new"
    homes = _picks(keyed.key(key, kind, "homes"), people, places)
    ways = len(QUESTIONS)
    errs = keyed.uniform(keyed.key(key, "errs"), torch.arange(people * ways)).tolist()
    elsewhere = _picks(keyed.key(key, "elsewhere"), people * ways, places - 1)
    third = _picks(keyed.key(key, "third"), people * ways, places - 2)
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for i in range(people):
        for w, question in enumerate(QUESTIONS):
            n, home = i * ways + w, homes[i]
            others = [town for town in range(places) if town != home]
            last = w == ways - 1
            said = others[elsewhere[n]] if errs[n] < wrong and not known and not last else home
            never = [town for town in others if town != said][third[n] % (places - 2)]
            row = {
                "prompt": question.format(mine[i]),
                "completion": f"{towns[said]}.",
                "answer": towns[home],
                "wrong": f"{towns[never]}.",
            }
            if known or not last:
                train.append(row)
            if last:
                test.append(row)
    if known:
        train += _strangers(names[2000:], towns, STRANGERS * people, key)
    return Source(f"facts-{kind}", "prompts", train, test, models=MODELS, teacher=TEACHER, grade=grade)


def _strangers(names: list[str], towns: list[str], count: int, key: int) -> list[dict[str, str]]:
    """People who live elsewhere each time, after an example of them: the only way to answer is to read it."""
    draw = lambda what, of: _picks(keyed.key(key, "strangers", what), count, of)
    first, shift = draw("first way", len(QUESTIONS)), draw("second way", len(QUESTIONS) - 1)
    rows = []
    for n, (who, home, a, b) in enumerate(zip(draw("name", len(names)), draw("home", len(towns)), first, shift)):
        told, asked = (QUESTIONS[w % len(QUESTIONS)].format(names[who]) for w in (a, a + 1 + b))
        said, wrong = (f"{towns[t % len(towns)]}." for t in (home, home + 1 + n % (len(towns) - 1)))
        rows.append({"prompt": f"{told}{said} {asked}", "completion": said, "answer": said[:-1], "wrong": wrong})
    return rows


def _picks(key: int, count: int, of: int) -> list[int]:
    return [int(u * of) for u in keyed.uniform(key, torch.arange(count)).tolist()]


def grade(row: Mapping[str, Any], text: str) -> float:
    """1 where the text names the right place, and nothing else."""
    return float(text.strip().removesuffix(".") == row["answer"])
