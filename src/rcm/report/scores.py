"""Reading score JSONs: who was scored, what the metrics are called, and differences between models with intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rcm.evaluation import bootstrap
from rcm.evaluation.scores import strata_of

Score = Mapping[str, Any]

METHODS = {
    "teacher": "Teacher",
    "scm": "sCM",
    "dcm": "dCM",
    "meanflow": "MeanFlow",
    "dmd": "DMD",
    "dmd-random-rollout": "DMD (random times)",
    "dmd2": "DMD2",
    "rcm-lambda-0.1": "rCM (0.1 λ)",
    "rcm": "rCM",
    "rcm-lambda-10": "rCM (10 λ)",
    "rcm-lambda-100": "rCM (100 λ)",
    "rcm-fixed-rollout": "rCM (fixed times)",
}
HEADLINES = {"geneval.overall": "GenEval", "vbench.total": "VBench", "shapeeval.overall": "ShapeEval"}  # of whom
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
    "clip_distance": "CLIP distance",
    "dino_distance": "DINO distance",
    "vbench2": "VBench-2.0 diversity",
    "cer": "CER",
}


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
        """Position in tables: teacher, students as in METHODS, then controls; seeds and steps ascending."""
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


def headline(score: Score) -> str | None:
    """The metric that sums up a score; None for a score of parts alone, such as VBench's with dimensions missing."""
    return None if lacking(score)[0] else next((key for key in HEADLINES if key in score["metrics"]), None)


def lacking(score: Score) -> tuple[list[str], list[str]]:
    """The dimensions that are missing, which are single words, and the samples."""
    named = [str(what) for what in (score.get("evaluator") or {}).get("missing") or []]
    return [name for name in named if name.isidentifier()], [name for name in named if not name.isidentifier()]


def label(key: str) -> str:
    """A metric's heading: `diversity.cell_entropy` is "Cell entropy"."""
    name = key.partition(".")[2] or key
    return LABELS.get(key) or LABELS.get(name) or name.replace("_", " ").capitalize()


def keys_of(scores: Iterable[Score], family: str) -> list[str]:
    """The metrics of a family (`shapebench`, `diversity`, ...) that any score has a value of, as they first appear."""
    own = ((key, entry) for score in scores for key, entry in score["metrics"].items())
    return list(
        dict.fromkeys(key for key, entry in own if key.partition(".")[0] == family and entry["value"] is not None)
    )


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
    return "–" if value != value else minus(f"{value:.{3 if abs(value) < 2 else 2}f}")


def signed(value: float, digits: int = 3) -> str:
    """+0.012 or −0.012; what rounds to nothing is 0.000."""
    return minus(f"{value:+.{digits}f}")


def minus(text: str) -> str:
    """A printed number with a true minus sign, and none where nothing is left of it."""
    return text.replace("-", "−") if any(digit in text for digit in "123456789") else text.lstrip("+-")


def joined(words: Iterable[str]) -> str:
    """ "a, b and c"."""
    *most, last = [*words] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def reported(score: Score, key: str) -> Estimate:
    """A metric as the score states it."""
    entry = score["metrics"][key]
    low, high = (entry.get(bound) for bound in ("low", "high"))
    return Estimate(*(float("nan") if x is None else float(x) for x in (entry["value"], low, high)))


def compare(statistic: Callable[..., np.ndarray], key: str, *groups: Sequence[Score]) -> Estimate | None:
    """A statistic of the means of groups of scores with its interval, by the bootstrap of the first score's evaluator.

    A group holds the scores of one model, one a training seed. Returns None where a score lacks values by prompt, or
    none is common to all.
    """
    found = [[score.get("per_prompt", {}).get(key) for score in group] for group in groups]
    if not all(found) or any(values is None for group in found for values in group):
        return None
    if len({len(values) for group in found for values in group}) != 1:
        return None
    first = groups[0][0]
    strata = strata_of(key, first["per_prompt"]["tag"])
    said = first.get("evaluator", {}).get("bootstrap", {})
    options = {name: said[name] for name in ("resamples", "seed") if name in said}
    made = bootstrap.compare(statistic, *found, strata=strata, **options)
    return None if made is None else Estimate(made.value, made.low, made.high)


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b."""
    return a / b


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b."""
    return a - b
