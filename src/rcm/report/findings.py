"""What the scores say about each claim of the paper, in one plain sentence a claim.

The rules are the same for every run. A claim is "shown" if the whole 95 % interval supports it,
"contradicted" if the whole interval speaks against it, and otherwise "not shown". A claim with several parts is "shown"
if all of them are, and "contradicted" if one is and none is shown. Quality is the overall score of the evaluator.
Diversity is decided by the Vendi score, which takes all hidden factors together and has the others told beside it; and
without one by all measures together, distances of pairs in CLIP and DINOv2 and the diversity of VBench-2.0. A claim
whose scores are missing is "not shown" and says what is missing. Scores that may not be compared are looked at apart.
Claims about ablations are looked at only where an ablation was scored.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rcm.report.compared import (
    LAMBDAS,
    ROLLOUTS,
    Contrast,
    by_medium,
    contrast,
    lambda_times,
    measures,
    quality,
    quality_name,
)
from rcm.report.facts import comparable
from rcm.report.scores import METHODS, Score, in_order, keys_of, label

SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown", "contradicted"
MARGINS = {  # "about as good", by overall score
    "shapeeval.overall": 0.05,
    "geneval.overall": 0.025,  # differences below are noise by the arithmetic of 553 prompts with 4 samples each
    "vbench.total": 0.0024,  # between the authors' own two tests of one teacher
}
SHARES = {  # of the teacher's overall score that rCM reaches, by number of steps
    "shapeeval.overall": {4: 0.9, 2: 0.8},
    "geneval.overall": {4: 0.95, 2: 0.95},  # the paper's least are 0.975 and 0.963
    "vbench.total": {4: 1.0, 2: 1.0},  # the paper's students lie above the teacher
}
DETAIL = {  # more is better
    "shapeeval.overall": ("fidelity.psnr", "fidelity.sharpness"),
    "geneval.overall": (),
    "vbench.total": ("vbench.imaging_quality", "vbench.aesthetic_quality"),
}
UNPAIRED = "The scores hold no values by prompt, so this interval is not paired: it takes models as independent."
NO_INTERVAL = "The scores hold neither values by prompt nor intervals, so nothing can be shown."


@dataclass(frozen=True)
class Finding:
    """One claim: `verdict` is "shown", "not shown" or "contradicted"; `sentence` carries the numbers and intervals."""

    media: str
    claim: str
    verdict: str
    sentence: str


@dataclass(frozen=True)
class _Scores:
    """Scores of one medium, by method and number of steps, and their overall score."""

    media: str
    scores: Sequence[Score]
    key: str

    def of(self, method: str, steps: int | None = None) -> list[Score]:
        """All training seeds of a method; without a number of steps all there are (the teacher has one number)."""
        return [s for run, s in in_order(self.scores) if run.method == method and steps in (None, run.steps)]

    @property
    def name(self) -> str:
        """What the overall score is called."""
        return quality_name(self.key, self.scores[0])

    @property
    def margin(self) -> float:
        """Difference of it that counts as none."""
        return MARGINS[self.key]


def findings(scores: Sequence[Score]) -> list[Finding]:
    """Findings on every claim, for each group of comparable scores that has an overall score; images first."""
    found = []
    groups = sorted(comparable(scores), key=lambda group: str(group[0]["media"]), reverse=True)
    for media, scored in (item for group in groups for item in by_medium(group).items()):
        key = quality(scored)
        if key is None:
            continue
        own = _Scores(media, scored, key)
        found += [_reaches_teacher(own, 4), _reaches_teacher(own, 2), _one_two_four(own)]
        for baseline in filter(own.of, ("dmd2", "dmd")):  # DMD2 is the paper's, DMD the part that rCM takes of it
            found += [_not_below(own, baseline), _more_diverse(own, baseline)]
        if own.of("scm"):
            found.append(_scm_lacks_detail(own))
        if any(run.method.startswith(LAMBDAS) for run, _ in in_order(scored)):
            found += [_lambda_quality(own), _lambda_diversity(own)]
        found += [_rollout(own, name) for name, pair in ROLLOUTS.items() if all(map(own.of, pair))]
    return found


def _judge(low_enough: bool, high_enough: bool) -> str:
    """Verdict of an interval: shown if its lower end suffices, contradicted if not even its upper end does."""
    return SHOWN if low_enough else NOT_SHOWN if high_enough else CONTRADICTED


def _more(found: Contrast) -> str:
    """Whether a difference is shown to be above zero; without an interval nothing is."""
    return _judge(found.low > 0, found.high >= 0) if found.bounded else NOT_SHOWN


def _together(verdicts: Iterable[str]) -> str:
    """Verdict of a claim with several parts."""
    found = set(verdicts)
    return SHOWN if found == {SHOWN} else CONTRADICTED if CONTRADICTED in found and SHOWN not in found else NOT_SHOWN


def _missing(own: _Scores, claim: str, what: str) -> Finding:
    return Finding(own.media, claim, NOT_SHOWN, f"There are no scores of {what}, so nothing can be said.")


def _about(found: Contrast, *groups: Sequence[Score]) -> str:
    """Which uncertainty an interval covers."""
    if not found.bounded:
        return NO_INTERVAL
    if not found.paired:
        return UNPAIRED
    count = max(map(len, groups))
    return (
        "Interval over prompts, one training seed."
        if count == 1
        else f"Interval over prompts and {count} training seeds."
    )


def _steps(count: int) -> str:
    return {1: "one step", 2: "two steps", 4: "four steps"}.get(count, f"{count} steps")


def _reaches_teacher(own: _Scores, steps: int) -> Finding:
    share = SHARES[own.key][steps]
    least = "the teacher's" if share == 1 else f"at least {share:g} of the teacher's"
    claim = f"With {_steps(steps)}, rCM reaches {least} {own.name}."
    student, teacher = own.of("rcm", steps), own.of("teacher")
    found = contrast(own.key, student, teacher, relative=True)
    if found is None:
        return _missing(own, claim, f"rCM with {_steps(steps)} and of the teacher")
    if not found.bounded:
        return Finding(own.media, claim, NOT_SHOWN, f"It reaches {found.value:.3f} of the teacher. {NO_INTERVAL}")
    verdict = _judge(found.low >= share, found.high >= share)
    tail = {
        SHOWN: f"all of the interval lies at or above {share:g}",
        NOT_SHOWN: f"the interval holds {share:g}, so the data do not decide",
        CONTRADICTED: f"all of the interval lies below {share:g}",
    }[verdict]
    return Finding(own.media, claim, verdict, f"It reaches {found} of the teacher: {tail}. {_about(found, student)}")


def _as_good(found: Contrast, margin: float) -> str:
    """Whether a difference is shown to be no deficit beyond the margin, nor beyond the interval."""
    if not found.bounded:
        return NOT_SHOWN
    return _judge(found.low >= -margin and found.high >= 0, found.high >= 0)


def _not_below(own: _Scores, baseline: str) -> Finding:
    name = METHODS[baseline]
    claim = f"With four steps, rCM is about as good as {name} or better."
    rcm, other = own.of("rcm", 4), own.of(baseline, 4)
    found = contrast(own.key, rcm, other)
    if found is None:
        return _missing(own, claim, f"rCM and {name} with four steps")
    sentence = f"The difference rCM − {name} in {own.name} is {found.signed()}"
    if not found.bounded:
        return Finding(own.media, claim, NOT_SHOWN, f"{sentence}. {NO_INTERVAL}")
    verdict = _as_good(found, own.margin)
    tail = {
        SHOWN: f"a deficit of more than {own.margin:g} is excluded, and rCM is not below {name} beyond the interval",
        NOT_SHOWN: f"rCM is not below {name} beyond the interval, but a deficit of {own.margin:g} is not excluded "
        "either",
        CONTRADICTED: f"rCM is below {name} beyond the interval",
    }[verdict]
    return Finding(own.media, claim, verdict, f"{sentence}: {tail}. {_about(found, rcm, other)}")


def _differences(own: _Scores, a: str, b: str, keys: Iterable[str]) -> dict[str, tuple[Contrast, str]]:
    """a - b with four steps and whether that shows a > b, of measures that both have."""
    found = {key: contrast(key, own.of(a, 4), own.of(b, 4)) for key in keys}
    return {key: (e, _more(e)) for key, e in found.items() if e is not None}


def _more_diverse(own: _Scores, baseline: str) -> Finding:
    name = METHODS[baseline]
    claim = f"With four steps, rCM is more diverse than {name}."
    rows = _differences(own, "rcm", baseline, keys_of(own.scores, "diversity"))
    deciding = measures(own.scores)
    if not deciding or any(key not in rows for key in deciding):
        return _missing(own, claim, f"the diversity of rCM and {name} with four steps")
    main = {key: rows.pop(key) for key in deciding}
    verdict = _together(verdict for _, verdict in main.values())
    sentence = f"Differences rCM − {name} over seeds of one prompt: {_listed(main)}."
    if rows:
        sentence += f" By hidden factor: {_listed(rows)}."
    return Finding(own.media, claim, verdict, sentence)


def _scm_lacks_detail(own: _Scores) -> Finding:
    keys = DETAIL[own.key]
    measured = "in fine detail" if keys else f"in {own.name}, which holds no measure of fine detail"
    claim = f"With four steps, sCM is worse than rCM {measured}."
    rows = _differences(own, "rcm", "scm", keys or (own.key,))
    if not rows:
        return _missing(own, claim, f"{'the detail of ' if keys else ''}rCM and sCM with four steps")
    verdict = _together(verdict for _, verdict in rows.values())
    return Finding(own.media, claim, verdict, f"Differences rCM − sCM: {_listed(rows)}.")


def _listed(rows: Mapping[str, tuple[Contrast, str]]) -> str:
    return "; ".join(
        f"{label(key)} {found.signed()} ({verdict}{'' if found.paired else ', not paired'})"
        for key, (found, verdict) in rows.items()
    )


def _flat(found: Contrast, margin: float) -> str:
    """Whether a change is shown to be within the margin."""
    if not found.bounded:
        return NOT_SHOWN
    if found.low > margin or found.high < -margin:
        return CONTRADICTED
    return SHOWN if -margin <= found.low and found.high <= margin else NOT_SHOWN


def _one_two_four(own: _Scores) -> Finding:
    """On prompts as easy as GenEval's the paper has images that hardly gain by steps; elsewhere one step is worse."""
    easy = own.key == "geneval.overall"
    claim = (
        "For rCM one, two and four steps are about as good."
        if easy
        else "For rCM one step is worse than two, and two steps are about as good as four."
    )
    first = contrast(own.key, own.of("rcm", 2), own.of("rcm", 1))
    second = contrast(own.key, own.of("rcm", 4), own.of("rcm", 2))
    if first is None or second is None:
        return _missing(own, claim, "rCM with one, two and four steps")
    gain = _flat(first, own.margin) if easy else _more(first)
    flat = _flat(second, own.margin)
    if flat == SHOWN and second.low > 0:
        flat = NOT_SHOWN
    sentence = (
        f"From one to two steps {own.name} changes by {first.signed()} ({gain}), from two to four by "
        f"{second.signed()} (within {own.margin:g}, and no gain beyond the interval: {flat}). "
        f"{_about(second, own.of('rcm', 2))}"
    )
    return Finding(own.media, claim, _together([gain, flat]), sentence)


# --- Ablations -----------------------------------------------------------------------------------------------------


def _sweep(own: _Scores) -> dict[str, float]:
    """Methods with four steps that differ by λ alone, by how many times the scale's it is, ascending."""
    found = {run.method: lambda_times(run.method) for run, _ in in_order(own.scores) if run.steps == 4}
    return dict(sorted(((m, x) for m, x in found.items() if x is not None), key=lambda pair: pair[1]))


def _times(times: float) -> str:
    return "sCM alone" if times == 0 else f"{times:g} λ"


def _lambda_quality(own: _Scores) -> Finding:
    claim = "The λ of rCM is the smallest that keeps quality: less of it is worse, and more is no better."
    swept = _sweep(own)
    if "rcm" not in swept or not any(0 < times < 1 for times in swept.values()):
        return _missing(own, claim, "rCM and of a smaller λ, with four steps")
    rows, verdicts = [], []
    for method, times in swept.items():
        found = contrast(own.key, own.of("rcm", 4), own.of(method, 4))
        if method != "rcm" and found is not None:
            verdicts.append(_more(found) if times < 1 else _as_good(found, own.margin))
            paired = "" if found.paired else ", not paired"
            rows.append(f"{_times(times)} {found.signed()} ({verdicts[-1]}{paired})")
    sentence = f"The differences of rCM with four steps in {own.name} to {'; '.join(rows)}, within {own.margin:g}."
    return Finding(own.media, claim, _together(verdicts), sentence)


def _lambda_diversity(own: _Scores) -> Finding:
    claim = "The larger λ, the less diverse are the samples of rCM."
    swept, keys = list(_sweep(own).items()), measures(own.scores)
    missing = _missing(own, claim, "the diversity at two λ or more, with four steps")
    if len(swept) < 2 or not keys:
        return missing
    verdicts, parts = [], []
    for key in keys:
        ends = contrast(key, own.of(swept[0][0], 4), own.of(swept[-1][0], 4))
        if ends is None:
            return missing
        changes = [
            (f"{_times(x)} to {_times(y)}", found)
            for (a, x), (b, y) in pairwise(swept)
            if (found := contrast(key, own.of(b, 4), own.of(a, 4))) is not None
        ]
        rises = any(found.bounded and found.low > 0 for _, found in changes)
        verdict = _more(ends)
        verdicts.append(NOT_SHOWN if verdict == SHOWN and rises else verdict)
        listed = "; ".join(f"{name} {found.signed()}" for name, found in changes)
        parts.append(
            f"{label(key)} falls by {ends.signed()} from {_times(swept[0][1])} to {_times(swept[-1][1])}, "
            f"{'but not everywhere' if rises else 'and rises nowhere beyond the interval'} ({listed})"
        )
    return Finding(own.media, claim, _together(verdicts), f"With four steps {'; '.join(parts)}.")


def _rollout(own: _Scores, name: str) -> Finding:
    """What the authors answered to a question, not in the paper: random times suit rCM, fixed ones DMD."""
    better, worse = ROLLOUTS[name] if name == "rcm" else ROLLOUTS[name][::-1]
    words = ("random", "fixed") if name == "rcm" else ("fixed", "random")
    claim = f"For {METHODS[name]}, {words[0]} times of rollouts are better than {words[1]} ones (the authors' word)."
    found = contrast(own.key, own.of(better, 4), own.of(worse, 4))
    if found is None:
        return _missing(own, claim, f"{METHODS[better]} and {METHODS[worse]} with four steps")
    beside = _differences(own, better, worse, measures(own.scores))
    sentence = (
        f"The difference {words[0]} − {words[1]} in {own.name} with four steps is {found.signed()}. "
        f"{_about(found, own.of(better, 4), own.of(worse, 4))}"
    )
    if beside:
        sentence += f" In diversity: {'; '.join(f'{label(key)} {e.signed()}' for key, (e, _) in beside.items())}."
    return Finding(own.media, claim, _more(found), sentence)
