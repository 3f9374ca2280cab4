"""Names and order of runs, and the paired bootstrap against closed forms."""

from typing import Any

import numpy as np
import pytest

from rcm.report.scores import (
    Run,
    compare,
    difference,
    headline,
    in_order,
    joined,
    keys_of,
    lacking,
    minus,
    number,
    ratio,
    run_of,
    signed,
)


def with_values(values: Any, *, tags: list[str] | None = None, key: str = "shapeeval.overall") -> dict[str, Any]:
    values = [float(v) for v in values]
    return {"per_prompt": {"tag": tags or ["one"] * len(values), key: values}}


@pytest.mark.parametrize(
    ("model", "run"),
    [("rcm-1", Run("rcm", 1, 4)), ("teacher", Run("teacher", None, 4)), ("other-0", Run("other", 0, 4))],
)
def test_models_are_methods_and_seeds(model: str, run: Run) -> None:
    assert run_of(model, 4) == run


def test_teacher_stands_first_and_controls_last() -> None:
    models = [("shuffled", 0), ("dmd2-0", 4), ("rcm-0", 4), ("oracle", 0), ("rcm-0", 1), ("scm-0", 2)]
    models += [("teacher", 20), ("dmd-0", 1)]
    found = [(s["model"], s["steps"]) for _, s in in_order({"model": m, "steps": k} for m, k in models)]
    assert found == [
        *[("teacher", 20), ("scm-0", 2), ("dmd-0", 1), ("dmd2-0", 4), ("rcm-0", 1), ("rcm-0", 4)],
        *[("oracle", 0), ("shuffled", 0)],
    ]


def test_variants_are_methods_of_their_own() -> None:
    run = run_of("rcm-lambda-0.1-2", 4)
    assert (run.method, run.seed, run.label) == ("rcm-lambda-0.1", 2, "rCM (0.1 λ)")
    assert [run_of(f"{name}-0", 4).label for name in ("rcm-fixed-rollout", "dmd-random-rollout")] == [
        *("rCM (fixed times)", "DMD (random times)")
    ]


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (["diversity.vendi", "shapeeval.counting", "shapeeval.overall"], "shapeeval.overall"),
        (["geneval.colors", "geneval.overall"], "geneval.overall"),
        (["vbench.quality", "vbench.total"], "vbench.total"),
        (["vbench_native.temporal_flickering", "diversity.clip_distance"], None),
    ],
)
def test_headline_is_the_overall_score_of_whatever_was_measured(keys: list[str], found: str | None) -> None:
    assert headline({"metrics": dict.fromkeys(keys)}) == found


def test_totals_of_some_dimensions_sum_up_nothing() -> None:
    score = {
        "metrics": {"vbench.total": {}},
        "evaluator": {"missing": ["color", "scene", "a cat-3.mp4", "prompt 3 of diversity has 18 of 20 samples"]},
    }
    assert lacking(score) == (["color", "scene"], ["a cat-3.mp4", "prompt 3 of diversity has 18 of 20 samples"])
    assert headline(score) is None
    assert headline(score | {"evaluator": {"missing": ["a cat-3.mp4"]}}) == "vbench.total"


def test_difference_has_the_standard_error_of_paired_means() -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 1.0, 400)  # common to both, so it cancels in a paired comparison
    a, b = shared + rng.normal(0.2, 0.1, 400), shared + rng.normal(0, 0.1, 400)
    found = compare(difference, "shapeeval.overall", [with_values(a)], [with_values(b)])
    assert found is not None
    half = 1.96 * np.std(a - b) / np.sqrt(400)
    assert found.value == pytest.approx(np.mean(a - b), abs=1e-12)
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_overall_weighs_tasks_not_prompts() -> None:
    a = with_values([1, 1, 1, 0], tags=["x", "x", "x", "y"])
    b = with_values([1, 1, 1, 1], tags=["x", "x", "x", "y"])
    found = compare(ratio, "shapeeval.overall", [a], [b])
    assert found is not None
    assert found.value == 0.5  # (1 + 0) / 2 over tasks, where prompts would give 0.75
    assert (found.low, found.high) == pytest.approx(
        (0.5, 0.5)
    )  # prompts of one task are all alike: nothing to resample


def test_overall_of_frames_weighs_tasks_too() -> None:
    score = with_values([1, 1, 1, 0], tags=["x", "x", "x", "y"], key="shapeeval_frames.overall")
    found = compare(lambda mean: mean, "shapeeval_frames.overall", [score])
    assert found is not None
    assert found.value == 0.5


def test_equal_scores_differ_by_nothing() -> None:
    values = np.random.default_rng(2).random(50)
    found = compare(difference, "k", [with_values(values, key="k")], [with_values(values, key="k")])
    assert found is not None
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_interval_covers_training_seeds() -> None:
    flat = [with_values(np.full(30, level), key="k") for level in (0.4, 0.5, 0.6)]
    found = compare(lambda mean: mean, "k", flat)
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert found.low == pytest.approx(0.4)  # a resample may hold the worst seed three times: 1 in 27
    assert found.high == pytest.approx(0.6)


def test_prompts_without_a_value_are_left_out_of_both() -> None:
    nan = float("nan")
    a, b = with_values([1, nan, 3], key="k"), with_values([0, 5, nan], key="k")
    found = compare(difference, "k", [a], [b])
    assert found is not None
    assert found.value == 1


@pytest.mark.parametrize(
    "groups",
    [
        ([], [with_values([1])]),
        ([with_values([1], key="other")], [with_values([1])]),
        ([with_values([1, 2])], [with_values([1])]),
        ([with_values([1])], [with_values([0])]),  # a ratio to nothing
        ([with_values([float("nan")])], [with_values([1])]),
    ],
)
def test_nothing_is_said_without_values(groups: Any) -> None:
    assert compare(ratio, "shapeeval.overall", *groups) is None


def test_numbers_keep_three_decimals_or_two() -> None:
    assert [number(x) for x in (0.12345, -0.5, 31.2, float("nan"))] == ["0.123", "−0.500", "31.20", "–"]


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert [number(-0.0004), signed(-0.0004), signed(0.0004), signed(-0.0004, 4)] == [
        "0.000",
        "0.000",
        "0.000",
        "−0.0004",
    ]
    assert [signed(0.25), signed(-12.5, 1), minus("-3e-08")] == ["+0.250", "−12.5", "−3e−08"]
    assert [joined([]), joined(["a"]), joined("abc")] == ["", "a", "a, b and c"]


def test_measures_without_any_value_are_none() -> None:
    scores = [{"metrics": {"diversity.a": {"value": None}, "diversity.b": {"value": value}}} for value in (None, 0.0)]
    assert keys_of(scores, "diversity") == ["diversity.b"]
    assert keys_of(scores[:1], "diversity") == []
