"""The stage `measure` with evaluators of random weights: what is stored, and what `evaluate` makes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcm.artefact import content_sha256
from rcm.cli import main
from rcm.cli.pictures import encode
from rcm.data.prompts import counting, single_object
from rcm.evaluation.measured import read_measured
from rcm.evaluation.vbench_native import DIMENSIONS

from .conftest import Run
from .mini_scale import write_evaluators

CLIPS = ["experiment=wan2.1-1.3b-clips", "evaluation.scorer=vbench-native", "inference.device=cpu"]
CLIPS += ["evaluation.bootstrap=20", "suites.report.samples=1"]
IMAGES = ["experiment=cosmos-predict2-2b-images", "evaluation.known_at_least=0", "inference.device=cpu"]
IMAGES += ["evaluation.bootstrap=20", "suites.report.samples=1"]
ASKED: list[dict[str, Any]] = [
    {"prompt": "a red circle in a field", "name": "red", "dimension": ["subject_consistency", "temporal_flickering"]},
    {
        "prompt": "a circle of pixels",
        "name": "circle",
        "dimension": ["appearance_style", "aesthetic_quality", "background_consistency"],
        "auxiliary_info": {"appearance_style": {"appearance_style": "pixel art"}},
    },
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("weights")
    write_evaluators(folder)
    return folder


def given(folder: Path, *names: str) -> list[str]:
    """The values of --weights."""
    return [f"{name}={folder / name}{'.pth' if name in ('aesthetic', 'vgg') else ''}" for name in names]


def sampled(folder: Path, prompts: dict[int, dict[str, Any]], frames: int, count: int = 1) -> Path:
    """A part of a suite, of noise that moves."""
    rng = np.random.default_rng(0)
    for index, metadata in prompts.items():
        of_prompt = folder / f"{index:05d}"
        (of_prompt / "samples").mkdir(parents=True)
        (of_prompt / "metadata.jsonl").write_text(json.dumps(metadata))
        for number in range(count):
            noise = rng.integers(0, 256, (frames, 40, 48, 3)).astype(np.uint8)
            (of_prompt / "samples" / f"{number:04d}.png").write_bytes(encode(noise, ".png"))
    about = {"sigma_max": 80.0, "steps": 4, "frames": frames, "part": folder.name}
    (folder / "sampling.json").write_text(json.dumps(about))
    return folder


def written(path: Path, prompts: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    return path


def test_clips_are_measured_and_scored(weights: Path, run: Run, tmp_path: Path) -> None:
    parts = [sampled(tmp_path / f"{k + 1}-of-2", {k: ASKED[k]}, frames=3) for k in (0, 1)]
    names = ("dino", "clip_base", "clip_large", "aesthetic")
    stored = [tmp_path / f"{part.name}.jsonl" for part in parts]
    for part, out in zip(parts, stored, strict=True):
        run("measure", *CLIPS, "--samples", part, "--weights", *given(weights, *names), "--out", out)
    found = read_measured(stored, "vbench")
    assert found.header["by"]["name"] == "VBench (native part)" and found.header["by"]["device"] == "CPU"
    assert found.header["by"]["models"]["dino"] == content_sha256(weights / "dino")
    assert found.header["sampling"] == {"sigma_max": 80.0, "steps": 4, "frames": 3}
    assert [set(row["values"]) for row in found.rows] == [set(asked["dimension"]) for asked in ASKED]
    record = json.loads(Path(f"{stored[0]}.prov.json").read_text())
    assert record["inputs"][0]["sha256"] == content_sha256(weights / "dino")

    out, prompts = tmp_path / "rcm-0-4.json", written(tmp_path / "report.jsonl", ASKED)
    common = ("--prompts", prompts, "--out", out, "--results", tmp_path / "results.jsonl")
    run("evaluate", *CLIPS, "--measured", *stored, *common)
    score = json.loads(out.read_text())
    assert set(score["metrics"]) == {f"vbench_native.{name}" for name in DIMENSIONS}
    assert score["evaluator"]["sampling"]["sigma_max"] == 80.0 and score["evaluator"]["paper"] == "1.3B"
    assert score["evaluator"]["prompts_file"] == "all_dimension_longer.txt"
    run("evaluate", *CLIPS, "--samples", *parts, "--weights", *given(weights, *names), *common)  # on the way
    assert json.loads(out.read_text()) == score


def test_what_a_measurement_takes(weights: Path, fail: Run, tmp_path: Path) -> None:
    part = sampled(tmp_path / "1-of-1", {0: ASKED[0]}, frames=3)
    common = ("--samples", part, "--out", tmp_path / "out.jsonl")
    said = fail("measure", *CLIPS, *common, "--weights", *given(weights, "dino", "clip_base"))
    assert "needs the weights clip_large: add --weights clip_large=PATH" in said
    said = fail("measure", *CLIPS, "suite=text", *common, "--weights", *given(weights, "dino"))
    assert "Small text (RapidOCR) has no use for dino: leave --weights out" in said
    said = fail("measure", *CLIPS, "suite=dev", *common)
    assert "the samples of suite=dev are not scored; allowed: report, diversity or text" in said
    assert "give them to `rcm evaluate`" in fail("measure", *common)
    said = fail("measure", *IMAGES, "evaluation.scorer=geneval-mmdet", *common)
    assert "`rcm evaluate --official`" in said
    lost = [f"{name}={tmp_path / 'lost'}" for name in ("clip_large", "dinov2", "vgg")]
    assert "lost does not exist" in fail("measure", *CLIPS, "suite=diversity", *common, "--weights", *lost)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("suite", "names"),
    [
        ("report", ("dino", "clip_base", "clip_large", "aesthetic")),
        ("diversity", ("clip_large", "dinov2", "vgg")),
        ("text", ()),
    ],
)
def test_clips_of_another_length_are_refused(
    suite: str, names: tuple[str, ...], weights: Path, fail: Run, tmp_path: Path
) -> None:
    part = sampled(tmp_path / "1-of-1", {0: {**ASKED[0], "text": "RED"}}, frames=3)
    (part / "sampling.json").write_text('{"frames": 81}')
    looking = ("--weights", *given(weights, *names)) if names else ()
    words = ("measure", *CLIPS, f"suite={suite}", "--samples", part, *looking, "--out", tmp_path / "out.jsonl")
    assert "00000/samples/0000.png has 3 frames, expected 81" in fail(*words)


@pytest.mark.slow  # the detector enlarges all images, VGG takes 512 x 512 pixels
def test_images_are_measured_and_scored(
    weights: Path, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = [single_object("bear"), counting("cup", 2)]
    part = sampled(tmp_path / "1-of-1", dict(enumerate(prompts)), frames=1)
    diverse = sampled(tmp_path / "diverse", {0: prompts[0]}, frames=1, count=2)
    stored, features = tmp_path / "report.jsonl", tmp_path / "diversity.jsonl"
    detecting = ("--weights", *given(weights, "detector", "clip_large"))
    run("measure", *IMAGES, "--samples", part, *detecting, "--out", stored)
    looking = ("--weights", *given(weights, "clip_large", "dinov2", "vgg"))
    run("measure", *IMAGES, "suite=diversity", "--samples", diverse, *looking, "--out", features)
    out = tmp_path / "teacher-35.json"
    common = ("--prompts", written(tmp_path / "prompts.jsonl", prompts), "--out", out)
    common += ("--results", tmp_path / "results.jsonl", "--diversity", features)
    run("evaluate", *IMAGES, "--measured", stored, *common)
    score = json.loads(out.read_text())
    assert {"geneval.overall", "geneval.counting", "diversity.vbench2"} <= set(score["metrics"])
    assert score["evaluator"]["name"] == "GenEval (HF Mask2Former)" and score["evaluator"]["known"]["facts"] > 0
    demanding = ("measure", *IMAGES, "evaluation.known_at_least=0.8", "--samples", part, *detecting)
    assert main([*map(str, demanding), "--out", str(tmp_path / "no.jsonl")]) == 2
    assert "15 of 15 facts on known photographs" in capsys.readouterr().err
    assert not (tmp_path / "no.jsonl").exists()
