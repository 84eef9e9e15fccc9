"""Generated problems: their answers are right, the scorer is exact, and train and test do not meet."""

import pytest

from potstill.contracts.errors import DataError
from potstill.tasks.reasoning import accuracy, extract, reasoning_gym, score

pytestmark = pytest.mark.needs("reasoning_gym")


def test_chain_sums_are_right_and_split():
    source = reasoning_gym(size=300, test_size=100)
    assert source.kind == "prompts"
    for row in source.train + source.test:
        expression = row["entry"]["metadata"]["expression"]
        assert row["prompt"].endswith(f"{expression} =")
        assert int(row["answer"]) == sum(int(term) for term in expression.replace("- ", "-").replace("+ ", "").split())
    prompts = [row["prompt"] for row in source.test]
    assert len(set(prompts)) == 100
    assert not set(prompts) & {row["prompt"] for row in source.train}
    assert reasoning_gym(size=300, test_size=100).train == source.train
    assert reasoning_gym(size=300, test_size=100, seed=1).train != source.train
    assert reasoning_gym(size=20, test_size=5).train == source.train[:20]


def test_no_test_question_is_a_training_question():
    """Sums of two digits: some two hundred questions, so that independent draws of 60 and 40 meet for certain."""
    source = reasoning_gym(size=60, test_size=40, options={"min_terms": 2, "max_terms": 2, "max_digits": 1})
    assert not {row["prompt"] for row in source.test} & {row["prompt"] for row in source.train}


def test_options_and_instruction_reach_the_task():
    source = reasoning_gym(
        size=20, test_size=5, instruction="Say the number.", options={"min_terms": 2, "max_terms": 2}
    )
    assert all(row["prompt"].endswith(" =\nSay the number.") for row in source.train)
    assert all(row["entry"]["metadata"]["num_terms"] == 2 for row in source.train)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("First 3 + 4 = 7, then 7 * 6 = 42", "42"),
        ("So <answer> 42 </answer> and not 7", "42"),
        ("<answer>41</answer> no, <answer>42</answer>", "42"),
        (r"hence \boxed{42}, or 7", "42"),
        ("3 + 4\n#### 1,042", "1042"),
        ("Answer: **-42**", "-42"),
        ("no idea", "no idea"),
    ],
)
def test_extract_numbers_by_hand(text, said):
    assert extract(text, "7") == said


def test_extract_words_by_hand():
    assert extract("Thus the answer is Yes.", "No") == "Yes"
    assert extract("a, b, c", "x") == "a, b, c"


def test_score_is_exact_and_all_or_nothing():
    source = reasoning_gym(size=5, test_size=5)
    row = source.train[0]
    right, wrong = row["answer"], str(int(row["answer"]) + 1)
    assert source.grade is score
    assert score(row, f"It is {right}") == 1.0
    assert score(row, wrong) == 0.0
    assert score(row, f"{right} or {wrong}") == 0.0  # the last number stands
    assert score(row, f"{wrong}{right}") == 0.0
    assert score(row, "") == 0.0
    assert accuracy([(row, right), (row, wrong), (row, right), (row, "")]) == {"accuracy": 0.5}
    with pytest.raises(DataError, match="at least one answered row"):
        accuracy([])


@pytest.mark.parametrize("name", ["gsm_symbolic", "syllogism", "word_sorting", "family_relationships", "countdown"])
def test_gold_answers_score_one_with_other_tasks(name):
    source = reasoning_gym(name, size=20, test_size=5)
    assert [score(row, row["answer"]) for row in source.train] == [1.0] * 20
    assert [score(row, f"The answer is {row['answer']}.") for row in source.train] == [1.0] * 20
    assert sum(score(row, "nonsense") for row in source.train) == 0


def test_task_whose_scorer_takes_other_right_answers():
    """countdown has many solutions: any expression with the right value and the given numbers is right."""
    row = reasoning_gym("countdown", size=5, test_size=2).train[0]
    other = f"0 + {row['answer']}" if "- 0" in row["answer"] else f"({row['answer']})"
    assert other != row["answer"]
    assert score(row, f"<answer>{other}</answer>") == 1.0


def test_refusals():
    with pytest.raises(DataError, match="reasoning_gym has no task chain_sums. Did you mean chain_sum?"):
        reasoning_gym("chain_sums")
    with pytest.raises(DataError, match="data.options.min_term is not an option of chain_sum. Did you mean min_terms?"):
        reasoning_gym(options={"min_term": 3})
    with pytest.raises(DataError, match="refuses its options.*max_terms must be >= min_terms"):
        reasoning_gym(options={"min_terms": 9})
    with pytest.raises(DataError, match=r"too few different questions: \d+ of 200 test rows"):
        reasoning_gym(size=2000, options={"min_terms": 2, "max_terms": 2, "max_digits": 1})
    with pytest.raises(DataError, match="must be positive, got 0 and 200"):
        reasoning_gym(size=0)
