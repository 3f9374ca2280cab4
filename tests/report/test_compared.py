"""Groups of scores that may be compared, seeds together, and differences where scores are no means over prompts."""

from typing import Any

import numpy as np
import pytest

from rcm.artefact import UserError
from rcm.report.compared import by_medium, contrast, pooled
from rcm.report.facts import comparable, facts

KEY = "vbench.color"


def of(model: str, reported: float, by_prompt: list[float], **evaluator: Any) -> dict[str, Any]:
    entry = {"value": reported, "low": reported - 0.1, "high": reported + 0.1, "kind": "official"}
    said = {"name": "VBench (official code)", "version": "1", "prompts_sha256": "ab", **evaluator}
    return {
        "model": model,
        "steps": 4,
        "media": "clips",
        "n_prompts": len(by_prompt),
        "n_samples": 5,
        "metrics": {KEY: entry},
        "evaluator": said,
        "per_prompt": {"tag": ["color"] * len(by_prompt), KEY: by_prompt},
    }


def names(groups: list[list[Any]]) -> list[list[str]]:
    return [[score["model"] for score in group] for group in groups]


def test_seeds_are_pooled_to_the_mean_of_what_they_report() -> None:
    a, b = of("rcm-0", 0.9, [1.0, 0.5, 0.6]), of("rcm-1", 0.7, [0.5, 0.5, 0.2])
    found = pooled(KEY, [a, b])
    assert found is not None
    assert found.value == pytest.approx(0.8)  # the means over prompts are 0.7 and 0.4
    assert found.low < 0.8 < found.high
    assert found.high - found.low < 0.6  # moved, not widened


def test_differences_are_of_reported_scores_and_paired_by_prompt() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(0.5, 0.2, 200)
    a, b = of("rcm-0", 0.9, list(shared + 0.1)), of("dmd2-0", 0.7, list(shared))
    found = contrast(KEY, [a], [b])
    assert found is not None and found.paired
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))  # nothing but the shift differs
    share = contrast(KEY, [a], [b], relative=True)
    assert share is not None
    assert share.value == pytest.approx(0.9 / 0.7)


def test_one_score_is_what_it_reports() -> None:
    found = pooled(KEY, [of("rcm-0", 0.9, [0.1])])
    assert found is not None
    assert (found.value, found.low, found.high) == (0.9, 0.8, 1.0)
    assert pooled("vbench.scene", [of("rcm-0", 0.9, [0.1])]) is None


def started(model: str, sigma_max: float, **evaluator: Any) -> dict[str, Any]:
    return of(model, 0.5, [0.5], sampling={"sigma_max": sigma_max}, **evaluator)


def test_the_teacher_and_controls_go_with_students_of_any_noise() -> None:
    teacher, oracle = started("teacher", 5000.0), started("oracle", 0.0)
    scores = [started("rcm-0", 80.0), teacher, started("dmd2-0", 1600.0), oracle]
    assert names(comparable(scores)) == [["teacher", "dmd2-0", "oracle"], ["teacher", "rcm-0", "oracle"]]
    assert names(comparable([scores[0], teacher, started("scm-0", 80.0)])) == [["teacher", "scm-0", "rcm-0"]]
    with pytest.raises(UserError, match="the scores of clips differ in σ_max and cannot be compared: 1600; 80"):
        by_medium(scores)
    for group in comparable(scores):  # what stands in one group never fails on one axis
        assert list(by_medium(group)) == ["clips"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"versions": {"vbench": "0.1.4", "torch": "2.3.1"}}, "version of the evaluator's package"),
        ({"sampling": {"width": 832, "height": 480, "frames": 49}}, "size"),
        ({"missing": ["a-0.mp4", "b-0.mp4", "c-0.mp4", "e-0.mp4"]}, "what is missing"),
        ({"diversity": {"prompts_sha256": "cd", "samples": 480, "by": {}}}, "samples or models of diversity"),
        ({"native": {"models": {"dino": "0e"}}}, "models of native dimensions"),
    ],
)
def test_what_else_sets_scores_apart(change: dict[str, Any], word: str) -> None:
    usual = {
        "versions": {"vbench": "0.1.5", "torch": "2.3.1"},
        "sampling": {"width": 832, "height": 480, "frames": 81},
        "missing": ["a-0.mp4", "b-0.mp4", "c-0.mp4", "d-0.mp4"],
        "diversity": {"prompts_sha256": "ab", "samples": 480, "by": {}},
        "native": {"models": {"dino": "0d"}},
    }
    first, other = of("rcm-0", 0.5, [0.5], **usual), of("scm-0", 0.5, [0.5], **usual | change)
    with pytest.raises(UserError, match=f"differ in {word} and"):
        by_medium([first, other])
    torch = {"versions": {"vbench": "0.1.5", "torch": "2.4.0"}}
    assert len(by_medium([first, of("scm-0", 0.5, [0.5], **usual | torch)])["clips"]) == 2


def test_samples_that_no_one_counted_part_nothing() -> None:
    a, b = (of(model, 0.5, [0.5], samples_uncounted=True) for model in ("rcm-0", "scm-0"))
    assert len(comparable([a, b | {"n_samples": 4}])) == 1
    assert len(comparable([of("rcm-0", 0.5, [0.5]), of("scm-0", 0.5, [0.5]) | {"n_samples": 4}])) == 2


def test_who_does_not_say_its_evaluator_is_of_the_tiny_world_only_by_its_scores() -> None:
    score = of("rcm-0", 0.5, [0.5], name=None)
    assert facts(score)["evaluator"] == "unknown"
    assert facts(score | {"metrics": {"shapeeval.overall": score["metrics"][KEY]}})["evaluator"] == "ShapeEval"
