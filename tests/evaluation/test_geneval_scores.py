"""GenEval's scores on numbers worked out by hand, from stored detections and from the official results."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rcm.artefact import UserError
from rcm.data import prompts
from rcm.data.prompts import COCO
from rcm.evaluation import results_jsonl
from rcm.evaluation.geneval_scores import from_measured, from_results
from rcm.evaluation.measured import Measured
from rcm.evaluation.samples import Expected

CAPTIONS = [prompts.single_object("dog"), prompts.single_object("cat"), prompts.colors("car", "red")]
EXPECTED = Expected(CAPTIONS, 2)
WHO = {"model": "rcm-0", "steps": 4}
BY = {
    "name": "GenEval (HF Mask2Former)",
    "models": {"detector": "ab", "clip_large": "cd"},
    "device": "NVIDIA H100",
    "versions": {"torch": "2.13.0"},
}
SAMPLING = {"sigma_max": 80.0, "checkpoint_sha256": "ef", "prompts_sha256": "12"}


def _row(prompt: int, number: int, *detections: list[Any]) -> dict[str, Any]:
    name = f"{prompt:05d}/samples/{number:04d}.png"
    return {"prompt": prompt, "filename": name, "metadata": CAPTIONS[prompt], "detections": list(detections)}


def _measured(rows: Sequence[dict[str, Any]]) -> Measured:
    header = {"measured": "geneval", "version": "1", "by": BY, "known": {"score": 0.9}, "sampling": SAMPLING}
    return Measured(header, list(rows))


def _seen(name: str, score: float = 0.9, color: str | None = None) -> list[Any]:
    return [name, 0.0, 0.0, 10.0, 10.0, score, color]


ROWS = [
    _row(0, 0, _seen("dog")),
    _row(0, 1, _seen("dog", 0.31), _seen("cat", 0.2)),
    _row(1, 0, _seen("cat")),
    _row(1, 1, _seen("cat", 0.3)),  # at the threshold
    _row(2, 0, _seen("car", 0.8, "red"), _seen("car", 0.9, "blue")),  # the surer one is blue
    _row(2, 1),
]


def _values(scores: Mapping[str, Any]) -> dict[str, float]:
    return {key: entry["value"] for key, entry in scores["metrics"].items()}


def test_scores_of_stored_detections() -> None:
    found = from_measured(_measured(ROWS), **WHO, expected=EXPECTED, paper="2B", resamples=50, seed=1)
    scores = found.scores
    assert _values(scores) == {
        "geneval.overall": pytest.approx((3 / 4 + 0) / 2),  # the mean of the tasks, not of the images
        "geneval.single_object": pytest.approx(3 / 4),
        "geneval.colors": 0,
        "geneval.images": pytest.approx(3 / 6),
        "geneval.prompts": pytest.approx(2 / 3),
    }
    assert {entry["kind"] for entry in scores["metrics"].values()} == {"substituted_model"}
    assert scores["metrics"]["geneval.single_object"]["n_prompts"] == 2
    assert (scores["n_prompts"], scores["n_samples"], scores["media"]) == (3, 6, "images")
    assert scores["per_prompt"]["tag"] == ["single_object", "single_object", "colors"]
    assert scores["per_prompt"]["geneval.overall"] == [1, 0.5, 0]
    assert scores["per_prompt"]["geneval.colors"] == [None, None, 0]
    evaluator = scores["evaluator"]
    assert {key: evaluator[key] for key in BY} == BY
    assert (evaluator["known"], evaluator["sampling"]) == ({"score": 0.9}, SAMPLING)
    assert (evaluator["missing"], evaluator["paper"], evaluator["prompts_file"]) == ([], "2B", None)
    assert evaluator["bootstrap"] == {"resamples": 50, "seed": 1}
    json.dumps(scores, allow_nan=False)


def test_the_interval_draws_prompts_within_their_task() -> None:
    """One colour prompt at 0 and two others at 1 and 0.5: the overall is (1, .75 or .5) / 2 in every resample."""
    overall = from_measured(_measured(ROWS), **WHO, expected=EXPECTED).scores["metrics"]["geneval.overall"]
    assert (overall["low"], overall["high"]) == (0.25, 0.5)


def test_results_are_the_originals() -> None:
    lines = [json.loads(line) for line in results_jsonl(from_measured(_measured(ROWS), **WHO).results).splitlines()]
    assert [list(line) for line in lines] == [
        ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    ] * 6
    assert [line["correct"] for line in lines] == [True, True, True, False, False, False]
    assert lines[1]["filename"] == "00000/samples/0001.png"
    assert (lines[1]["tag"], lines[1]["prompt"], lines[1]["reason"]) == ("single_object", "a photo of a dog", "")
    assert json.loads(lines[1]["metadata"]) == CAPTIONS[0]
    assert json.loads(lines[1]["details"]) == {"dog": [[0, 0, 10, 10, 0.31]]}  # the cat is below the threshold
    assert json.loads(lines[4]["details"]) == {"car": [[0, 0, 10, 10, 0.9], [0, 0, 10, 10, 0.8]]}
    assert lines[4]["reason"] == "expected red car >= 1, found blue"


def _official(path: Path, results: Sequence[Mapping[str, Any]], header: Mapping[str, Any] | None = None) -> Path:
    """As pandas writes it, which escapes slashes."""
    lines = [json.dumps(line).replace("/", "\\/") for line in results]
    path.write_text("\n".join([json.dumps(header), *lines] if header else lines) + "\n")
    return path


@pytest.fixture
def results() -> list[dict[str, Any]]:
    """Lines by hand, as the official evaluator names its files."""
    correct = [True, True, True, False, False, False]
    return [
        {
            "filename": f"outputs/run/{row['prompt']:05d}/samples/{row['filename'][-8:]}",
            "tag": row["metadata"]["tag"],
            "prompt": row["metadata"]["prompt"],
            "correct": good,
            "reason": "" if good else "expected something",
            "metadata": json.dumps(row["metadata"]),
            "details": "{}",
        }
        for row, good in zip(ROWS, correct, strict=True)
    ]


def test_official_results_give_the_same_scores(tmp_path: Path, results: list[dict[str, Any]]) -> None:
    path = _official(tmp_path / "results.jsonl", results[::-1])
    found = from_results(path, **WHO, expected=EXPECTED, sampling=SAMPLING)
    own = from_measured(_measured(ROWS), **WHO, expected=EXPECTED)
    assert _values(found.scores) == _values(own.scores)
    assert found.scores["per_prompt"] == own.scores["per_prompt"]
    assert {entry["kind"] for entry in found.scores["metrics"].values()} == {"official"}
    assert found.scores["evaluator"]["name"] == "GenEval (mmdet)"
    assert found.scores["evaluator"]["sampling"] == SAMPLING
    assert found.scores["evaluator"]["prompts_sha256"] == own.scores["evaluator"]["prompts_sha256"]
    assert [line["filename"] for line in found.results] == [row["filename"] for row in ROWS]
    assert found.results[3]["reason"] == "expected something"


def test_official_results_may_say_how_they_were_made(tmp_path: Path, results: list[dict[str, Any]]) -> None:
    header = {"official": "geneval-mmdet", "version": "1", "device": "V100", "versions": {"mmdet": "2.27.0"}}
    path = _official(tmp_path / "results.jsonl", results, header | {"known": {"score": 1.0}})
    evaluator = from_results(path, **WHO).scores["evaluator"]
    assert (evaluator["device"], evaluator["versions"]) == ("V100", {"mmdet": "2.27.0"})
    assert evaluator["known"] == {"score": 1.0}
    for wrong in ({"version": "2"}, {"official": "vbench"}):
        with pytest.raises(UserError, match=r"results.jsonl holds results of .* expected those of 'geneval-mmdet'"):
            from_results(_official(path, results, header | wrong), **WHO)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"details": None}, r"line 2 lacks details: it is not by GenEval's evaluator, or by another version"),
        ({"correct": 1}, r"line 2: key 'correct' must be true or false; got 1"),
        ({"tag": "texture"}, r"line 2: key 'tag' must be one of single_object, .*; got 'texture'"),
        ({"filename": "outputs/run/00000/samples/0000.png"}, r"line 2: 00000/samples/0000.png stands in line 1"),
        ({"filename": "00000/samples/000.png"}, r"line 2: 00000/samples/000.png stands in line 1"),
        ({"filename": f"{'0' * 5000}/samples/0000.png"}, r"line 2: key 'filename' must end as"),
        ({"filename": "grid.png"}, r"line 2: key 'filename' must end as in 00012/samples/0003.png"),
        ({"metadata": "{"}, r"line 2, metadata, line 1: not JSON"),
        ({"metadata": json.dumps({**CAPTIONS[0], "include": []})}, r"line 2, metadata, line 1: key 'include'"),
        ({"metadata": {"tag": "single_object"}}, r"line 2: key 'metadata' must be a text"),
        ({"prompt": "a photo of a cow"}, r"line 2: tag or prompt differs from the metadata"),
        (
            {"metadata": json.dumps(CAPTIONS[1]), "prompt": "a photo of a cat"},
            r"line 2: prompt 0 has other metadata",
        ),
    ],
)
def test_wrong_official_results_are_named(
    tmp_path: Path, results: list[dict[str, Any]], changed: dict[str, Any], message: str
) -> None:
    results[1] = {key: value for key, value in (results[1] | changed).items() if value is not None}
    with pytest.raises(UserError, match=rf"results.jsonl, {message}"):
        from_results(_official(tmp_path / "results.jsonl", results), **WHO)


def test_files_that_are_no_results(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for content, message in (("", "holds no results"), ("{", "line 1: not JSON"), ("[]", "line 1: expected a JSON")):
        path.write_text(content)
        with pytest.raises(UserError, match=rf"results.jsonl,? {message}"):
            from_results(path, **WHO)
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        from_results(tmp_path / "nowhere.jsonl", **WHO)


def test_missing_samples_are_refused_or_named(tmp_path: Path, results: list[dict[str, Any]]) -> None:
    few = [ROWS[k] for k in (0, 1, 4)]  # without the whole second prompt, and one of the third
    with pytest.raises(UserError, match=r"3 of 6 samples are missing, the first 00001/samples/0000.png"):
        from_measured(_measured(few), **WHO, expected=EXPECTED)
    with pytest.raises(UserError, match=r"3 of 6 samples are missing"):
        from_results(_official(tmp_path / "x.jsonl", [results[k] for k in (0, 1, 4)]), **WHO, expected=EXPECTED)
    with pytest.raises(UserError, match=r"3 of 6 samples are missing, the first 00001/samples/0000.png"):
        from_measured(_measured(few), **WHO)
    scores = from_measured(_measured(few), **WHO, expected=EXPECTED, allow_missing=True).scores
    lacking = ["00001/samples/0000.png", "00001/samples/0001.png", "00002/samples/0001.png"]
    assert scores["evaluator"]["missing"] == lacking
    assert (scores["n_prompts"], scores["n_samples"]) == (2, 3)
    assert scores["per_prompt"]["geneval.overall"] == [1, None, 0]  # prompts keep their places
    assert scores["metrics"]["geneval.overall"]["value"] == 0.5
    less = from_measured(_measured(ROWS[:4]), **WHO, expected=EXPECTED, allow_missing=True).scores
    assert _values(less) == {
        "geneval.overall": None,  # a mean over the six tasks, of which one is not there
        "geneval.single_object": 0.75,
        "geneval.colors": None,
        "geneval.images": 0.75,
        "geneval.prompts": 1,
    }
    whole = from_measured(_measured(ROWS), **WHO, expected=EXPECTED).scores
    assert scores["evaluator"]["prompts_sha256"] == whole["evaluator"]["prompts_sha256"]


def test_samples_of_other_prompts_are_refused() -> None:
    others = Expected([*CAPTIONS[:2], prompts.colors("bus", "red")], 2)
    with pytest.raises(UserError, match=r"00002/samples/0000.png was made from 'a photo of a red car'"):
        from_measured(_measured(ROWS), **WHO, expected=others)
    with pytest.raises(UserError, match=r"00002/samples/0000.png is of none of the 2 prompts"):
        from_measured(_measured(ROWS), **WHO, expected=Expected(CAPTIONS[:2], 2))
    mixed = [*ROWS[:5], {**ROWS[5], "metadata": CAPTIONS[0]}]
    with pytest.raises(UserError, match=r"00002/samples/0001.png was measured with other metadata"):
        from_measured(_measured(mixed), **WHO)


def test_broken_measurements_are_named() -> None:
    def broken(*detections: Any) -> list[dict[str, Any]]:
        return [*ROWS[:4], _row(2, 0, *detections), ROWS[5]]

    with pytest.raises(UserError, match=r"no colour was measured of a car in 00002/samples/0000.png"):
        from_measured(_measured(broken(_seen("car"))), **WHO)
    with pytest.raises(UserError, match=r"metadata of 00000/samples/0000.png, line 1: key 'tag'"):
        from_measured(_measured([{**ROWS[0], "metadata": {"prompt": "a dog"}}]), **WHO)
    with pytest.raises(UserError, match=r"there are no samples"):
        from_measured(_measured([]), **WHO)


def test_prompts_with_the_same_metadata_are_one_where_prompts_are_counted() -> None:
    twice = [ROWS[2], ROWS[3], {**ROWS[2], "prompt": 5, "filename": "00005/samples/0000.png"}, ROWS[4], ROWS[5]]
    scores = from_measured(_measured(twice), **WHO, allow_missing=True).scores
    assert scores["per_prompt"]["geneval.prompts"] == [1, 0, None]


def test_the_official_prompts_are_recognised(tmp_path: Path) -> None:
    """The same path as the benchmark takes: 553 prompts, written, read, judged and summed up."""
    path = Path(__file__).parents[2] / "benchmarks" / "geneval_scoring.py"
    spec = importlib.util.spec_from_file_location("geneval_scoring", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    scores, _ = benchmark.run(tmp_path, prompts.geneval(COCO), samples=1)
    assert scores["evaluator"]["prompts_file"] == "GenEval's 553"
    assert scores["evaluator"]["prompts_sha256"].startswith("5c48e0813e812e3c")
    assert scores["n_samples"] == len((tmp_path / "results.jsonl").read_text().splitlines()) == 553
    counts = {key: entry["n_prompts"] for key, entry in scores["metrics"].items()}
    assert [counts[f"geneval.{task}"] for task in prompts.TASKS] == [80, 99, 80, 94, 100, 100]
    values = _values(scores)
    assert values["geneval.overall"] == pytest.approx(sum(values[f"geneval.{task}"] for task in prompts.TASKS) / 6)
    assert 0.1 < values["geneval.overall"] < 0.9
    other, _ = benchmark.run(tmp_path, prompts.geneval(COCO, seed=42)[:20], samples=1)
    assert other["evaluator"]["prompts_file"] is None


def test_diversity_stands_beside() -> None:
    header = {"measured": "diversity", "version": "1", "by": {"name": "Diversity"}, "sampling": SAMPLING}
    rows = [
        {"prompt": k, "samples": 8, "values": {"clip_distance": 0.1 * k, "dino_distance": None, "vbench2": 0.5}}
        for k in range(3)
    ]
    scores = from_measured(_measured(ROWS), **WHO, diversity=Measured({**header, "known": None}, rows)).scores
    assert scores["metrics"]["diversity.clip_distance"]["value"] == pytest.approx(0.1)
    assert scores["metrics"]["diversity.vbench2"]["n_prompts"] == 3
    assert scores["metrics"]["diversity.dino_distance"]["value"] is None
    assert scores["per_prompt"]["diversity.vbench2"] == [0.5] * 3
    gap = Measured({**header, "known": None}, [rows[0], rows[2]])
    with pytest.raises(UserError, match=r"prompt 1 of diversity has 0 of 8 samples"):
        from_measured(_measured(ROWS), **WHO, diversity=gap)
    fewer = from_measured(_measured(ROWS), **WHO, diversity=gap, allow_missing=True).scores
    assert fewer["per_prompt"]["diversity.vbench2"] == [0.5, None, 0.5]
    assert fewer["evaluator"]["missing"] == ["prompt 1 of diversity has 0 of 8 samples"]
    assert scores["evaluator"]["diversity"] == {
        "by": {"name": "Diversity"},
        "sampling": SAMPLING,
        "prompts_sha256": "12",
        "samples": 24,
    }
