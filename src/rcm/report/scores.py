"""Reading score JSONs: who was scored, what the metrics are called, and differences between models with intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Score = Mapping[str, Any]

METHODS = {"teacher": "Teacher", "scm": "sCM", "dcm": "dCM", "dmd": "DMD", "dmd2": "DMD2", "rcm": "rCM"}
CONTROLS = {"oracle": "Ground truth", "codec": "Ground truth, codec", "shuffled": "Another prompt"}
LABELS = {
    "single_object": "Single",
    "two_object": "Two",
    "color_attr": "Attributes",
    "colors": "Colours",
    "color": "Colour",
    "color_entropy": "Colour entropy",
    "color_distance": "Colour distance",
    "pixels.distance": "Pixel distance",
    "psnr": "PSNR",
}
RESAMPLES = 2000
SEED = 43


@dataclass(frozen=True)
class Run:
    """Who a score belongs to: `rcm-1` at 4 steps is method rcm, seed 1; the teacher and controls have no seed."""

    method: str
    seed: int | None
    steps: int

    @property
    def label(self) -> str:
        """The name of the method as tables print it."""
        return METHODS.get(self.method) or CONTROLS.get(self.method) or self.method

    @property
    def order(self) -> tuple[int, str, int, int]:
        """Position in tables: teacher, sCM, DMD, rCM, then controls; seeds and steps ascending."""
        known = [*METHODS, *CONTROLS]
        place = known.index(self.method) if self.method in known else len(known)
        return place, self.method, -1 if self.seed is None else self.seed, self.steps


def run_of(model: str, steps: int) -> Run:
    """The run behind a model's name, such as `rcm-0`, `teacher` or `oracle`."""
    method, dash, seed = model.rpartition("-")
    return Run(method, int(seed), steps) if dash and seed.isdecimal() else Run(model, None, steps)


def in_order(scores: Iterable[Score]) -> list[tuple[Run, Score]]:
    """Scores with their runs in the order of tables."""
    runs = [(run_of(str(score["model"]), int(score["steps"])), score) for score in scores]
    return sorted(runs, key=lambda pair: pair[0].order)


def label(key: str) -> str:
    """A metric's heading: `diversity.cell_entropy` is "Cell entropy"."""
    name = key.partition(".")[2] or key
    return LABELS.get(key) or LABELS.get(name) or name.replace("_", " ").capitalize()


def keys_of(scores: Iterable[Score], family: str) -> list[str]:
    """The metrics of a family (`shapebench`, `diversity`, ...) that any score has, in the order of first appearance."""
    found: dict[str, None] = {}
    for score in scores:
        found.update(dict.fromkeys(key for key in score["metrics"] if key.partition(".")[0] == family))
    return list(found)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; without one the bounds are NaN."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    def __str__(self) -> str:
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


def number(value: float) -> str:
    """Three decimals for shares and rates, two for larger numbers such as decibels; a dash for NaN."""
    return "–" if value != value else f"{value:.3f}" if abs(value) < 2 else f"{value:.2f}"


def reported(score: Score, key: str) -> Estimate:
    """A metric as the score states it."""
    entry = score["metrics"][key]
    low, high = (entry.get(bound) for bound in ("low", "high"))
    return Estimate(*(float("nan") if x is None else float(x) for x in (entry["value"], low, high)))


def per_prompt(score: Score, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A metric by prompt, NaN where a prompt has none, and the prompts' strata; None for a metric of the whole only.

    ShapeEval overall is the mean of the means of the six tasks, so its strata are the tasks.
    """
    values = score.get("per_prompt", {})
    if key not in values:
        return None
    found = np.array([float("nan") if x is None else x for x in values[key]], dtype=float)
    strata = np.array(values["tag"]) if key == "shapeeval.overall" else np.zeros(len(found), dtype=int)
    return found, strata


def compare(
    statistic: Callable[..., np.ndarray], key: str, *groups: Sequence[Score], resamples: int = RESAMPLES
) -> Estimate | None:
    """A statistic of the means of groups of scores, with a paired bootstrap interval of 95 %.

    A group holds the scores of one model, one a training seed. Every resample draws prompts within their strata, the
    same for all groups, and seeds within each group; prompts without a value in any score are left out of all. Returns
    None where a score lacks values by prompt or none is common to all.
    """
    pairs = [[per_prompt(score, key) for score in group] for group in groups]
    if not all(group and all(pair is not None for pair in group) for group in pairs):
        return None
    matrices = [np.stack([pair[0] for pair in group if pair is not None]) for group in pairs]
    strata = next(pair[1] for pair in pairs[0] if pair is not None)
    if len({matrix.shape[1] for matrix in matrices}) != 1:
        return None
    valid = ~np.isnan(np.concatenate(matrices)).any(axis=0)
    if not valid.any():
        return None
    rng = np.random.default_rng(SEED)
    names = np.unique(strata[valid])
    weights = np.zeros((resamples + 1, len(strata)))  # row 0: every prompt once
    for name in names:
        members = np.flatnonzero(valid & (strata == name))
        drawn = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
        weights[0, members] = 1
        weights[1:, members] = drawn
        weights[:, members] /= len(members) * len(names)
    means = []
    for matrix in matrices:
        count = len(matrix)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
        seeds = np.concatenate([np.ones((1, count)), drawn]) / count
        means.append(((weights @ np.nan_to_num(matrix).T) * seeds).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        result = statistic(*means)
    if not np.isfinite(result).all():
        return None
    low, high = np.percentile(result[1:], [2.5, 97.5])
    return Estimate(float(result[0]), float(low), float(high))


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b."""
    return a / b


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b."""
    return a - b
