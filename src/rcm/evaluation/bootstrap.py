"""Intervals by the bootstrap over prompts: samples of one prompt are alike, so prompts are what is drawn.

A score is the mean over strata of the mean over a stratum's prompts; with GenEval's tasks as strata that is its overall
score. Resamples are drawn within strata and follow from the seed alone, so paired scores see the same resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Values = Sequence[float | None] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, over `count` prompts that have a value."""

    value: float
    low: float
    high: float
    count: int


def interval(
    values: Values,
    strata: Sequence[str] | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate | None:
    """Mean of the prompts' values and its percentile interval; None and NaN are left out. None if nothing is left."""
    x = np.array([np.nan if value is None else value for value in values], dtype=float)
    names = np.zeros(len(x), int) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
    valid = ~np.isnan(x)
    if not valid.any():
        return None
    x, names = x[valid], names[valid]
    rng = np.random.default_rng(seed)
    present = np.unique(names)
    value, drawn = 0.0, np.zeros(resamples)
    for name in present:
        members = x[names == name]
        weights = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
        value += members.mean()
        drawn += weights @ members / len(members)
    value, drawn = value / len(present), drawn / len(present)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Estimate(float(value), float(low), float(high), len(x))


def paired_difference(
    a: Values,
    b: Values,
    strata: Sequence[str] | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate | None:
    """Interval of the mean of a - b over the prompts that have both values."""
    if len(a) != len(b):
        raise ValueError(f"paired values differ in number: {len(a)} and {len(b)}")
    differences = [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]
    return interval(differences, strata, resamples=resamples, confidence=confidence, seed=seed)
