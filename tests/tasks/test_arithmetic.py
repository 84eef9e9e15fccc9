"""Sums with written-out steps: what is right, what is said, and what is wrong on purpose."""

import re

import pytest

from potstill.contracts.errors import DataError
from potstill.tasks.arithmetic import arithmetic, grade


def said(text: str) -> int:
    return int(re.findall(r"answer is (\d+)", text)[-1])


def test_solutions_are_right_step_by_step_and_test_problems_are_new():
    source = arithmetic(size=50, test_size=10, terms=4, terse=0.5)
    assert not {row["prompt"] for row in source.train} & {row["prompt"] for row in source.test}
    for row in source.train + source.test:
        numbers = list(map(int, row["prompt"].removesuffix("=").split("+")))
        assert int(row["answer"]) == sum(numbers) == said(row["solution"]) == said(row["shortcut"])
        steps = re.findall(r"(\d+)\+(\d+)=(\d+)\.", row["solution"])
        assert len(steps) == 3 and all(int(a) + int(b) == int(c) for a, b, c in steps)
        assert row["completion"] in (row["solution"], row["shortcut"])
        assert grade(row, row["completion"]) == 1.0 and grade(row, "The answer is 0.") == 0.0


def test_a_share_of_the_training_completions_miscounts_one_step_and_goes_on():
    source = arithmetic(size=400, test_size=50, terms=3, terse=0.0, wrong=0.5)
    off = [said(row["completion"]) - int(row["answer"]) for row in source.train]
    assert 0.4 < sum(d != 0 for d in off) / len(off) < 0.6
    assert set(off) <= set(range(10))
    assert all(said(row["completion"]) == int(row["answer"]) for row in source.test)
    for row in source.train:
        steps = re.findall(r"(\d+)\+(\d+)=(\d+)\.", row["completion"])
        assert sum(int(a) + int(b) != int(c) for a, b, c in steps) == (said(row["completion"]) != int(row["answer"]))
        assert steps[1][0] == steps[0][2]  # from the miscount on
        assert said(row["solution"]) == int(row["answer"])


def test_the_same_seed_gives_the_same_rows_whatever_is_wrong():
    rows = [arithmetic(size=20, test_size=5, wrong=wrong).train for wrong in (0.0, 1.0)]
    assert [a["prompt"] for a in rows[0]] == [b["prompt"] for b in rows[1]]
    assert all(a["completion"] != b["completion"] for a, b in zip(*rows, strict=True))


@pytest.mark.parametrize("options", [{"wrong": 1.5}, {"terse": -1}, {"terms": 1}, {"size": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(DataError, match="data of arithmetic needs"):
        arithmetic(**options)


def test_too_few_problems_is_said_plainly():
    with pytest.raises(DataError, match="has only .* different problems"):
        arithmetic(size=100, test_size=10, terms=2, largest=3)
