"""Intervals of 95 % by the bootstrap over prompts: samples of one prompt are alike, so prompts are what is drawn.

A score is the mean over strata of the mean over a stratum's prompts; with GenEval's tasks as strata that is its overall
score. Resamples are drawn within strata and follow from the seed alone, so paired scores see the same resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Values = Sequence[float | None] | np.ndarray
TAILS = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, over `count` prompts that have a value."""

    value: float
    low: float
    high: float
    count: int


def interval(
    values: Values, strata: Sequence[str] | None = None, *, resamples: int = 1000, seed: int = 0
) -> Estimate | None:
    """Mean of the prompts' values and its percentile interval; None and NaN are left out.

    None if nothing is left, or nothing of one of the strata.
    """
    return compare(lambda mean: mean, [values], strata=strata, resamples=resamples, seed=seed)


def compare(
    statistic: Callable[..., np.ndarray],
    *groups: Sequence[Values],
    strata: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate | None:
    """A statistic of the means of groups, paired by prompt, with its percentile interval.

    A group holds the values by prompt of one model, once a training seed. Every resample draws prompts within their
    strata, the same for all groups, and seeds within each group. Prompts without a value in any are left out of all;
    None if nothing is left, or nothing of one of the strata, or the statistic is not finite.
    """
    matrices = [np.array([[np.nan if x is None else x for x in row] for row in group], dtype=float) for group in groups]
    if len({matrix.shape[1] for matrix in matrices}) != 1:
        raise ValueError(f"paired values differ in number: {' and '.join(str(m.shape[1]) for m in matrices)}")
    valid = ~np.isnan(np.concatenate(matrices)).any(axis=0)
    tags = np.zeros(len(valid), dtype=int) if strata is None else np.asarray(strata)
    if not valid.any() or set(tags[valid]) != set(tags):
        return None
    rng = np.random.default_rng(seed)
    names = np.unique(tags[valid])
    means = [np.zeros((1 + resamples, len(matrix))) for matrix in matrices]  # row 0: every prompt and seed once
    for name in names:
        members = np.flatnonzero(valid & (tags == name))
        counts = _counts(rng, len(members), resamples)
        for mean, matrix in zip(means, matrices, strict=True):
            mean += counts @ matrix[:, members].T / len(members)
    totals = [(mean * _counts(rng, mean.shape[1], resamples)).sum(axis=1) / mean.shape[1] for mean in means]
    with np.errstate(divide="ignore", invalid="ignore"):
        result = statistic(*(total / len(names) for total in totals))
    if not np.isfinite(result).all():
        return None
    low, high = np.percentile(result[1:], TAILS)
    return Estimate(float(result[0]), float(low), float(high), int(valid.sum()))


def _counts(rng: np.random.Generator, count: int, resamples: int) -> np.ndarray:
    """How often each of `count` things is taken: once in row 0, by chance in the rows of the resamples."""
    return np.concatenate([np.ones((1, count)), rng.multinomial(count, np.full(count, 1 / count), size=resamples)])
