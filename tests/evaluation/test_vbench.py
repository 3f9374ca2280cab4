"""VBench's totals against the numbers of its own aggregation, and scores of a small suite worked out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcm.artefact import UserError
from rcm.evaluation import bootstrap, vbench
from rcm.evaluation.measured import Measured
from rcm.evaluation.samples import Expected

ORDER = (  # of the official aggregation
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
GOLDEN = {
    "half": (
        dict.fromkeys(ORDER, 0.5),
        {"quality": 0.14336085903893606, "semantic": 0.8454518533083267, "total": 0.2837790578928142},
    ),
    "best": (
        {**dict.fromkeys(ORDER, 1.0), "motion_smoothness": 0.9975, "scene": 0.8222, "appearance_style": 0.2855}
        | {"temporal_style": 0.364, "overall_consistency": 0.364},
        {"quality": 1.0, "semantic": 1.0, "total": 1.0},
    ),
    "ramp": (
        {name: 0.05 * i for i, name in enumerate(ORDER, start=1)},
        {"quality": -0.39771809333633457, "semantic": 1.1116926380690895, "total": -0.09583594705524975},
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_aggregate_gives_the_official_totals(case: str) -> None:
    raw, expected = GOLDEN[case]
    assert vbench.aggregate(raw) == pytest.approx(expected, abs=1e-12, rel=0)


def test_a_missing_dimension_is_an_error_or_raw_zero() -> None:
    raw = {name: value for name, value in GOLDEN["half"][0].items() if name != "motion_smoothness"}
    with pytest.raises(UserError, match="lack motion_smoothness"):
        vbench.aggregate(raw)
    found = vbench.aggregate(raw, allow_missing=True)
    assert found == pytest.approx(vbench.aggregate({**raw, "motion_smoothness": 0.0}), abs=1e-15)
    # its term falls from (.5 - .706) / .2915 to -.706 / .2915
    expected = GOLDEN["half"][1]["quality"] - 0.5 / 0.2915 / 6.5
    assert found["quality"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subject consistency": 0.9}, "no dimension subject consistency"),
        ({"color": float("nan")}, "color is nan"),
        ({"scene": "0.5"}, "scene is '0.5'"),
        ({"scene": None}, "scene is None"),
        ({"human_action": True}, "human_action is True"),
        ({"color": 83.0}, "color is 83.0; expected a number, a fraction such as 0.83"),
        ({"color": float("inf")}, "color is inf"),
        ({"color": 10**400}, "color is 1000"),
    ],
)
def test_what_is_no_number_of_a_dimension_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        vbench.aggregate({**GOLDEN["half"][0], **change})


def test_numbers_of_numpy_are_numbers() -> None:
    raw = GOLDEN["best"][0]
    of_numpy = {name: np.int64(1) if value == 1 else np.float32(value) for name, value in raw.items()}
    assert vbench.aggregate(of_numpy) == pytest.approx(vbench.aggregate(raw), abs=1e-6)


# --- Scores --------------------------------------------------------------------------------------------------------

SUITE: list[dict[str, Any]] = [
    {"prompt": "a long bird", "name": "a bird", "dimension": ["object_class"]},
    {"prompt": "a long cat-fish", "name": "a cat-fish", "dimension": ["object_class"]},
    {"prompt": "a long red car", "name": "a red car", "dimension": ["color"]},
    {"prompt": "a long blue car", "name": "a blue car", "dimension": ["color"]},
    *(
        {
            "prompt": f"a long dog {i}",
            "name": f"dog {i}, running.",
            "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"],
        }
        for i in range(4)
    ),
    {"prompt": "a long still", "name": "a still", "dimension": ["temporal_flickering"]},
    {"prompt": "a long beach", "name": "a beach", "dimension": ["background_consistency", "scene"]},
    {
        "prompt": "a long bund",
        "name": "the bund",
        "dimension": ["appearance_style", "overall_consistency", "aesthetic_quality", "imaging_quality"],
    },
    {"prompt": "a long zoom", "name": "zoom", "dimension": ["temporal_style"]},
    {"prompt": "a long jog", "name": "A person is jogging", "dimension": ["human_action"]},
    {"prompt": "a long pair", "name": "a and b", "dimension": ["multiple_objects"]},
    {"prompt": "a long side", "name": "a left of b", "dimension": ["spatial_relationship"]},
]
EXPECTED = Expected(SUITE, 2)


def video(name: str, index: int) -> str:
    return f"/somewhere/my-runs_2/{name}-{index}.mp4"


def official_results() -> dict[str, Any]:
    """Two videos of each prompt, with values drawn at random; scores are means over videos."""
    rng = np.random.default_rng(0)
    results: dict[str, Any] = {}
    for dimension in ORDER:
        names = [item["name"] for item in SUITE if dimension in item["dimension"]]
        entries: list[dict[str, Any]] = []
        for name in names:
            for index in range(2):
                value: Any = round(float(rng.uniform(0.2, 0.9)), 3)
                if dimension in ("dynamic_degree", "human_action"):
                    value = bool(value > 0.5)
                entries.append({"video_path": video(name, index), "video_results": value, "cnt_per_video": 3})
        score = float(np.mean([entry["video_results"] for entry in entries]))
        if dimension == "imaging_quality":  # videos stay at 0 … 100
            for entry in entries:
                entry["video_results"] *= 100
        results[dimension] = [score, entries]
    return results


def wrapped(results: dict[str, Any], **about: Any) -> dict[str, Any]:
    header = {"official": "vbench", "version": "1", "versions": {"vbench": "0.1.5"}, "device": "H100", "gpus": 1}
    return {**header, "info_sha256": "0", "missing": [], "failed": {}, "static": {}, **about, "results": results}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def written(content: Any) -> Path:
        path = tmp_path / "official.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return written


def scored(official: Path | None, **options: Any) -> dict[str, Any]:
    options = {"protocol": "vbench", "expected": EXPECTED, "resamples": 400, **options}
    return vbench.evaluation(official=official, model="rcm-0", steps=4, **options).scores


def test_scores_are_the_official_files(write: Callable[[Any], Path]) -> None:
    results = official_results()
    scores = scored(write(wrapped(results)))
    metrics = scores["metrics"]
    for dimension in ORDER:
        assert metrics[f"vbench.{dimension}"]["value"] == results[dimension][0]
        assert metrics[f"vbench.{dimension}"]["kind"] == "official"
    totals = vbench.aggregate({name: entry[0] for name, entry in results.items()})
    assert {name: metrics[f"vbench.{name}"]["value"] for name in totals} == totals
    assert list(metrics)[:3] == ["vbench.total", "vbench.quality", "vbench.semantic"]
    assert metrics["vbench.color"]["n_prompts"] == 2
    assert metrics["vbench.total"]["n_prompts"] == scores["n_prompts"] == len(SUITE)
    assert scores["n_samples"] == 2 * len(SUITE)
    evaluator = scores["evaluator"]
    assert (evaluator["name"], evaluator["gpus"], evaluator["device"]) == ("VBench (official code)", 1, "H100")
    assert evaluator["videos"]["subject_consistency"] == 8
    assert evaluator["missing"] == []
    json.dumps(scores, allow_nan=False)


def test_values_by_prompt_are_means_over_its_videos(write: Callable[[Any], Path]) -> None:
    results = official_results()
    columns = scored(write(results))["per_prompt"]
    names = [item["name"] for item in SUITE]
    fish = [e["video_results"] for e in results["object_class"][1] if "cat-fish" in e["video_path"]]
    assert columns["vbench.object_class"][names.index("a cat-fish")] == pytest.approx(sum(fish) / 2)
    assert columns["vbench.object_class"][names.index("zoom")] is None
    bund = [e["video_results"] for e in results["imaging_quality"][1]]
    assert columns["vbench.imaging_quality"][names.index("the bund")] == pytest.approx(sum(bund) / 200)
    assert columns["tag"][names.index("dog 0, running.")] == "subject_consistency+motion_smoothness+dynamic_degree"


def test_a_file_of_the_official_code_itself_is_read_but_says_no_device(write: Callable[[Any], Path]) -> None:
    evaluator = scored(write(official_results()))["evaluator"]
    assert evaluator["device"] is evaluator["versions"] is evaluator["gpus"] is None


def test_intervals_are_of_the_prompts_of_a_dimension(write: Callable[[Any], Path]) -> None:
    results = official_results()
    for index, entry in enumerate(results["object_class"][1]):
        entry["video_results"] = float(index < 2)  # one prompt all right, one all wrong
    results["object_class"][0] = 0.5
    metric = scored(write(results))["metrics"]["vbench.object_class"]
    assert (metric["low"], metric["value"], metric["high"]) == (0.0, 0.5, 1.0)


def test_where_the_mean_over_prompts_is_not_the_official_score_the_interval_moves_with_it(
    write: Callable[[Any], Path],
) -> None:
    results = official_results()
    plain = scored(write(results))["metrics"]
    results["subject_consistency"][0] += 0.03
    moved = scored(write(results))["metrics"]
    for bound in ("low", "value", "high"):
        key = "vbench.subject_consistency"
        assert moved[key][bound] == pytest.approx(plain[key][bound] + 0.03)
        added = 0.03 / (1 - 0.1462) / 6.5 * 0.8
        assert moved["vbench.total"][bound] == pytest.approx(plain["vbench.total"][bound] + added)


def test_the_interval_of_the_total_is_that_of_its_dimensions_together(write: Callable[[Any], Path]) -> None:
    """Subject consistency and dynamic degree are of the same prompts: all else equal, their errors may cancel."""
    results = official_results()
    for dimension in ORDER:
        for entry in results[dimension][1]:
            entry["video_results"] = 0.5
        results[dimension][0] = 0.5
    subject, dynamic = results["subject_consistency"], results["dynamic_degree"]
    for index in range(8):
        good = index % 4 < 2
        subject[1][index]["video_results"] = 0.5 + (0.1 if good else -0.1) * (1 - 0.1462)
        dynamic[1][index]["video_results"] = 0.5 + (0.2 if not good else -0.2)  # half the weight
    found = scored(write(results))["metrics"]
    assert found["vbench.quality"]["high"] == pytest.approx(found["vbench.quality"]["low"], abs=1e-12)
    assert found["vbench.subject_consistency"]["high"] > found["vbench.subject_consistency"]["low"] + 0.05


def test_pseudo_values_of_the_total_have_its_mean_and_its_spread(write: Callable[[Any], Path]) -> None:
    rng = np.random.default_rng(3)
    results: dict[str, Any] = {}
    for dimension, names in (("color", range(50)), ("scene", range(50, 90)), ("dynamic_degree", range(90, 150))):
        values = {f"prompt {name}": float(rng.integers(2)) for name in names if name % 7}  # some without a value
        entries = [{"video_path": video(name, 0), "video_results": value} for name, value in values.items()]
        results[dimension] = [0.55, entries]  # not the mean
    scores = scored(write(results), expected=None, allow_missing=True, resamples=4000)
    for name in vbench.TOTALS:
        values, metric = scores["per_prompt"][f"vbench.{name}"], scores["metrics"][f"vbench.{name}"]
        assert np.mean(values) == pytest.approx(metric["value"], abs=1e-12)
        found = bootstrap.interval(values, resamples=4000, seed=1)
        assert found is not None
        assert found.high - found.low == pytest.approx(metric["high"] - metric["low"], rel=0.1)


def test_videos_without_any_object_are_not_missing(write: Callable[[Any], Path]) -> None:
    results = official_results()
    del results["color"][1][1:]
    scores = scored(write(results))
    assert scores["evaluator"]["missing"] == []
    assert scores["evaluator"]["videos"]["color"] == 1
    assert scores["metrics"]["vbench.color"]["n_prompts"] == 1


def test_the_number_of_samples_is_the_suites_whatever_the_filters_leave(write: Callable[[Any], Path]) -> None:
    results = official_results()
    results["temporal_flickering"][1] = results["temporal_flickering"][1][:1]
    del results["color"][1][1:]
    assert scored(write(results))["n_samples"] == 2 * len(SUITE)
    del results["scene"][1][0]
    assert scored(write(results), allow_missing=True)["n_samples"] == 2 * len(SUITE) - 1
    assert scored(write(results), expected=None, allow_missing=True)["evaluator"]["samples_uncounted"]


def test_missing_videos_are_refused_with_their_number_or_named(write: Callable[[Any], Path]) -> None:
    results = official_results()
    del results["object_class"][1][3]
    del results["scene"][1][0]  # the video is there for background consistency, but it counts as missing all the same
    path = write(results)
    with pytest.raises(UserError, match=r"official.json lacks 2 videos, the first a cat-fish-1.mp4"):
        scored(path)
    evaluator = scored(path, allow_missing=True)["evaluator"]
    assert evaluator["missing"] == ["a cat-fish-1.mp4", "a beach-0.mp4"]


def test_the_official_code_judges_five_videos_however_many_there_are(write: Callable[[Any], Path]) -> None:
    results = official_results()
    with pytest.raises(UserError, match=f"lacks {3 * 12} videos"):  # of all prompts but those of colour and flicker
        scored(write(results), expected=Expected(SUITE, 25))


def test_missing_dimensions_are_refused_with_their_reason_or_named(write: Callable[[Any], Path]) -> None:
    results = official_results()
    del results["color"], results["scene"]
    path = write(wrapped(results, failed={"color": "no video shows any of its objects"}))
    with pytest.raises(UserError, match=r"lacks 2 of 16 dimensions: color \(no video shows any .*\), scene; run"):
        scored(path)
    scores = scored(path, allow_missing=True)
    assert scores["evaluator"]["missing"] == ["color", "scene"]
    assert "vbench.color" not in scores["metrics"]
    raw = {name: entry[0] for name, entry in results.items()}
    assert scores["metrics"]["vbench.total"]["value"] == vbench.aggregate({**raw, "color": 0.0, "scene": 0.0})["total"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(colour=r.pop("color")), "unknown dimension 'colour'"),
        (lambda r: r.update(color=[83.0, r["color"][1]]), r"official.json, color: 83.0 is no fraction"),
        (lambda r: r.update(color=[float("nan"), r["color"][1]]), "color: nan is no fraction"),
        (lambda r: r.update(color=[10**400, r["color"][1]]), "color: 1000*00 is no fraction"),
        (lambda r: r["color"][1].append(r["color"][1][0]), "color: the video a red car-0 is there twice"),
        (lambda r: r["color"][1][0].update(video_path=f"/x/red-{'1' * 5000}.mp4"), "PROMPT-NUMBER.mp4"),
        (lambda r: r.update(color=[0.5, []]), "color: there is a score but no video"),
        (lambda r: r.update(color=0.5), "another version"),
        (lambda r: r.update(color=[0.5, [{"video_path": video("a red car", 0)}]]), "video_results of each video"),
        (lambda r: r["color"][1][0].update(video_results="good"), "color of a red car-0: 'good' is no fraction"),
        (lambda r: r["color"][1][0].update(video_path="/x/red.mp4"), "PROMPT-NUMBER.mp4"),
        (
            lambda r: r["color"][1][0].update(video_path=video("a green car", 0)),
            "not of the prompt file.*'a green car'",
        ),
    ],
)
def test_damaged_results_are_named(write: Callable[[Any], Path], change: Callable[[Any], Any], words: str) -> None:
    results = official_results()
    change(results)
    with pytest.raises(UserError, match=words):
        scored(write(results))


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"version": "0"}, "of version '0', expected '1'"),
        ({"official": "vbench-long"}, "results of 'vbench-long', but evaluation.scorer is vbench"),
        ({"gpus": 8}, "made by 8 processes"),
        ({"missing": ["a bird-1.mp4"]}, "lacks 1 videos"),
        ({"missing": 7}, "official.json: key 'missing' must be a list of texts"),
        ({"failed": ["color"]}, "key 'failed' must be an object"),
        ({"static": {"a still": "x"}}, "key 'static' must be an object of lists of whole numbers"),
        ({"static": {"a still": ["0"]}}, "key 'static' must be"),
        ({"versions": "0.1.5"}, "key 'versions' must be an object"),
        ({"device": 0}, "key 'device' must be a text"),
    ],
)
def test_results_made_otherwise_are_refused(write: Callable[[Any], Path], about: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        scored(write(wrapped(official_results(), **about)))


def test_unreadable_files_are_named(write: Callable[[Any], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*official.json"):
        scored(write('{"color": [0.5'))
    with pytest.raises(UserError, match=r"official.json holds no results"):
        scored(write("[]"))
    with pytest.raises(UserError, match=r"no results of VBench's code in .*nothing.json"):
        scored(tmp_path / "nothing.json")


def test_protocols_take_their_own_files(write: Callable[[Any], Path]) -> None:
    with pytest.raises(UserError, match="vbench-native, which takes no results"):
        scored(write(official_results()), protocol="vbench-native")
    with pytest.raises(UserError, match="vbench, which takes --official FILE"):
        scored(None, native=native())
    with pytest.raises(UserError, match="nothing to evaluate"):
        scored(None, protocol="vbench-native")


def test_vbench_longs_clips_are_those_of_their_video(write: Callable[[Any], Path]) -> None:
    results = official_results()
    parts = [
        {"video_path": f"/x/split_clip/zoom-1/zoom-1_{i:03d}.mp4", "video_results": value}
        for i, value in enumerate((0.1, 0.3))
    ]
    parts += [{"video_path": "/x/split_clip/zoom-0/zoom-0_full.mp4", "video_results": 0.4}]
    results["temporal_style"] = [0.3, parts]
    whole = [
        {"video_path": f"/x/split_clip/zoom-{i}/zoom-{i}_000.mp4/zoom-{i}.mp4", "video_results": i} for i in (0, 1)
    ]
    results["object_class"] = [0.5, parts, [*results["object_class"][1]]]
    results["human_action"][1][0]["video_path"] = "/x/A person is jogging-0-Scene-2_001.mp4"
    scores = scored(write(wrapped(results, official="vbench-long")), protocol="vbench-long")
    assert scores["evaluator"]["name"] == "VBench-Long (official code)"
    column = scores["per_prompt"]["vbench.temporal_style"]
    assert [value for value in column if value is not None] == [pytest.approx((0.2 + 0.4) / 2)]
    results["temporal_style"] = [0.5, parts, whole]
    column = scored(write(results), protocol="vbench-long")["per_prompt"]["vbench.temporal_style"]
    assert [value for value in column if value is not None] == [0.5]


# --- Native dimensions ---------------------------------------------------------------------------------------------


def native(samples: int = 2, **values: float) -> Measured:
    """Rows of all prompts; values by dimension, the number of the sample added as a hundredth."""
    rows = [
        {
            "prompt": number,
            "filename": f"{number:05d}/samples/{index:04d}.mp4",
            "name": item["name"],
            "dimension": item["dimension"],
            "values": {name: value + index / 100 for name, value in values.items() if name in item["dimension"]},
        }
        for number, item in enumerate(SUITE)
        for index in range(samples)
    ]
    by = {"name": "VBench (native part)", "models": {"dino": "abc"}, "device": "cpu", "versions": {"torch": "2"}}
    return Measured({"measured": "vbench", "version": "1", "by": by, "known": None, "sampling": {"seed": 3}}, rows)


def test_native_dimensions_stand_beside_the_official_ones(write: Callable[[Any], Path]) -> None:
    results = official_results()
    results["appearance_style"] = [0.25, [{"video_path": video("the bund", i), "video_results": 0.25} for i in (0, 1)]]
    scores = scored(write(wrapped(results)), native=native(appearance_style=0.27, subject_consistency=0.9))
    assert scores["metrics"]["vbench_native.appearance_style"]["value"] == pytest.approx(0.275)
    assert scores["metrics"]["vbench_native.appearance_style"]["kind"] == "same_formula"
    differences = scores["evaluator"]["native_minus_official"]
    assert differences["appearance_style"] == pytest.approx(0.025)
    assert differences["subject_consistency"] == pytest.approx(0.905 - results["subject_consistency"][0])
    plain = scored(write(wrapped(results)))["metrics"]
    assert scores["metrics"]["vbench.total"] == plain["vbench.total"]
    assert scores["evaluator"]["sampling"] == {"seed": 3}
    assert scores["evaluator"]["native"]["models"] == {"dino": "abc"}


def test_flicker_is_compared_on_the_videos_that_passed_the_filter(write: Callable[[Any], Path]) -> None:
    results = official_results()
    still = [{"video_path": video("a still", i), "video_results": 0.9} for i in (0, 1)]
    results["temporal_flickering"] = [0.9, still]
    path = write(wrapped(results, static={"a still": [1, 4]}))
    found = scored(path, native=native(samples=5, temporal_flickering=0.9), expected=None)
    # samples 1 and 4 have .91 and .94 natively
    assert found["evaluator"]["native_minus_official"] == {"temporal_flickering": pytest.approx(0.025)}
    with pytest.raises(UserError, match="1 passed the filter"):
        scored(write(wrapped(results, static={"a still": [1]})), native=native(temporal_flickering=0.9))


def test_what_cannot_be_compared_video_by_video_is_not(write: Callable[[Any], Path]) -> None:
    """Without the filter's own words, video 0 of flicker may be sample 7; VBench-Long cuts videos into parts."""
    results, ours = official_results(), native(temporal_flickering=0.9, subject_consistency=0.9)
    found = scored(write(results), native=ours)["evaluator"]["native_minus_official"]
    assert list(found) == ["subject_consistency"]
    scores = scored(write(results), native=ours, protocol="vbench-long")
    assert "native_minus_official" not in scores["evaluator"]
    assert scores["evaluator"]["native"]["models"] == {"dino": "abc"}


def test_the_native_protocol_has_no_totals() -> None:
    found = vbench.evaluation(
        native(subject_consistency=0.9),
        protocol="vbench-native",
        model="rcm-0",
        steps=4,
        expected=EXPECTED,
        resamples=50,
    )
    assert list(found.scores["metrics"]) == ["vbench_native.subject_consistency"]
    evaluator = found.scores["evaluator"]
    assert (evaluator["name"], evaluator["models"]) == ("VBench (native part)", {"dino": "abc"})
    assert found.results[0] == {
        "filename": "dog 0, running.-0.mp4",
        "prompt": "dog 0, running.",
        "vbench_native.subject_consistency": 0.9,
    }


def test_missing_native_samples_are_refused_or_named() -> None:
    measured = native(subject_consistency=0.9)
    del measured.rows[3]
    options: dict[str, Any] = {"protocol": "vbench-native", "native": measured}
    with pytest.raises(UserError, match=r"1 of 30 samples are missing, the first 00001/samples/0001.mp4"):
        scored(None, **options)
    assert scored(None, allow_missing=True, **options)["evaluator"]["missing"] == ["00001/samples/0001.mp4"]


def test_diversity_is_added(write: Callable[[Any], Path]) -> None:
    rows = [
        {"prompt": i, "samples": 20, "values": {"clip_distance": 0.1 + i / 10, "dino_distance": 0.3, "vbench2": None}}
        for i in range(3)
    ]
    measured = Measured({"by": {"name": "Diversity"}, "sampling": {"seed": 4}}, rows)
    scores = scored(write(official_results()), diversity=measured)
    assert scores["metrics"]["diversity.clip_distance"]["value"] == pytest.approx(0.2)
    assert scores["metrics"]["diversity.vbench2"]["value"] is None
    assert scores["per_prompt"]["diversity.clip_distance"] == pytest.approx([0.1, 0.2, 0.3])
    assert scores["evaluator"]["diversity"]["samples"] == 60
    del rows[1]
    path = write(official_results())
    with pytest.raises(UserError, match="the diversity suite is not whole: prompt 1 of diversity has 0 of 20 samples"):
        scored(path, diversity=measured)
    scores = scored(path, diversity=measured, allow_missing=True)
    assert scores["evaluator"]["missing"] == ["prompt 1 of diversity has 0 of 20 samples"]
    assert scores["per_prompt"]["diversity.clip_distance"] == [pytest.approx(0.1), None, pytest.approx(0.3)]


def test_resamples_follow_from_the_seed(write: Callable[[Any], Path]) -> None:
    path = write(official_results())
    assert scored(path, seed=1) == scored(path, seed=1)
    assert scored(path, seed=1)["metrics"] != scored(path, seed=2)["metrics"]
