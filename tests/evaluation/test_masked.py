"""The judge of samples by hand numbers; the bound itself is tested beside the objective that trains by it."""

import math

import pytest
import torch

from potstill.contracts.errors import DataError
from potstill.evaluation.masked import NGram, distinct, row_entropy


def test_ngram_is_a_distribution_and_agrees_with_hand_numbers():
    judge = NGram([[0, 1, 0, 1, 2]], vocabulary=4, order=3)
    for context in ([], [0], [1], [0, 1], [3], [2, 2, 2]):
        assert sum(judge.probability(w, context) for w in range(4)) == pytest.approx(1.0)
    unigram = lambda w, c: (c + 3 * 0.25) / (5 + 3)  # five tokens, three kinds
    assert judge.probability(3, []) == pytest.approx(unigram(3, 0))
    bigram = (1 + 2 * unigram(2, 1)) / (2 + 2)  # after 1: 0 once, 2 once
    assert judge.probability(2, [1]) == pytest.approx(bigram)
    assert judge.probability(2, [0, 1]) == pytest.approx((1 + 2 * bigram) / (2 + 2))  # after 0 1: 0 once, 2 once
    assert judge.probability(2, [3, 0, 1]) == judge.probability(2, [0, 1])  # two tokens of context
    expected = -(math.log(judge.probability(0, [])) + math.log(judge.probability(1, [0]))) / 2
    assert judge.nll([[0, 1]]) == pytest.approx(expected)
    with pytest.raises(DataError, match="no token"):
        NGram([[]], 4)


def test_entropy_and_distinct_by_hand():
    assert row_entropy(torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])) == pytest.approx(math.log(2) / 2)
    assert distinct(torch.tensor([[0, 1, 2], [0, 1, 3]]), 2) == pytest.approx(3 / 4)
