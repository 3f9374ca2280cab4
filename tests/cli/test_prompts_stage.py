"""`rcm prompts`: suites of files, with names and dimensions, and of scenes with a word in them."""

import hashlib
import json
from pathlib import Path

import pytest

from .conftest import Run

EXPERIMENT = "experiment=wan2.1-1.3b-clips"
NAMES = ["a lake", "a car", "a boat"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[object, ...]:
    (tmp_path / "long.txt").write_text("A calm lake.\nA red car.\nA slow boat.\n")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    dimensions = ["temporal_flickering", "color", "temporal_flickering"]
    info = [{"prompt_en": name, "dimension": [d]} for name, d in zip(NAMES, dimensions, strict=True)]
    (tmp_path / "info.json").write_text(json.dumps(info))
    return ("--source", tmp_path / "long.txt", "--names", tmp_path / "names.txt", "--info", tmp_path / "info.json")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_geneval_is_the_official_file(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "evaluation_metadata.jsonl"
    run("prompts", "experiment=cosmos-predict2-2b-images", "suite=report", "--out", out)
    assert len(lines(out)) == 553
    official = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert hashlib.sha256(out.read_bytes()).hexdigest() == official


def test_diversity_is_spread_over_the_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("".join(f"prompt {k}\n" for k in range(10)))
    out = tmp_path / "diversity.jsonl"
    chosen = ("suite=diversity", "suites.diversity.prompts=4", "--source", tmp_path / "long.txt")
    run("prompts", EXPERIMENT, *chosen, "--out", out)
    assert [line["prompt"] for line in lines(out)] == ["prompt 0", "prompt 2", "prompt 5", "prompt 7"]


def test_vbench(files: tuple[object, ...], run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report.jsonl"
    run("prompts", EXPERIMENT, "suite=report", "suites.report.prompts=2", *files, "--out", out)
    assert lines(out) == [
        {
            "prompt": "A calm lake.",
            "name": "a lake",
            "dimension": ["temporal_flickering"],
            "auxiliary_info": {},
            "samples": 25,
        },
        {"prompt": "A red car.", "name": "a car", "dimension": ["color"], "auxiliary_info": {}},
    ]
    inputs = json.loads(Path(f"{out}.prov.json").read_text())["inputs"]
    assert [entry["path"] for entry in inputs] == ["long.txt", "names.txt", "info.json"]


def test_diversity_takes_the_same_prompts(files: tuple[object, ...], run: Run, tmp_path: Path) -> None:
    words, out = ("prompts", EXPERIMENT, "suite=diversity"), tmp_path / "diversity.jsonl"
    run(*words, *files[:4], "--out", out)
    assert lines(out)[0] == {"prompt": "A calm lake.", "name": "a lake"} and len(lines(out)) == 3
    run(*words, *files[:2], "--out", out)
    assert lines(out)[0] == {"prompt": "A calm lake."}
    run(*words, *files, "--out", out)
    assert all("samples" not in line for line in lines(out))  # every prompt of the suite has as many


def test_words_to_be_read_back(run: Run, tmp_path: Path) -> None:
    run("prompts", EXPERIMENT, "suite=text", "suites.text.prompts=7", "--out", tmp_path / "text.jsonl")
    found = lines(tmp_path / "text.jsonl")
    assert len(found) == 7
    assert all(line["text"] in line["prompt"] and "video" in line["prompt"] for line in found)


def test_what_goes_with_what(files: tuple[object, ...], fail: Run, tmp_path: Path) -> None:
    words = (EXPERIMENT, "suite=report", "--out", tmp_path / "x.jsonl")
    assert "--info goes with --names" in fail("prompts", *words, *files[:2], *files[4:])
    assert "name it with --source" in fail("prompts", *words, *files[2:])
    drawn = ("experiment=cosmos-predict2-2b-images", *words[1:])
    assert "--names with --source" in fail("prompts", *drawn, *files[2:])
    assert not (tmp_path / "x.jsonl").exists()
