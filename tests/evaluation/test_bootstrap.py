"""Intervals against closed forms."""

import numpy as np
import pytest

from rcm.evaluation.bootstrap import compare, interval


def test_interval_of_a_mean_is_that_of_the_normal_limit() -> None:
    x = np.random.default_rng(1).normal(3, 2, 200)
    found = interval(x, resamples=20_000)
    assert found is not None
    error = x.std() / np.sqrt(len(x))
    assert found.value == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - 1.96 * error, abs=0.05 * error)
    assert found.high == pytest.approx(x.mean() + 1.96 * error, abs=0.05 * error)


def test_strata_weigh_equally_and_are_resampled_apart() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, 300), rng.normal(10, 3, 50)
    found = interval([*a, *b], ["a"] * 300 + ["b"] * 50, resamples=20_000)
    assert found is not None
    assert found.value == pytest.approx((a.mean() + b.mean()) / 2)
    error = np.sqrt(a.var() / 300 + b.var() / 50) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.04)


def test_missing_values_are_left_out() -> None:
    found = interval([1.0, None, 3.0, float("nan")])
    assert found is not None
    assert (found.value, found.count) == (2.0, 2)
    assert interval([None, None]) is None
    assert interval([]) is None
    assert interval([1.0, None], ["a", "b"]) is None  # the mean of all strata is not known
    assert interval([1.0, None, 0.0], ["a", "b", "b"]) is not None
    constant = interval([0.5] * 7)
    assert constant is not None
    assert constant.value == constant.low == constant.high == 0.5


def test_the_interval_is_of_the_resamples_alone() -> None:
    """Percentiles of two numbers lie a fortieth of their distance inside them; the mean itself is neither."""
    values = np.arange(10.0)
    counts = np.random.default_rng(5).multinomial(10, np.full(10, 0.1), size=2)
    low, high = sorted(counts @ values / 10)
    found = interval(values, resamples=2, seed=5)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low + (high - low) / 40, high - (high - low) / 40))


def test_pairs_are_compared_prompt_by_prompt_and_repeatably() -> None:
    rng = np.random.default_rng(3)
    prompts = rng.normal(0, 5, 100)
    a, b = prompts + rng.normal(0.5, 0.1, 100), prompts
    found = compare(np.subtract, [a], [b])
    assert found is not None
    assert 0.4 < found.low < 0.5 < found.high < 0.6  # although the prompts themselves spread by 5
    assert found == compare(np.subtract, [a], [b])
    assert found != compare(np.subtract, [a], [b], seed=1)
    some = compare(np.subtract, [[1.0, None, 3.0]], [[0.0, 1.0, None]])
    assert some is not None
    assert (some.value, some.count) == (1.0, 1)
    with pytest.raises(ValueError, match=r"3 and 2"):
        compare(np.subtract, [[1, 2, 3]], [[1, 2]])
