"""Scores of a medium on one axis, and how they are compared: seeds of a method together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rcm.artefact import UserError
from rcm.report.facts import comparable, differences, evaluator, short
from rcm.report.facts import sigma_max as sigma_max
from rcm.report.scores import (
    HEADLINES,
    Estimate,
    Score,
    compare,
    difference,
    headline,
    in_order,
    keys_of,
    ratio,
    reported,
    signed,
)

MAIN = ("diversity.vendi",)  # stands for all measures of diversity where it is known, as it takes them together
LAMBDAS = "rcm-lambda-"  # models distilled with so many times the scale's λ; one time is rcm, none at all is scm
ROLLOUTS = {"rcm": ("rcm", "rcm-fixed-rollout"), "dmd": ("dmd-random-rollout", "dmd")}  # with random and fixed times


def by_medium(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """Scores of images and of clips, in the order of tables.

    Raises UserError where those of a medium cannot be compared, or one is there twice: then their numbers do not belong
    on one axis.
    """
    found: dict[str, list[Score]] = {}
    for _, score in in_order(scores):
        found.setdefault(str(score["media"]), []).append(score)
    for medium, own in found.items():
        models = [f"{score['model']} at {score['steps']} steps" for score in own]
        if twice := sorted({model for model in models if models.count(model) > 1}):
            raise UserError(f"there are two scores of {twice[0]} for {medium}; give one")
        for what, values in differences(comparable(own)).items():
            said = "; ".join(sorted({short(value)[:120] or "unknown" for value in values}))
            raise UserError(f"the scores of {medium} differ in {what} and cannot be compared: {said}")
    return {medium: found[medium] for medium in sorted(found, reverse=True)}


def quality(scores: Sequence[Score]) -> str | None:
    """The metric that sums up the scores of a medium."""
    return next((key for score in scores if (key := headline(score))), None)


def overall(medium: str, scores: Sequence[Score]) -> str:
    """The same, where there must be one."""
    key = quality(scores)
    if key is None:
        raise UserError(
            f"none of the scores of {medium} has an overall score, geneval.overall or a vbench.total of all dimensions"
        )
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
    named = {key.partition(".")[0]: name for key, name in HEADLINES.items()}
    return f"{(evaluator(score).get('name') if score else None) or named.get(family, family)} {measure}"


def lambda_times(method: str) -> float | None:
    """How many times the scale's λ a method was distilled with; None for methods outside the sweep."""
    known = {"scm": 0.0, "rcm": 1.0}
    return float(method.removeprefix(LAMBDAS)) if method.startswith(LAMBDAS) else known.get(method)


def is_variant(method: str) -> bool:
    """Whether a method is there for an ablation alone: another λ than the scale's, or the other rollout."""
    others = (set(pair) - {usual} for usual, pair in ROLLOUTS.items())
    return method.startswith(LAMBDAS) or method in set().union(*others)


def pooled(key: str, group: Sequence[Score]) -> Estimate | None:
    """A metric of one model over its training seeds; None where none has it.

    The value is the mean of what the scores report, which need not be a mean over prompts; the interval moves with it.
    """
    group = _having(key, group)
    if len(group) < 2:
        return reported(group[0], key) if group else None
    value = float(np.mean([reported(score, key).value for score in group]))
    made = compare(lambda mean: mean, key, group)
    if made is None:
        return Estimate(value)
    return Estimate(value, *(bound + value - made.value for bound in (made.low, made.high)))


def _having(key: str, group: Iterable[Score]) -> list[Score]:
    return [score for score in group if score["metrics"].get(key, {}).get("value") is not None]


def _offset(key: str, group: Sequence[Score]) -> float:
    """What scores report more than their means over prompts, on average: VBench's own code weighs otherwise."""
    means = [compare(lambda mean: mean, key, [score]) for score in group]
    found = [reported(s, key).value - m.value for s, m in zip(group, means, strict=True) if m is not None]
    return float(np.mean(found)) if found else 0.0


Groups = Mapping[tuple[str, int], Sequence[Score]]  # by method and number of steps, a score a training seed


@dataclass(frozen=True)
class Contrast(Estimate):
    """Two models compared; unpaired where scores hold no values by prompt, and without bounds where no intervals."""

    paired: bool = True

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return self.low == self.low

    def signed(self, between: str = " ") -> str:
        """Signed, with its interval if there is one; with four decimals where three would leave one digit."""
        shown = [self.value, *((self.low, self.high) if self.bounded else ())]
        digits = 3 if max(map(abs, shown)) >= 0.01 else 4
        value, *bounds = (signed(x, digits) for x in shown)
        return f"{value}{between}[{', '.join(bounds)}]" if bounds else value


def contrast(key: str, a: Sequence[Score], b: Sequence[Score], *, relative: bool = False) -> Contrast | None:
    """a - b, or a / b, of a metric; None where a side has none.

    Without values by prompt the interval is that of independent estimates: half-widths add up in squares (for a ratio
    as shares). The mean of seeds counts as wide as they are on average, as they share their prompts.
    """
    first, second = (_offset(key, _having(key, side)) for side in (a, b))
    statistic = ratio if relative else difference
    found = compare(lambda x, y: statistic(x + first, y + second), key, a, b)
    if found is not None:
        return Contrast(found.value, found.low, found.high)
    sides = [[reported(s, key) for s in _having(key, side)] for side in (a, b)]
    if not all(sides) or (relative and any(side[0].value == 0 for side in sides)):
        return None
    (x, x_half), (y, y_half) = (
        (float(np.mean([e.value for e in side])), float(np.mean([(e.high - e.low) / 2 for e in side])))
        for side in sides
    )
    value = x / y if relative else x - y
    half = abs(value) * float(np.hypot(x_half / x, y_half / y)) if relative else float(np.hypot(x_half, y_half))
    return Contrast(value, value - half, value + half, paired=False)
