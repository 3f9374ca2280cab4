"""What the scores say about each claim of the paper, in one plain sentence a claim.

The rules are the same for every run. A claim is "shown" if the whole 95 % interval supports it,
"contradicted" if the whole interval speaks against it, and otherwise "not shown". A claim with several parts is "shown"
if all of them are, and "contradicted" if one is and none is shown. Diversity is decided by the Vendi score, which takes
all hidden factors together; the factors are told beside it. A claim whose scores are missing is "not shown" and says
what is missing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rcm.report.scores import METHODS, Estimate, Score, compare, difference, in_order, keys_of, label, ratio

SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown", "contradicted"
OVERALL = "shapeeval.overall"
MARGIN = 0.05  # of ShapeEval overall: "about as good"; in GenEval itself gaps of half of it are noise
DIVERSITY = "diversity.vendi"
DETAIL = ("fidelity.psnr", "fidelity.sharpness")  # more is better


@dataclass(frozen=True)
class Finding:
    """One claim: `verdict` is "shown", "not shown" or "contradicted"; `sentence` carries the numbers and intervals."""

    media: str
    claim: str
    verdict: str
    sentence: str


@dataclass(frozen=True)
class _Scores:
    """Scores of one medium, by method and number of steps."""

    media: str
    scores: Sequence[Score]

    def of(self, method: str, steps: int | None = None) -> list[Score]:
        """All training seeds of a method; without a number of steps all there are (the teacher has one number)."""
        return [s for run, s in in_order(self.scores) if run.method == method and steps in (None, run.steps)]


def findings(scores: Sequence[Score]) -> list[Finding]:
    """Findings on every claim, for each medium that was scored; images first."""
    found = []
    for media in sorted({str(score["media"]) for score in scores}, reverse=True):
        own = _Scores(media, [score for score in scores if score["media"] == media])
        found += [_reaches_teacher(own, 4, 0.9), _reaches_teacher(own, 2, 0.8), _one_two_four(own)]
        for baseline in filter(own.of, ("dmd2", "dmd")):  # DMD2 is the paper's, DMD the part that rCM takes of it
            found += [_not_below(own, baseline), _more_diverse(own, baseline)]
        if own.of("scm"):
            found.append(_scm_lacks_detail(own))
    return found


def _judge(low_enough: bool, high_enough: bool) -> str:
    """Verdict of an interval: shown if its lower end suffices, contradicted if not even its upper end does."""
    return SHOWN if low_enough else NOT_SHOWN if high_enough else CONTRADICTED


def _together(verdicts: Iterable[str]) -> str:
    """Verdict of a claim with several parts."""
    found = set(verdicts)
    return SHOWN if found == {SHOWN} else CONTRADICTED if CONTRADICTED in found and SHOWN not in found else NOT_SHOWN


def _missing(own: _Scores, claim: str, what: str) -> Finding:
    return Finding(own.media, claim, NOT_SHOWN, f"There are no scores by prompt of {what}, so nothing can be said.")


def _seeds(*groups: Sequence[Score]) -> str:
    """Which uncertainty an interval covers."""
    count = max(map(len, groups))
    return (
        "Interval over prompts, one training seed."
        if count == 1
        else f"Interval over prompts and {count} training seeds."
    )


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _steps(count: int) -> str:
    return {1: "one step", 2: "two steps", 4: "four steps"}.get(count, f"{count} steps")


def _reaches_teacher(own: _Scores, steps: int, share: float) -> Finding:
    claim = f"With {_steps(steps)}, rCM reaches at least {share:g} of the teacher's ShapeEval overall."
    student, teacher = own.of("rcm", steps), own.of("teacher")
    found = compare(ratio, OVERALL, student, teacher)
    if found is None:
        return _missing(own, claim, f"rCM with {_steps(steps)} and of the teacher")
    verdict = _judge(found.low >= share, found.high >= share)
    tail = {
        SHOWN: f"all of the interval lies at or above {share:g}",
        NOT_SHOWN: f"the interval holds {share:g}, so the data do not decide",
        CONTRADICTED: f"all of the interval lies below {share:g}",
    }[verdict]
    return Finding(own.media, claim, verdict, f"It reaches {found} of the teacher: {tail}. {_seeds(student)}")


def _not_below(own: _Scores, baseline: str) -> Finding:
    name = METHODS[baseline]
    claim = f"With four steps, rCM is about as good as {name} or better."
    rcm, other = own.of("rcm", 4), own.of(baseline, 4)
    found = compare(difference, OVERALL, rcm, other)
    if found is None:
        return _missing(own, claim, f"rCM and {name} with four steps")
    verdict = _judge(found.low >= -MARGIN and found.high >= 0, found.high >= 0)
    tail = {
        SHOWN: f"a deficit of more than {MARGIN:g} is excluded, and rCM is not below {name} beyond the interval",
        NOT_SHOWN: f"rCM is not below {name} beyond the interval, but a deficit of {MARGIN:g} is not excluded either",
        CONTRADICTED: f"rCM is below {name} beyond the interval",
    }[verdict]
    return Finding(
        own.media,
        claim,
        verdict,
        f"The difference rCM − {name} in ShapeEval overall is {_signed(found)}: {tail}. {_seeds(rcm, other)}",
    )


def _differences(own: _Scores, a: str, b: str, keys: Iterable[str]) -> dict[str, tuple[Estimate, str]]:
    """a - b with four steps and whether that shows a > b, of measures that have values by prompt."""
    found = {key: compare(difference, key, own.of(a, 4), own.of(b, 4)) for key in keys}
    return {key: (e, _judge(e.low > 0, e.high >= 0)) for key, e in found.items() if e is not None}


def _more_diverse(own: _Scores, baseline: str) -> Finding:
    name = METHODS[baseline]
    claim = f"With four steps, rCM is more diverse than {name}."
    rows = _differences(own, "rcm", baseline, keys_of(own.scores, "diversity"))
    if DIVERSITY not in rows:
        return _missing(own, claim, f"the diversity of rCM and {name} with four steps")
    main, verdict = rows.pop(DIVERSITY)
    sentence = f"The difference rCM − {name} in the Vendi score over seeds of one prompt is {_signed(main)}."
    if rows:
        sentence += f" By hidden factor: {_listed(rows)}."
    return Finding(own.media, claim, verdict, sentence)


def _scm_lacks_detail(own: _Scores) -> Finding:
    claim = "With four steps, sCM is worse than rCM in fine detail."
    rows = _differences(own, "rcm", "scm", DETAIL)
    if not rows:
        return _missing(own, claim, "the detail of rCM and sCM with four steps")
    verdict = _together(verdict for _, verdict in rows.values())
    return Finding(own.media, claim, verdict, f"Differences rCM − sCM: {_listed(rows)}.")


def _listed(rows: Mapping[str, tuple[Estimate, str]]) -> str:
    return "; ".join(f"{label(key)} {_signed(found)} ({verdict})" for key, (found, verdict) in rows.items())


def _one_two_four(own: _Scores) -> Finding:
    claim = "For rCM one step is worse than two, and two steps are about as good as four."
    first = compare(difference, OVERALL, own.of("rcm", 2), own.of("rcm", 1))
    second = compare(difference, OVERALL, own.of("rcm", 4), own.of("rcm", 2))
    if first is None or second is None:
        return _missing(own, claim, "rCM with one, two and four steps")
    gain = _judge(first.low > 0, first.high > 0)
    flat = SHOWN if -MARGIN <= second.low <= 0 and second.high <= MARGIN else NOT_SHOWN
    if second.low > MARGIN or second.high < -MARGIN:
        flat = CONTRADICTED
    sentence = (
        f"From one to two steps ShapeEval overall changes by {_signed(first)} ({gain}), from two to four by "
        f"{_signed(second)} (within {MARGIN:g}, and no gain beyond the interval: {flat}). {_seeds(own.of('rcm', 2))}"
    )
    return Finding(own.media, claim, _together([gain, flat]), sentence)
