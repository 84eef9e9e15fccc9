"""The debated sums: who is wrong where, what their lessons tell and what they keep to themselves."""

import pytest

from potstill import recipe as recipes
from potstill.contracts.errors import DataError
from potstill.tasks.debate import SURE, UNSURE, WORDS, alone, debate, grade, said


def test_carrying_and_forgetting():
    assert (said(37, 48), said(37, 48, carries=False)) == ("15!85", "15 75")
    assert said(37, 41) == said(37, 41, carries=False) == "8 78"
    assert said(49, 49) == "18!98" and said(15, 15, carries=False) == "10 20"


def test_each_teacher_is_wrong_on_its_own_half():
    for a in (36, 37):
        for b in (48, 41):
            right = [alone(k, a, b) == said(a, b) for k in range(2)]
            assert right == ([True, True] if b == 41 else [a % 2 == 1, a % 2 == 0])


def test_the_score_is_that_of_the_last_number():
    row = {"answer": "85"}
    assert [grade(row, text) for text in ("15!85", "5 85", "15 75", "85 15", "", "15!85c90", "185")] == [
        1,
        1,
        0,
        0,
        0,
        0,
        0,
    ]


def test_rows_are_disjoint_and_keyed():
    source, again, other = debate(300, 50, 40), debate(300, 50, 40), debate(300, 50, 40, seed=1)
    prompts = [row["prompt"] for row in source.train + source.test]
    assert len(set(prompts)) == 350
    assert source.train == again.train and source.context["lessons"][0].train == again.context["lessons"][0].train
    assert source.train != other.train
    assert all(grade(row, row["completion"]) == 1 for row in source.test)
    carried = [row for row in source.train if int(row["completion"].replace("!", " ").split()[0]) > 9]
    share = sum(grade(row, row["completion"]) for row in carried) / len(carried)
    assert 0.4 < share < 0.6, "a fair coin"
    assert all(grade(row, row["completion"]) == 1 for row in source.train if row not in carried)
    taught = {row["prompt"][-6:] for lessons in source.context["lessons"] for row in lessons.train}
    assert taught.isdisjoint(row["prompt"] for row in source.test), "the test rows are in no lesson"


@pytest.mark.parametrize("teacher", [0, 1])
def test_lessons(teacher):
    rows = debate(lessons=2000).context["lessons"][teacher].train
    kinds = {"alone": [], "last": [], "after": []}
    for row in rows:
        kinds["alone" if "," not in row["prompt"] else "last" if row["prompt"].endswith(":") else "after"].append(row)
    assert [len(kind) for kind in kinds.values()] == [1000, 500, 500]
    for row in kinds["alone"]:
        assert row["completion"] == alone(teacher, *map(int, row["prompt"][:-1].split("+")))
    unsure = 0
    for row in kinds["last"]:
        *proposals, _ = row["prompt"].split(",")
        answer, _, confidence = row["completion"].partition("c")
        kept = proposals[teacher] == answer
        assert answer in proposals and ("!" in answer or int(answer.split()[0]) < 10), "the consistent one is repeated"
        assert int(confidence) == (SURE if kept else UNSURE)
        unsure += not kept
    assert 0.15 < unsure / 500 < 0.3, "about half of the carries, which are 45 in 100"
    for row in kinds["after"]:
        assert row["prompt"].startswith(row["debate"]) and row["debate"].count("c") == 2
        assert "!" in row["completion"] or int(row["completion"].split()[0]) < 10
        assert row["completion"] in row["debate"].split(",")
    slips = [row["debate"].count("!") < 3 for row in kinds["after"] if "!" in row["completion"]]
    assert 0.1 < sum(slips) / len(slips) < 0.3, "one of two last replies, each once in ten"
    assert sum(grade(row, row["completion"]) for row in kinds["after"]) < 25, (
        "the debated numbers are not those of the prompt"
    )


def test_the_recipe_debates_in_the_words_of_the_lessons():
    plan = recipes.resolve(recipes.read("mad_opd"))
    assert plan.config.prompts == WORDS
    longest = max(
        len(row["prompt"]) + len(row["completion"]) + 1
        for lessons in debate().context["lessons"]
        for row in lessons.train
    )
    assert longest <= plan.data.length and plan.config.context >= longest - 8


def test_what_cannot_be_made_is_refused():
    for options in ({"size": 0}, {"test_size": 0}, {"lessons": 3}, {"size": 1500, "test_size": 101}):
        with pytest.raises(DataError, match="1600 together at most"):
            debate(**options)
