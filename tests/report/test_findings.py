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
    assert "rCM − DMD2 in ShapeEval overall is -0.080" in ask("as good as DMD2 or", *scores).sentence
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
    assert "-0.1" in finding.sentence


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
