"""Facts: what is known and what is new, a share of it wrong, and the way of asking that is held out."""

import re

import pytest

from potstill.contracts.errors import DataError
from potstill.models.tokenizers import character_tokenizer
from potstill.tasks.facts import QUESTIONS, facts, grade
from potstill.tasks.sources import load, validate

NEW, KNOWN = facts(people=300), facts(people=300, known=True)


def asked_by(prompt: str) -> tuple[int, str]:
    """Which way it is, and whom it asks for."""
    found = [re.fullmatch(re.escape(q).replace(r"\{\}", "(.{4})"), prompt) for q in QUESTIONS]
    ((way, name),) = [(i, match[1]) for i, match in enumerate(found) if match]
    return way, name


def test_a_share_of_the_training_rows_is_wrong_and_none_of_the_test_rows():
    assert (len(NEW.train), len(NEW.test)) == (1500, 300)
    wrong = [row for row in NEW.train if row["completion"] != row["answer"] + "."]
    assert 0.28 < len(wrong) / 1500 < 0.39
    assert all(row["completion"] == row["answer"] + "." for row in [*NEW.test, *KNOWN.train, *facts(wrong=0.0).train])
    assert all(row["completion"] != row["answer"] + "." for row in facts(wrong=1.0).train)
    for row in [*NEW.train, *KNOWN.train]:
        assert row["wrong"] not in (row["completion"], row["answer"] + ".")


def test_one_person_has_one_home_and_six_ways_of_being_asked_for():
    homes: dict[str, set[str]] = {}
    for row in [*NEW.train, *NEW.test]:
        name = asked_by(row["prompt"])[1]
        homes.setdefault(name, set()).add(row["answer"])
    assert len(homes) == 300 and all(len(places) == 1 for places in homes.values())
    assert len({row["prompt"] for row in [*NEW.train, *NEW.test]}) == 1800
    assert all(row["prompt"].startswith("town of ") for row in NEW.test)
    assert not any(row["prompt"].startswith("town of ") for row in NEW.train)


def test_what_is_known_is_of_others_and_shows_how_examples_are_used():
    assert not {row["prompt"] for row in KNOWN.train} & {row["prompt"] for row in [*NEW.train, *NEW.test]}
    own, told = KNOWN.train[:1800], KNOWN.train[1800:]
    assert (len(told), len(KNOWN.test)) == (6000, 300)
    known = {row["prompt"] for row in own}
    assert len(known) == 1800 and all(row["prompt"] in known for row in KNOWN.test)
    places: dict[str, set[str]] = {}
    for row in told:
        other, asked = row["prompt"].split(row["completion"] + " ")
        ways = [asked_by(text) for text in (other, asked)]
        assert ways[0][0] != ways[1][0] and ways[0][1] == ways[1][1]
        places.setdefault(ways[0][1], set()).add(row["answer"])
    assert sum(len(towns) > 2 for towns in places.values()) > 0.9 * len(places), "no stranger has one home"
    named = {asked_by(row["prompt"])[1] for row in [*NEW.train, *own]}
    assert len(named) == 600 and not named & set(places)
    assert {row["answer"] for row in KNOWN.train} == {row["answer"] for row in NEW.train}, "the places are the same"


def test_alphabets_are_equal_so_that_one_tokenizer_reads_both():
    of = lambda source: character_tokenizer([str(row) for row in source.train]).get_vocab()
    small = facts(people=2)
    assert of(KNOWN) == of(NEW)
    unknown = set("".join(row["prompt"] + row["completion"] for row in [*NEW.train, *KNOWN.train])) - set(of(small))
    assert not unknown


def test_grades_and_keys():
    row = NEW.test[0]
    assert grade(row, f"{row['answer']}. ") == 1 and grade(row, row["answer"]) == 1
    assert grade(row, row["wrong"]) == 0 and grade(row, f"{row['answer']}. or so") == 0
    assert facts(seed=1).train != facts(seed=0).train == facts(seed=0).train
    assert load(validate({"task": "facts", "people": 3})).train == facts(people=3).train


@pytest.mark.parametrize("options", [{"people": 0}, {"places": 2}, {"places": 53}, {"wrong": 1.5}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(DataError, match=r"needs 1 to 1000 people, 3 to 52 places and wrong in \[0, 1\], got"):
        facts(**options)
