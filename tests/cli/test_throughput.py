"""`rcm throughput`: what is timed, by a clock that the test sets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rcm.cli import models, throughput

from .conftest import SMALL, Mini, Run

CLIPS = ["experiment=tiny-clips", "evaluation.throughput=3", *SMALL]


class Clock:
    """Seconds that pass when something is done, and who looked at them on which device."""

    def __init__(self) -> None:
        self.now, self.looked = 0.0, 0

    def __call__(self, device: torch.device) -> float:
        assert device.type == "cpu"
        self.looked += 1
        return self.now


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue star\n")
    return path


def test_what_is_timed(mini: Mini, prompts: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to warm up, of 100 s, and three of 4, 5 and 6 s for sampling and 1 s for decoding."""
    clock, drawn, decoded = Clock(), [], throughput.decoded
    monkeypatch.setattr(throughput, "clock", clock)
    draw = models.Student.sample

    def slowly(self: Any, text_BLD: torch.Tensor, jobs: Any, **options: Any) -> torch.Tensor:
        assert len(text_BLD) == 1 and options == {"steps": 2, "seed": 43}
        clock.now += [100, 4, 5, 6][len(drawn)]
        drawn.append(jobs[0])
        return draw(self, text_BLD, jobs, **options)

    def decode(*given: Any) -> Any:
        clock.now += 1
        return decoded(*given)

    monkeypatch.setattr(models.Student, "sample", slowly)
    monkeypatch.setattr(throughput, "decoded", decode)
    out = tmp_path / "rcm-0-2.json"
    files = ("--checkpoint", mini.clips, "--codec", mini.codec, "--prompts", prompts)
    run("throughput", *CLIPS, *files, "--steps", 2, "--out", out)
    assert drawn == [(0, 0), (0, 0), (1, 0), (0, 1)]
    found = json.loads(out.read_text())
    versions = found.pop("versions")
    assert versions["torch"] == torch.__version__
    assert found == {
        "model": "rcm-0",
        "steps": 2,
        "media": "clips",
        "frames": 9,
        "fps": 1.5,
        "seconds": 6.0,
        "sampling_seconds": 5.0,
        "decoding_seconds": 1.0,
        "batch": 1,
        "device": "CPU",
        "precision": "float32",
        "samples": 3,
    }
    assert json.loads(Path(f"{out}.prov.json").read_text())["stage"] == "throughput"


def test_the_teacher_and_real_seconds(mini: Mini, prompts: Path, run: Run, fail: Run, tmp_path: Path) -> None:
    run("convert", *SMALL, "--checkpoint", mini.transformer, "--out", tmp_path / "teacher")
    few = (*SMALL, "teacher.steps=3", "evaluation.throughput=1")
    files = ("--checkpoint", tmp_path / "teacher", "--codec", mini.codec, "--prompts", prompts)
    run("throughput", *few, *files, "--steps", 3, "--out", tmp_path / "teacher-3.json")
    found = json.loads((tmp_path / "teacher-3.json").read_text())
    assert (found["model"], found["media"], found["frames"]) == ("teacher", "images", 1)
    assert 0 < found["decoding_seconds"] < found["seconds"] < 60
    assert found["seconds"] == pytest.approx(found["sampling_seconds"] + found["decoding_seconds"])
    assert found["fps"] == pytest.approx(1 / found["seconds"])
    said = fail("throughput", *few, *files, "--steps", 4, "--out", tmp_path / "teacher-3.json")
    assert "--steps is 4, but --out is called teacher-3.json" in said
    said = fail("throughput", *few, *files, "--steps", 4, "--out", tmp_path / "teacher-4.json")
    assert "the teacher takes 3 steps" in said
