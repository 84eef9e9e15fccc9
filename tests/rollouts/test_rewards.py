from fractions import Fraction

import pytest
import torch

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError
from potstill.rollouts.rewards import ExactMatch, NumericAnswer, Scored, final_number, rows_of


def test_exact_match():
    rows = [{"answer": "a b"}] * 3
    texts = [" a  b\n", "A b", "a bc"]
    assert ExactMatch()(rows, texts).tolist() == [1, 0, 0]
    assert ExactMatch(fold=True)(rows, texts).tolist() == [1, 1, 0]
    assert ExactMatch(answer="solution")([{"solution": 7}], ["7"]).tolist() == [1]
    with pytest.raises(DataError, match="no solution to check completions against; it has answer"):
        ExactMatch(answer="solution")(rows, texts)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", 42),
        ("3 + 4 = 7, so 7", 7),
        ("first -1, then -2.50", Fraction(-5, 2)),
        ("it costs $1,234.5", Fraction(2469, 2)),
        (r"thus \boxed{\frac{3}{4}} and not 9", Fraction(3, 4)),
        (r"\boxed{1} or rather \boxed{2}", 2),
        ("12 apples\n#### 10\n", 10),
        ("1/8", Fraction(1, 8)),
        (".5", Fraction(1, 2)),
        ("6e2", 600),
        ("1/0", None),
        ("x3 e10 and v2.1", None),
        ("none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_numeric_answer():
    rows = [{"answer": "1,000"}] * 4
    assert NumericAnswer()(rows, ["1000.0", "about 1001", "999", "so 10^3 is 1e3"]).tolist() == [1, 0, 0, 1]
    assert NumericAnswer()(rows[:2], ["", "none"]).tolist() == [0, 0]
    assert NumericAnswer(tolerance=0.01)(rows[:2], ["1001", "1011"]).tolist() == [1, 0]
    with pytest.raises(DataError, match="holds no number; use ExactMatch"):
        NumericAnswer()([{"answer": "yes"}], ["1"])


def test_scored():
    reward = Scored(lambda row, text: len(text) / row["length"])
    assert torch.equal(reward([{"length": 4}, {"length": 1}], ["ab", "abc"]), torch.tensor([0.5, 3.0]))
    with pytest.raises(DataError, match="reward of completion 1 is nan"):
        Scored(lambda row, text: float(text))([{}, {}], ["1", "nan"])
    with pytest.raises(ValueError, match="zip"):
        reward([{"length": 4}], ["a", "b"])


def test_rows_of_a_batch():
    ones = torch.ones(2, 1, dtype=torch.bool)
    batch = TokenBatch(torch.arange(2), ones.long(), ones, ones, extra={"answer": ["a", "b"], "task": "sum"})
    assert rows_of(batch) == [{"answer": "a"}, {"answer": "b"}]
