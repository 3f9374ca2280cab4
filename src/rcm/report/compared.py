"""Which scores may be compared, those of one evaluator and set of prompts, and how: seeds of a method together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rcm.artefact import UserError
from rcm.report.scores import (
    CONTROLS,
    Estimate,
    Score,
    compare,
    difference,
    headline,
    in_order,
    keys_of,
    ratio,
    reported,
)

FAMILIES = {"geneval": "GenEval", "vbench": "VBench", "shapeeval": "ShapeEval"}  # names of the evaluators' own scores
MAIN = ("diversity.vendi",)  # stands for all measures of diversity where it is known, as it takes them together
LAMBDAS = "rcm-lambda-"  # models distilled with so many times the scale's λ; one time is rcm, none at all is scm
ROLLOUTS = {"rcm": ("rcm", "rcm-fixed-rollout"), "dmd": ("dmd-random-rollout", "dmd")}  # with random and fixed times


def by_medium(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """Scores of images and of clips, in the order of tables.

    Raises UserError where those of a medium come from different evaluators or prompts, where students were sampled
    from different σ_max, or one is there twice: then their numbers do not belong on one axis.
    """
    found: dict[str, list[Score]] = {}
    for _, score in in_order(scores):
        found.setdefault(str(score["media"]), []).append(score)
    for medium, own in found.items():
        models = [f"{score['model']} at {score['steps']} steps" for score in own]
        if twice := sorted({model for model in models if models.count(model) > 1}):
            raise UserError(f"there are two scores of {twice[0]} for {medium}; give one")
        facets = [_facets(score) for score in own]
        for what in facets[0]:
            _same(medium, what, (facet[what] for facet in facets))
        beside = [(_evaluator(score).get("diversity") or {}).get("prompts_sha256") for score in own]
        _same(medium, "prompts for diversity", (f"SHA-256 {said[:12]}" for said in beside if said))
        starts = [start for score in own if (start := sigma_max(score)) is not None]
        _same(medium, "σ_max", (f"{start:g}" for start in starts))
    return {medium: found[medium] for medium in sorted(found, reverse=True)}


def _same(medium: str, what: str, found: Iterable[str]) -> None:
    different = sorted(set(found))
    if len(different) > 1:
        raise UserError(f"the scores of {medium} differ in {what} and cannot be compared: {'; '.join(different)}")


def _evaluator(score: Score) -> Mapping[str, Any]:
    found: Mapping[str, Any] = score.get("evaluator", {})
    return found


def _facets(score: Score) -> dict[str, str]:
    """What scores must agree in, by what to call it."""
    said = _evaluator(score)
    name = said.get("name") or FAMILIES.get((headline(score) or "").partition(".")[0], "unknown")
    return {
        "evaluator": f"{name}, version {said.get('version', 'unknown')}",
        "protocol": str(said.get("protocol")),
        "detector or models": str(said.get("models") or said.get("detector")),
        "prompts": f"SHA-256 {str(said.get('prompts_sha256'))[:12]}",
        "number of samples": str(score.get("n_samples")),
        "what is missing": ", ".join(map(str, said.get("missing") or ["nothing"])),
    }


def sigma_max(score: Score) -> float | None:
    """Where the sampling of a student began, if its score says so; that of the teacher is its sampler's affair."""
    if score["model"] == "teacher" or score["model"] in CONTROLS:
        return None
    start = (_evaluator(score).get("sampling") or {}).get("sigma_max")
    return None if start is None else float(start)


def quality(scores: Sequence[Score]) -> str | None:
    """The metric that sums up the scores of a medium."""
    return next((key for score in scores if (key := headline(score))), None)


def overall(medium: str, scores: Sequence[Score]) -> str:
    """The same, where there must be one."""
    key = quality(scores)
    if key is None:
        raise UserError(f"none of the scores of {medium} has an overall score, such as geneval.overall or vbench.total")
    return key


def measures(scores: Iterable[Score]) -> list[str]:
    """The measures of diversity that decide: the Vendi score, without one the distances of pairs and VBench-2.0's."""
    found = keys_of(scores, "diversity")
    return [key for key in MAIN if key in found] or found


def grouped(scores: Iterable[Score]) -> dict[tuple[str, int], list[Score]]:
    """Scores by method and number of steps: training seeds together, in the order of tables."""
    groups: dict[tuple[str, int], list[Score]] = {}
    for run, score in in_order(scores):
        groups.setdefault((run.method, run.steps), []).append(score)
    return groups


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


Groups = Mapping[tuple[str, int], Sequence[Score]]  # by method and number of steps, a score a training seed


@dataclass(frozen=True)
class Contrast(Estimate):
    """Two models compared; unpaired where scores hold no values by prompt, and without bounds where no intervals."""

    paired: bool = True

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return self.low == self.low


def contrast(key: str, a: Sequence[Score], b: Sequence[Score], *, relative: bool = False) -> Contrast | None:
    """a - b, or a / b, of a metric; None where a side has none.

    Without values by prompt the interval is that of independent estimates: half-widths add up in squares (for a ratio
    as shares). The mean of seeds counts as wide as they are on average, as they share their prompts.
    """
    found = compare(ratio if relative else difference, key, a, b)
    if found is not None:
        return Contrast(found.value, found.low, found.high)
    sides = [[reported(s, key) for s in side if s["metrics"].get(key, {}).get("value") is not None] for side in (a, b)]
    if not all(sides) or (relative and any(side[0].value == 0 for side in sides)):
        return None
    (x, x_half), (y, y_half) = (
        (float(np.mean([e.value for e in side])), float(np.mean([(e.high - e.low) / 2 for e in side])))
        for side in sides
    )
    value = x / y if relative else x - y
    half = abs(value) * float(np.hypot(x_half / x, y_half / y)) if relative else float(np.hypot(x_half, y_half))
    return Contrast(value, value - half, value + half, paired=False)
