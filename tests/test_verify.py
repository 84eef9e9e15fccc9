import math

import pytest
from pydantic import ValidationError
from scipy import stats

from potstill.verify import Comparison, judge, overall


def comparison(**changes) -> Comparison:
    return Comparison(**{"metric": "m", "better": "a", "worse": "b", **changes})


def test_the_interval_is_the_paired_t_interval():
    better, worse = [3.0, 4.5, 6.1, 5.0], [2.0, 2.5, 5.0, 3.7]
    row = judge(better, worse, comparison())
    low, high = stats.ttest_rel(better, worse).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert row["verdict"] == "reproduced" and row["pairs"] == 4


def test_direction_and_margin_decide():
    up, down = [2.0, 2.1, 2.05], [1.0, 1.05, 1.1]
    assert judge(up, down, comparison())["verdict"] == "reproduced"
    assert judge(down, up, comparison())["verdict"] == "not reproduced"
    assert judge(down, up, comparison(higher_is_better=False))["verdict"] == "reproduced"
    assert judge(up, down, comparison(margin=3.0))["verdict"] == "not reproduced"
    assert judge([1.0, 3.0, 0.5], [1.5, 1.0, 1.0], comparison())["verdict"] == "inconclusive"


def test_equal_arms_do_not_reproduce_a_gain_but_are_not_worse():
    same = [1.0, 2.0, 3.0]
    assert judge(same, same, comparison())["verdict"] == "not reproduced"
    assert judge(same, same, comparison(kind="not worse", margin=0.1))["verdict"] == "reproduced"


def test_a_number_that_is_not_finite_decides_nothing():
    assert judge([math.nan, 1.0], [0.0, 0.0], comparison())["verdict"] == "inconclusive"


def test_the_whole_is_reproduced_only_when_every_part_is():
    assert overall(["reproduced", "reproduced"]) == "reproduced"
    assert overall(["reproduced", "inconclusive"]) == "inconclusive"
    assert overall(["not reproduced", "inconclusive", "reproduced"]) == "not reproduced"


def test_a_comparison_has_one_opponent():
    with pytest.raises(ValidationError, match="exactly one of worse and reference"):
        comparison(worse=None)
    assert judge([0.9], [0.5], comparison(worse=None, reference=0.5))["verdict"] == "reproduced"
