"""The stages `evaluate`, `table` and `figure` on stored measurements and official results, fitting ones and others."""

import json
from pathlib import Path
from typing import Any

import pytest

from rcm.artefact import sha256_file
from rcm.cli.config import compose
from rcm.cli.score import _prompts_file
from rcm.data.prompts import counting, single_object
from rcm.evaluation.measured import write_measured

from .conftest import Run

ROOT = Path(__file__).parents[2]
IMAGES = ["experiment=cosmos-predict2-2b-images", "suites.report.samples=2", "evaluation.bootstrap=50"]
CLIPS = ["experiment=wan2.1-1.3b-clips"]
PROMPTS = [single_object("bear"), counting("cup", 2)]
SAMPLING = {"checkpoint_sha256": "a" * 64, "sigma_max": 80.0, "steps": 4, "seed": 43}
KNOWN = {"score": 1.0, "facts": 15, "failed": []}
BY = {"name": "GenEval (HF Mask2Former)", "models": {"detector": "b" * 64}, "device": "cpu", "versions": {}}


def detected(path: Path, found: dict[str, list[str]], known: Any = KNOWN, **sampling: Any) -> Path:
    """Stored detections: by file, the classes that were found in it."""
    rows = [
        {
            "prompt": int(name[:5]),
            "filename": name,
            "metadata": PROMPTS[int(name[:5])],
            "detections": [[cls, 10.0 * k, 0.0, 10.0 * k + 9, 9.0, 0.95, None] for k, cls in enumerate(classes)],
        }
        for name, classes in found.items()
    ]
    header = {"measured": "geneval", "by": BY, "known": known, "sampling": {**SAMPLING, **sampling}}
    write_measured(path, header, rows)
    return path


def diverse(path: Path, **sampling: Any) -> Path:
    values = {"clip_distance": 0.2, "dino_distance": 0.3, "vbench2": None}
    header = {"measured": "diversity", "by": {**BY, "name": "Diversity"}, "known": None}
    write_measured(
        path, header | {"sampling": {**SAMPLING, **sampling}}, [{"prompt": 0, "samples": 8, "values": values}]
    )
    return path


FOUND = {
    "00000/samples/0000.png": ["bear"],
    "00000/samples/0001.png": ["cup"],
    "00001/samples/0000.png": ["cup", "cup"],
    "00001/samples/0001.png": ["cup", "cup"],
}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "report.jsonl"
    path.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in PROMPTS))
    return path


@pytest.fixture
def outputs(tmp_path: Path) -> tuple[object, ...]:
    return "--out", tmp_path / "rcm-0-4.json", "--results", tmp_path / "results.jsonl"


def test_stored_detections_become_scores(prompts: Path, outputs: Any, run: Run, tmp_path: Path) -> None:
    parts = [
        detected(tmp_path / f"{k}.jsonl", {name: FOUND[name] for name in FOUND if name.startswith(f"0000{k}")})
        for k in (0, 1)
    ]
    features = diverse(tmp_path / "diversity.jsonl", seed=4)
    run("evaluate", *IMAGES, "--measured", *parts, "--diversity", features, "--prompts", prompts, *outputs)
    score = json.loads(outputs[1].read_text())
    values = {key: metric["value"] for key, metric in score["metrics"].items()}
    assert (values["geneval.single_object"], values["geneval.counting"], values["geneval.overall"]) == (0.5, 1.0, 0.75)
    assert values["diversity.clip_distance"] == 0.2 and values["diversity.vbench2"] is None
    assert (score["evaluator"]["paper"], score["evaluator"]["prompts_file"]) == ("2B", None)
    assert score["evaluator"]["prompts_file_sha256"] is None
    assert score["evaluator"]["sampling"]["sigma_max"] == 80.0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def test_missing_samples_are_counted(prompts: Path, outputs: Any, run: Run, fail: Run, tmp_path: Path) -> None:
    few = detected(tmp_path / "few.jsonl", {name: FOUND[name] for name in list(FOUND)[1:]})
    words = ("evaluate", *IMAGES, "--measured", few, "--prompts", prompts, *outputs)
    assert "1 of 4 samples are missing, the first 00000/samples/0000.png" in fail(*words)
    assert not outputs[1].exists()
    run(*words, "evaluation.allow_missing=true")
    assert json.loads(outputs[1].read_text())["evaluator"]["missing"] == ["00000/samples/0000.png"]


def test_diversity_is_of_the_same_samples(outputs: Any, fail: Run, tmp_path: Path) -> None:
    stored = detected(tmp_path / "report.jsonl", FOUND)
    other = diverse(tmp_path / "diversity.jsonl", sigma_max=1600.0)
    said = fail("evaluate", *IMAGES, "--measured", stored, "--diversity", other, *outputs)
    assert "another sigma_max (1600.0, not 80.0)" in said and "diversity.jsonl" in said


def test_the_prompts_are_those_that_were_sampled(
    prompts: Path, outputs: Any, run: Run, fail: Run, tmp_path: Path
) -> None:
    stored = detected(tmp_path / "measured.jsonl", FOUND, prompts_sha256=sha256_file(prompts))
    words = ("evaluate", *IMAGES, "--measured", stored, "--prompts", prompts, *outputs)
    run(*words)
    outputs[1].unlink()
    prompts.write_text(prompts.read_text() + "\n")
    said = fail(*words)
    assert f"report.jsonl has the SHA-256 {sha256_file(prompts)}, but the samples were made from prompts with" in said
    assert not outputs[1].exists()


def test_an_untrusted_detector_has_no_score(outputs: Any, run: Run, fail: Run, tmp_path: Path) -> None:
    known = {"score": 0.6, "facts": 15, "failed": ["a photo of a cat"] * 6}
    stored = detected(tmp_path / "report.jsonl", FOUND, known=known)
    words = ("evaluate", *IMAGES, "--measured", stored, *outputs)
    assert "fails 6 of 15 facts on known photographs, such as 'a photo of a cat'" in fail(*words)
    assert not outputs[1].exists()
    run(*words, "evaluation.known_at_least=0.6")
    assert json.loads(outputs[1].read_text())["evaluator"]["known"] == known


def official_results(path: Path, header: dict[str, Any] | None = None) -> Path:
    """What GenEval's own evaluator says of `FOUND`, of each prompt one right."""
    lines: list[dict[str, Any]] = [] if header is None else [header]
    lines += [
        {
            "filename": f"somewhere/{name}",
            "tag": PROMPTS[int(name[:5])]["tag"],
            "prompt": PROMPTS[int(name[:5])]["prompt"],
            "correct": name.endswith("0.png"),
            "reason": "",
            "metadata": json.dumps(PROMPTS[int(name[:5])]),
            "details": "{}",
        }
        for name in FOUND
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_the_official_results_of_geneval(prompts: Path, outputs: Any, run: Run, fail: Run, tmp_path: Path) -> None:
    official = official_results(tmp_path / "official.jsonl")
    scorer = "evaluation.scorer=geneval-mmdet"
    run("evaluate", *IMAGES, scorer, "--official", official, "--prompts", prompts, *outputs)
    score = json.loads(outputs[1].read_text())
    assert score["metrics"]["geneval.overall"]["value"] == 0.5
    assert score["metrics"]["geneval.overall"]["kind"] == "official"
    said = fail("evaluate", *IMAGES, "--official", official, *outputs)
    assert "evaluation.scorer=geneval-mask2former takes --measured, or --samples and --weights" in said

    known = {"score": 0.6, "facts": 15, "failed": ["a photo of a cat"] * 6}
    official_results(official, {"official": "geneval-mmdet", "version": "1", "known": known})
    assert "fails 6 of 15 facts" in fail("evaluate", *IMAGES, scorer, "--official", official, *outputs)


def test_samples_that_were_judged_elsewhere_are_not_read_again(outputs: Any, run: Run, tmp_path: Path) -> None:
    """Thousands of films would be hashed; how they were made stands beside them."""
    official, part = official_results(tmp_path / "official.jsonl"), tmp_path / "1-of-1"
    words = ("evaluate", *IMAGES, "evaluation.scorer=geneval-mmdet", "--official", official, "--samples", part)
    part.mkdir()
    run(*words, *outputs)  # a folder from elsewhere says nothing
    assert json.loads(outputs[1].read_text())["evaluator"]["sampling"] is None
    (part / "sampling.json").write_text(json.dumps({**SAMPLING, "part": "1-of-1"}))
    run(*words, *outputs)
    assert json.loads(outputs[1].read_text())["evaluator"]["sampling"] == SAMPLING
    inputs = json.loads(Path(f"{outputs[1]}.prov.json").read_text())["inputs"]
    assert [entry["path"] for entry in inputs] == ["sampling.json", "official.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "evaluation.scorer=shapes takes --samples, and if wanted --diversity, --prompts; given: none of them"),
        (["--measured", "x"], "evaluation.scorer=shapes takes --samples, and if wanted --diversity"),
        ([*IMAGES, "--samples", "x"], "geneval-mask2former takes --measured, or --samples and --weights"),
        ([*IMAGES, "suite=text", "--official", "x"], "suite=text takes --measured, or --samples, and if wanted --prom"),
        ([*CLIPS, "--measured", "x"], "evaluation.scorer=vbench takes --official, and if wanted --measured"),
        (
            [*CLIPS, "evaluation.scorer=vbench-native", "--official", "x"],
            "vbench-native takes --measured, or --samples",
        ),
        ([*CLIPS, "--official", "x"], "input x does not exist"),
    ],
)
def test_options_fit_the_scorer(words: list[str], said: str, outputs: Any, fail: Run) -> None:
    assert said in fail("evaluate", *words, *outputs)


def test_a_table_of_the_papers_rows_alone(run: Run, fail: Run, tmp_path: Path) -> None:
    table = ("table", "experiment=cosmos-predict2-2b-images", "--name", "table3", "--out-dir", tmp_path)
    run(*table, "--published", ROOT / "config/published/table3.csv")
    text = " ".join((tmp_path / "table3.md").read_text().split())
    assert "not reproduced: the TI2V network is not part of this version" in text and "84.40" in text
    assert "--published" in fail(*table)
    (tmp_path / "x.json").write_text("{}")
    assert "x.json holds no score, for" in fail(*table[:3], "table1", "--scores", tmp_path / "x.json", *table[-2:])


SCORE = {"model": "rcm-0", "steps": 4, "media": "images", "n_prompts": 1, "n_samples": 1, "metrics": {}}
SPEED = {"model": "rcm-0", "steps": 4, "media": "images", "fps": 1.0, "batch": 1, "device": "cpu"}


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        (
            "--scores",
            SPEED,
            "holds no score, for it lacks n_prompts, n_samples, metrics; expected a file that `rcm eval",
        ),
        ("--scores", {"model": "rcm-0", "steps": 4}, "lacks media"),
        ("--scores", [SCORE], "holds no score"),
        ("--throughput", SCORE, "holds no speed, for it lacks fps, batch, device; expected a file that `rcm through"),
    ],
)
def test_what_is_no_score_or_speed_is_named(option: str, content: Any, said: str, fail: Run, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(SCORE))
    (tmp_path / "x.json").write_text(json.dumps(content))
    scores = () if option == "--scores" else ("--scores", tmp_path / "s.json")
    words = ("table", *IMAGES[:1], "--name", "table1", *scores, option, tmp_path / "x.json", "--out-dir", tmp_path)
    found = fail(*words)
    assert "x.json" in found and said in found
    if option == "--scores":
        for name in ("figure_quality_diversity", "figure_steps", "figure_precision"):
            drawn = fail("figure", "--name", name, "--inputs", tmp_path / "x.json", "--out", tmp_path / "x.png")
            assert "x.json holds no" in drawn


def test_lines_of_metrics_are_objects(fail: Run, tmp_path: Path) -> None:
    path = tmp_path / "images" / "rcm-0" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"role": "student", "update": 1}\n[1]\n')
    said = fail("figure", "--name", "figure_training", "--inputs", path, "--out", tmp_path / "x.png")
    assert "line 2 of the metrics" in said and "metrics.jsonl is no JSON object" in said


def test_the_prompt_file_is_known_by_its_own_hash() -> None:
    config = compose(CLIPS)
    name, sha256 = _prompts_file(config)
    assert (name, sha256) == ("all_dimension_longer.txt", "58ed0665de52c1bd")
    assert _prompts_file(compose(IMAGES)) == (None, None)


def test_only_some_figures_have_published_numbers(fail: Run, tmp_path: Path) -> None:
    published = ("--published", ROOT / "config/published/figure7.csv")
    words = ("figure", "--name", "figure_rollout", "--inputs", tmp_path, *published, "--out", tmp_path / "x.png")
    assert "figure_rollout has no place for the paper's numbers" in fail(*words)
