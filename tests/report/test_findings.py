"""Verdicts for scores whose answer is known beforehand."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from rcm.report.findings import CONTRADICTED, NOT_SHOWN, SHOWN, Finding, findings

N = 60
WAVE = 0.3 * np.sin(np.arange(N))  # differs from prompt to prompt, with a mean of nearly nothing


def made(model: str, steps: int, overall: Any, **values: Any) -> dict[str, Any]:
    by_prompt = {"shapeeval.overall": overall, **{key.replace("__", "."): value for key, value in values.items()}}
    lists = {key: np.broadcast_to(value, N).tolist() for key, value in by_prompt.items()}
    metrics = {key: {"value": float(np.mean(value)), "kind": ""} for key, value in lists.items()}
    per_prompt = {"tag": ["one"] * N, **lists}
    return {"model": model, "steps": steps, "media": "images", "metrics": metrics, "per_prompt": per_prompt}


Ask = Callable[..., Finding]


@pytest.fixture
def ask() -> Ask:
    """The one finding whose claim holds the given words."""

    def ask(words: str, *scores: Mapping[str, Any]) -> Finding:
        return next(finding for finding in findings(scores) if words in finding.claim)

    return ask


@pytest.mark.parametrize(
    ("student", "verdict"),
    [(0.76 + WAVE / 10, SHOWN), (0.72 + WAVE, NOT_SHOWN), (0.60 + WAVE / 10, CONTRADICTED)],
)
def test_share_of_the_teacher(ask: Ask, student: Any, verdict: str) -> None:
    finding = ask("four steps, rCM reaches", made("teacher", 20, 0.8), made("rcm-0", 4, student))
    assert finding.verdict == verdict
    assert f"{np.mean(student) / 0.8:.3f}" in finding.sentence


def test_rcm_beside_both_baselines(ask: Ask) -> None:
    values = {"rcm-0": 0.72, "dmd-0": 0.60, "dmd2-0": 0.80}
    scores = [made(model, 4, value + WAVE / 10, diversity__vendi=value) for model, value in values.items()]
    assert ask("as good as DMD or", *scores).verdict == SHOWN
    assert ask("as good as DMD2 or", *scores).verdict == CONTRADICTED
    assert "rCM − DMD2 in ShapeEval overall is −0.080" in ask("as good as DMD2 or", *scores).sentence
    assert ask("more diverse than DMD.", *scores).verdict == SHOWN
    assert ask("more diverse than DMD2.", *scores).verdict == CONTRADICTED
    assert not [f for f in findings(scores[:2]) if "DMD2" in f.claim]  # nothing is said of what was not trained


@pytest.mark.parametrize(
    ("rcm", "verdict"),
    [
        (0.72 + WAVE / 10, SHOWN),
        (0.69 + WAVE / 2, SHOWN),  # a deficit of 0.01 is within the margin of 0.05
        (0.69 + WAVE / 10, CONTRADICTED),  # the same deficit, but beyond the interval
        (0.67 + WAVE, NOT_SHOWN),  # a deficit between 0.08 and none
    ],
)
def test_rcm_beside_dmd(ask: Ask, rcm: Any, verdict: str) -> None:
    assert ask("as good as DMD", made("rcm-0", 4, rcm), made("dmd-0", 4, 0.70)).verdict == verdict


def test_rcm_below_dmd_beyond_the_interval(ask: Ask) -> None:
    finding = ask("as good as DMD", made("rcm-0", 4, 0.6 + WAVE / 10), made("dmd-0", 4, 0.70))
    assert finding.verdict == CONTRADICTED
    assert "is −0.099" in finding.sentence


@pytest.mark.parametrize(("rcm", "verdict"), [(5, SHOWN), (3 + 0.01 * WAVE, NOT_SHOWN), (2, CONTRADICTED)])
def test_vendi_decides_on_diversity(ask: Ask, rcm: Any, verdict: str) -> None:
    dmd = made("dmd-0", 4, 0.7, diversity__vendi=3.0, diversity__cell_entropy=1.0)
    finding = ask("more diverse", made("rcm-0", 4, 0.7, diversity__vendi=rcm, diversity__cell_entropy=2.0), dmd)
    assert finding.verdict == verdict
    assert "Cell entropy +1.000 [+1.000, +1.000] (shown)" in finding.sentence


@pytest.mark.parametrize(
    ("psnr", "sharpness", "verdict"),
    [(30, 0.9, SHOWN), (30, 0.5, NOT_SHOWN), (20, 0.9, NOT_SHOWN), (20, 0.5, CONTRADICTED)],
)
def test_detail_needs_both_measures(ask: Ask, psnr: float, sharpness: float, verdict: str) -> None:
    scm = made("scm-0", 4, 0.7, fidelity__psnr=25.0, fidelity__sharpness=0.7)
    rcm = made("rcm-0", 4, 0.7, fidelity__psnr=psnr, fidelity__sharpness=sharpness)
    assert ask("fine detail", scm, rcm).verdict == verdict


@pytest.mark.parametrize(
    ("one", "two", "four", "verdict"),
    [
        (0.5, 0.70, 0.70 + WAVE / 10, SHOWN),
        (0.5, 0.70, 0.71, NOT_SHOWN),  # a small gain, but beyond the interval
        (0.5, 0.60, 0.80, NOT_SHOWN),  # gains, but goes on gaining: one half shown, the other contradicted
        (0.8, 0.60, 0.80, CONTRADICTED),
        (0.5, 0.70, 0.72 + WAVE, NOT_SHOWN),
    ],
)
def test_one_two_four(ask: Ask, one: Any, two: Any, four: Any, verdict: str) -> None:
    scores = [made("rcm-0", steps, overall) for steps, overall in ((1, one), (2, two), (4, four))]
    assert ask("one step is worse", *scores).verdict == verdict


def test_missing_scores_are_named(ask: Ask) -> None:
    finding = ask("four steps, rCM reaches", made("teacher", 20, 0.8))
    assert finding.verdict == NOT_SHOWN
    assert "no scores" in finding.sentence and "rCM with four steps" in finding.sentence


def test_one_training_seed_is_called_one(ask: Ask) -> None:
    teacher, student = made("teacher", 20, 0.8), made("rcm-0", 4, 0.8)
    assert "one training seed" in ask("four steps, rCM reaches", teacher, student).sentence
    second = made("rcm-1", 4, 0.8)
    assert "2 training seeds" in ask("four steps, rCM reaches", teacher, student, second).sentence


def test_same_scores_same_words(scores: dict[str, list[dict[str, Any]]]) -> None:
    everything = [*scores["images"], *scores["clips"]]
    assert findings(everything) == findings(everything[::-1])
    assert {finding.media for finding in findings(everything)} == {"images", "clips"}


# --- Other evaluators ----------------------------------------------------------------------------------------------


def geneval(model: str, steps: int, overall: Any, **values: Any) -> dict[str, Any]:
    """A score by GenEval: nothing of the tiny world's."""
    score = made(model, steps, overall, **values)
    for part in (score["metrics"], score["per_prompt"]):
        part["geneval.overall"] = part.pop("shapeeval.overall")
    return score


def vbench(model: str, steps: int, total: float, half: float | None = 0.004) -> dict[str, Any]:
    """A score by VBench: a total without values by prompt, with an interval of this half-width or none."""
    low, high = (None, None) if half is None else (total - half, total + half)
    metrics = {"vbench.total": {"value": total, "low": low, "high": high, "kind": "official"}}
    return {"model": model, "steps": steps, "media": "clips", "metrics": metrics, "per_prompt": {"tag": ["one"]}}


@pytest.mark.parametrize(
    ("rcm", "verdict"),
    [
        (0.795 + WAVE / 5, SHOWN),  # -0.005 with 0.011 to both sides: within GenEval's 0.025
        (0.78 + WAVE / 2, NOT_SHOWN),  # -0.02 with 0.027 to both sides: within ShapeEval's 0.05 alone
        (0.78 + WAVE / 20, CONTRADICTED),  # -0.02 with 0.003 to both sides: beyond the interval
    ],
)
def test_geneval_has_its_own_margin(ask: Ask, rcm: Any, verdict: str) -> None:
    finding = ask("as good as DMD2", geneval("rcm-0", 4, rcm), geneval("dmd2-0", 4, 0.8))
    assert finding.verdict == verdict
    assert "in GenEval overall is" in finding.sentence


def test_geneval_asks_for_a_larger_share_and_for_no_gain_by_steps(ask: Ask) -> None:
    scores = [geneval("teacher", 35, 0.8), *(geneval("rcm-0", k, x) for k, x in ((1, 0.74), (2, 0.75), (4, 0.75)))]
    finding = ask("With four steps, rCM reaches at least 0.95 of the teacher's GenEval overall", *scores)
    assert finding.verdict == CONTRADICTED  # 0.75 / 0.8 is 0.938; 0.9 would be enough in the tiny world
    assert "0.938" in finding.sentence
    assert ask("one, two and four steps are about as good", *scores).verdict == SHOWN
    scores[1] = geneval("rcm-0", 1, 0.70)
    assert ask("one, two and four steps are about as good", *scores).verdict == NOT_SHOWN


def test_totals_without_values_by_prompt_get_unpaired_intervals(ask: Ask) -> None:
    finding = ask("as good as DMD2", vbench("rcm-0", 4, 0.8443), vbench("dmd2-0", 4, 0.8456))
    assert finding.verdict == NOT_SHOWN
    assert "VBench total is −0.0013 [−0.0070, +0.0044]" in finding.sentence  # 0.004 √2 to both sides
    assert "not paired" in finding.sentence
    far = ask("as good as DMD2", vbench("rcm-0", 4, 0.84), vbench("dmd2-0", 4, 0.82))
    assert far.verdict == SHOWN
    teacher = ask("With four steps, rCM reaches the teacher's", vbench("rcm-0", 4, 0.84), vbench("teacher", 50, 0.80))
    assert teacher.verdict == SHOWN
    # 1.05 and 1.05 √((0.004 / 0.84)² + (0.004 / 0.8)²) = 0.00725 to both sides
    assert "1.050 [1.043, 1.057]" in teacher.sentence


def test_totals_without_any_interval_show_nothing(ask: Ask) -> None:
    scores = [vbench("rcm-0", 4, 0.9, None), vbench("dmd2-0", 4, 0.2, None), vbench("teacher", 50, 0.2, None)]
    for words in ("as good as DMD2", "With four steps, rCM reaches"):
        finding = ask(words, *scores)
        assert finding.verdict == NOT_SHOWN
        assert "neither values by prompt nor intervals" in finding.sentence
        assert "nan" not in finding.sentence.lower()


@pytest.mark.parametrize(
    ("clip", "dino", "vbench2", "verdict"),
    [(0.2, 0.3, 0.5, SHOWN), (0.2, 0.1, 0.5, NOT_SHOWN), (0.2, 0.3, 0.3, NOT_SHOWN), (0.1, 0.1, 0.3, CONTRADICTED)],
)
def test_measures_decide_on_diversity_together(
    ask: Ask, clip: float, dino: float, vbench2: float, verdict: str
) -> None:
    names = ("diversity__clip_distance", "diversity__dino_distance", "diversity__vbench2")
    rcm = geneval("rcm-0", 4, 0.8, **dict(zip(names, (clip, dino, vbench2), strict=True)))
    dmd2 = geneval("dmd2-0", 4, 0.8, **dict(zip(names, (0.15, 0.2, 0.4), strict=True)))
    finding = ask("more diverse than DMD2", rcm, dmd2)
    assert finding.verdict == verdict
    assert f"VBench-2.0 diversity {'+' if vbench2 > 0.4 else '−'}0.100" in finding.sentence


def of_two_evaluators(*scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Each score as two evaluators give it."""
    names = ("GenEval (HF Mask2Former)", "GenEval (mmdet)")
    return [{**score, "evaluator": {"name": name, "version": "1"}} for name in names for score in scores]


def test_scores_of_two_evaluators_are_looked_at_apart() -> None:
    one, other = of_two_evaluators(geneval("rcm-0", 4, 0.8))[0], of_two_evaluators(geneval("dmd2-0", 4, 0.8))[1]
    said = [finding.sentence for finding in findings([one, other]) if "as good as DMD2" in finding.claim]
    assert said == ["There are no scores of rCM and DMD2 with four steps, so nothing can be said."]


def test_findings_say_by_which_evaluator() -> None:
    found = findings(of_two_evaluators(geneval("rcm-0", 4, 0.8), geneval("dmd2-0", 4, 0.8)))
    said = [finding.sentence for finding in found if "as good as DMD2" in finding.claim]
    assert [" in GenEval (HF Mask2Former) overall is " in said[0], " in GenEval (mmdet) overall is " in said[1]] == [
        *(True, True)
    ]


def test_no_difference_has_no_sign(ask: Ask) -> None:
    finding = ask("as good as DMD2", geneval("rcm-0", 4, 0.8 - 1e-6), geneval("dmd2-0", 4, 0.8))
    assert "is 0.0000 [0.0000, 0.0000]" in finding.sentence


# --- Ablations -----------------------------------------------------------------------------------------------------


def test_ablations_are_found_only_where_there_are_some() -> None:
    plain = [made("rcm-0", 4, 0.8), made("scm-0", 4, 0.7), made("dmd-0", 4, 0.8)]
    assert not [f for f in findings(plain) if "λ" in f.claim or "rollouts" in f.claim]
    more = [*plain, made("rcm-lambda-10-0", 4, 0.8), made("dmd-random-rollout-0", 4, 0.8)]
    claims = [f.claim for f in findings(more)]
    assert sum("λ" in claim for claim in claims) == 2
    assert sum("rollouts" in claim for claim in claims) == 1


@pytest.mark.parametrize(
    ("small", "large", "verdict", "words"),
    [
        (0.6, 0.8 + WAVE / 20, SHOWN, "0.1 λ +0.200 [+0.200, +0.200] (shown)"),
        (0.8, 0.8 + WAVE / 20, NOT_SHOWN, "0.1 λ 0.0000 [0.0000, 0.0000] (not shown)"),
        (0.6, 0.82, NOT_SHOWN, "10 λ −0.020 [−0.020, −0.020] (contradicted)"),  # more of it is better
        (0.9, 0.82, CONTRADICTED, "0.1 λ −0.100 [−0.100, −0.100] (contradicted)"),
    ],
)
def test_quality_over_lambda(ask: Ask, small: Any, large: Any, verdict: str, words: str) -> None:
    scores = [made("rcm-0", 4, 0.8), made("rcm-lambda-0.1-0", 4, small), made("rcm-lambda-10-0", 4, large)]
    finding = ask("smallest that keeps quality", *scores)
    assert finding.verdict == verdict
    assert words in finding.sentence


@pytest.mark.parametrize(
    ("vendi", "verdict"),
    [((6, 5, 4, 3), SHOWN), ((6, 3, 4, 3), NOT_SHOWN), ((3, 4, 5, 6), CONTRADICTED)],
)
def test_diversity_over_lambda(ask: Ask, vendi: tuple[float, ...], verdict: str) -> None:
    models = ("rcm-lambda-100-0", "rcm-0", "scm-0", "rcm-lambda-0.1-0")  # in no order
    by_model = dict(zip(("scm-0", "rcm-lambda-0.1-0", "rcm-0", "rcm-lambda-100-0"), vendi, strict=True))
    finding = ask("less diverse", *(made(model, 4, 0.8, diversity__vendi=by_model[model]) for model in models))
    assert finding.verdict == verdict
    assert "sCM alone to 100 λ" in finding.sentence


def test_rollouts(ask: Ask) -> None:
    values = {"rcm-0": 0.8, "rcm-fixed-rollout-0": 0.7, "dmd-0": 0.7, "dmd-random-rollout-0": 0.8}
    scores = [made(model, 4, value + WAVE / 10) for model, value in values.items()]
    rcm, dmd = ask("For rCM, random", *scores), ask("For DMD, fixed", *scores)
    assert (rcm.verdict, dmd.verdict) == (SHOWN, CONTRADICTED)
    assert "random − fixed in ShapeEval overall with four steps is +0.100" in rcm.sentence
    assert "fixed − random in ShapeEval overall with four steps is −0.100" in dmd.sentence
