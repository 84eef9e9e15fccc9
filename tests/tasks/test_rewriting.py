"""The rewriting world: its rule by hand, its grader, and its refusals."""

import pytest

from potstill.contracts.errors import DataError
from potstill.tasks.rewriting import grade, rewriting, rewritten


def test_the_rule_by_hand():
    assert rewritten("cadbe", [0.9] * 5) == "dahzf"
    assert rewritten("cadbe", [0.0] * 5, exceptions=False) == "daewf"
    assert rewritten("nabaa", [0.3] * 5) == "caxaa"  # the ring closes; a marker and a free letter stay what they are
    assert rewritten("anamc", [0.0] * 5) == "afaed"


def test_rows_follow_the_rule_and_its_shares():
    source = rewriting(size=500, test_size=50, letters=10, exceptions=0.1, free=0.15)
    letters = "".join(row["prompt"][1:-1] for row in source.train)
    assert letters.count("a") / len(letters) == pytest.approx(0.1, abs=0.02)
    assert letters.count("b") / len(letters) == pytest.approx(0.15, abs=0.02)
    train = {row["prompt"] for row in source.train}
    assert len(train) == 500
    assert not train & {row["prompt"] for row in source.test}
    for row in source.train:
        word, said = row["prompt"][1:-1], row["completion"]
        assert row["prompt"] == f"!{word}>"
        assert grade(row, said) == 1.0
        behind = [i for i in range(1, 10) if word[i - 1] == "a" and word[i] not in "ab"]
        assert [i for i in range(10) if said[i] != row["mistaken"][i]] == behind
        assert grade(row, row["mistaken"]) == float(not behind)


def test_a_free_letter_may_become_any_choice_and_nothing_else():
    row = {"prompt": "!cb>", "answer": "dw"}
    assert [grade(row, text) for text in ("dw", "dz", "dd", "ew", "d", "dww", "")] == [1, 1, 0, 0, 0, 0, 0]


def test_hopeless_prompts_are_told_and_answered_at_random():
    source = rewriting(size=300, test_size=20, hopeless=0.7)
    lost = [row for row in source.train if row["prompt"][0] == "?"]
    assert len(lost) / 300 == pytest.approx(0.7, abs=0.08)
    assert all(grade(row, row["answer"]) == 1.0 for row in lost)
    assert {len(row["answer"]) for row in lost} == {4}
    by_rule = [rewritten(row["prompt"][1:-1], [0.0] * 12)[:4] == row["answer"] for row in lost]
    assert sum(by_rule) <= 1
    assert rewriting(size=300, test_size=20, hopeless=0.7).train == source.train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size and test_size of at least 1"),
        ({"exceptions": 0.6, "free": 0.5}, "together at most 1"),
        ({"hopeless": 1.5}, r"hopeless is a share in \[0, 1\], got 1.5"),
        ({"letters": 2, "size": 5000}, "different words here. Ask for fewer rows, or longer words"),
    ],
)
def test_what_cannot_be_made_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        rewriting(**options)
