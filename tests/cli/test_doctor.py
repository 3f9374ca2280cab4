"""What is said about the machine, and about progress where there is no terminal."""

import re
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest

from rcm.artefact import UserError
from rcm.cli import doctor, progress

from .conftest import Run


def test_doctor_names_every_part(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known, absent = doctor.installed, ("wandb", "imageio-ffmpeg", "transformer-engine")
    monkeypatch.setattr(doctor, "installed", lambda name: None if name in absent else known(name))
    doctor.doctor(Namespace())
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line)
    expected = (
        "python torch threads snakemake hydra-core wandb ffmpeg CUDA triton flash-attn transformer-engine dvc attention"
    )
    assert set(expected.split()) <= lines.keys()
    assert lines["wandb"] == "absent: metrics go to JSON lines only"
    assert lines["ffmpeg"].startswith("absent")
    assert lines["transformer-engine"] == "absent: on a GPU, AdamW is that of PyTorch"
    assert lines["attention"].split(None, 2)[2] == "flash-cpu; with tangents torch; gradient flash-cpu"
    run("doctor")


def test_doctor_promises_the_pipeline_only_with_snakemake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "snakemake" else known(name))
    doctor.doctor(Namespace())
    last = capsys.readouterr().out.splitlines()[-1]
    assert "one by one" in last and "every stage" not in last


def test_doctor_looks_for_what_is_installed_by_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[ ]", line)[0] for line in project["dependencies"]}
    assert set(doctor.REQUIRED) == names - {"snakemake", "wandb", "imageio-ffmpeg"}  # things work without these


def test_doctor_refuses_a_machine_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "torch" else known(name))
    with pytest.raises(UserError, match="missing torch: run `make setup`"):
        doctor.doctor(Namespace())


def test_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 5.0, 20.0, 20.0, 41.0, 41.0, 45.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Progress("work", 100, "samples") as counted:
        counted.advance(10)  # after 5 s: too early for a line
        counted.advance(10)  # 20 in 20 s
        counted.advance(21, "loss 0.5")  # 21 more in 21 s
    assert capsys.readouterr().err.splitlines() == [
        "work: 20 of 100 samples, about 80 s left",
        "work: 41 of 100 samples, about 59 s left, loss 0.5",
        "work: 41 samples in 45.0 s",
    ]
