"""Which scores may be compared, those of one evaluator and set of prompts, and how: seeds of a method together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rcm.artefact import UserError
from rcm.report.scores import CONTROLS, Estimate, Score, compare, difference, headline, in_order, ratio, reported

FAMILIES = {"geneval": "GenEval", "vbench": "VBench", "shapeeval": "ShapeEval"}  # names of the evaluators' own scores
LAMBDAS = "rcm-lambda-"  # models distilled with so many times the scale's λ; one time is rcm, none at all is scm
ROLLOUTS = {"rcm": ("rcm", "rcm-fixed-rollout"), "dmd": ("dmd-random-rollout", "dmd")}  # with random and fixed times


def by_medium(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """Scores of images and of clips, in the order of tables.

    Raises UserError where those of a medium come from different evaluators or prompts, or students were sampled from
    different σ_max: then their numbers do not belong on one axis.
    """
    found: dict[str, list[Score]] = {}
    for _, score in in_order(scores):
        found.setdefault(str(score["media"]), []).append(score)
    for medium, own in found.items():
        _same(medium, "evaluators or prompts", map(_instrument, own))
        beside = {said for score in own if (said := _evaluator(score).get("diversity", {}).get("prompts_sha256"))}
        _same(medium, "prompts for diversity", (f"SHA-256 {said[:12]}" for said in beside))
        starts = {start for score in own if (start := sigma_max(score)) is not None}
        _same(medium, "sampling", (f"σ_max {start:g}" for start in starts))
    return {medium: found[medium] for medium in sorted(found, reverse=True)}


def _same(medium: str, what: str, found: Iterable[str]) -> None:
    different = sorted(set(found))
    if len(different) > 1:
        raise UserError(
            f"the scores of {medium} are of different {what} and cannot be compared: {'; '.join(different)}. "
            "Give scores of one"
        )


def _evaluator(score: Score) -> Mapping[str, Any]:
    found: Mapping[str, Any] = score.get("evaluator", {})
    return found


def _instrument(score: Score) -> str:
    said = _evaluator(score)
    name = said.get("name") or FAMILIES.get((headline(score) or "").partition(".")[0], "an evaluator")
    prompts = str(said.get("prompts_sha256") or "unknown")[:12]
    return f"{name}, version {said.get('version', 'unknown')}, prompts {prompts}"


def sigma_max(score: Score) -> float | None:
    """Where the sampling of a student began, if its score says so; that of the teacher is its sampler's affair."""
    if score["model"] == "teacher" or score["model"] in CONTROLS:
        return None
    start = (_evaluator(score).get("sampling") or {}).get("sigma_max")
    return None if start is None else float(start)


def quality(scores: Sequence[Score]) -> str | None:
    """The metric that sums up the scores of a medium."""
    return next((key for score in scores if (key := headline(score))), None)


def quality_name(key: str, score: Score | None = None) -> str:
    """ "GenEval overall", and with a score of it which evaluator: "GenEval (HF Mask2Former) overall"."""
    family, _, measure = key.partition(".")
    name = _evaluator(score).get("name") if score else None
    return f"{name or FAMILIES.get(family, family)} {measure}"


def lambda_times(method: str) -> float | None:
    """How many times the scale's λ a method was distilled with; None for methods outside the sweep."""
    known = {"scm": 0.0, "rcm": 1.0}
    return float(method.removeprefix(LAMBDAS)) if method.startswith(LAMBDAS) else known.get(method)


def is_variant(method: str) -> bool:
    """Whether a method is there for an ablation alone: another λ than the scale's, or the other rollout."""
    others = (set(pair) - {usual} for usual, pair in ROLLOUTS.items())
    return method.startswith(LAMBDAS) or method in set().union(*others)


def pooled(key: str, group: Sequence[Score]) -> Estimate | None:
    """A metric of one model over its training seeds; None where none has it."""
    group = [score for score in group if score["metrics"].get(key, {}).get("value") is not None]
    if len(group) < 2:
        return reported(group[0], key) if group else None
    return compare(lambda mean: mean, key, group) or Estimate(float(np.mean([reported(s, key).value for s in group])))


@dataclass(frozen=True)
class Contrast:
    """Two models compared; unpaired where scores hold no values by prompt, and without bounds where no intervals."""

    estimate: Estimate
    paired: bool

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return self.estimate.low == self.estimate.low


def contrast(key: str, a: Sequence[Score], b: Sequence[Score], *, relative: bool = False) -> Contrast | None:
    """a - b, or a / b, of a metric; None where a side has none.

    Without values by prompt the interval is that of independent estimates: half-widths add up in squares (for a ratio
    as shares). The mean of seeds counts as wide as they are on average, as they share their prompts.
    """
    found = compare(ratio if relative else difference, key, a, b)
    if found is not None:
        return Contrast(found, paired=True)
    sides = [[reported(s, key) for s in side if s["metrics"].get(key, {}).get("value") is not None] for side in (a, b)]
    if not all(sides):
        return None
    (x, x_half), (y, y_half) = (
        (float(np.mean([e.value for e in side])), float(np.mean([(e.high - e.low) / 2 for e in side])))
        for side in sides
    )
    value = x / y if relative else x - y
    half = abs(value) * float(np.hypot(x_half / x, y_half / y)) if relative else float(np.hypot(x_half, y_half))
    return Contrast(Estimate(value, value - half, value + half), paired=False)
