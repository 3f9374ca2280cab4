"""What a run took: over attempts and ranks, without secrets, and whatever is damaged."""

import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rcm import usage
from rcm.artefact import content_sha256, read_json, read_run, recording, write_text


def stage(folder: Path, *, resume: Path | None = None, error: BaseException | None = None, number: int = 0) -> Any:
    """A stage of 50 ms in a folder of its own; its `.run.json`."""
    config = {"number": number} if number else {}
    with recording(folder / "x", stage="test", resume=resume, config=config) as facts:
        time.sleep(0.05)
        if error is not None:
            raise error
        write_text(folder / "x", "x")
        facts["steps"] = 7
    return read_json(folder / "x.run.json")


def test_attempts_are_summed(tmp_path: Path) -> None:
    resume = tmp_path / "resume"
    first = stage(tmp_path)
    assert first["attempts"] == 1 and "earlier" not in first
    for error in (SystemExit(75), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            stage(tmp_path, resume=resume, error=error)
    with pytest.raises(ValueError, match="bug"):  # a mistake at the start is no attempt
        stage(tmp_path, resume=resume, error=ValueError("bug"))
    (resume / "attempts" / "damaged.json").write_text("{")
    (resume / "attempts" / "other.json").write_text('{"wall_seconds": [1]}')
    assert stage(tmp_path, resume=resume, number=2)["attempts"] == 1  # those were of another configuration
    run = stage(tmp_path, resume=resume)
    assert run["attempts"] == 3 and len(run["earlier"]) == 2
    assert 0.15 <= run["wall_seconds"] < 10 and run["gpu_hours"] == 0 < run["core_hours"]
    assert run["started"] == run["earlier"][0]["started"] and run["facts"] == {"steps": 7}


KILLED = """
import sys, time
from pathlib import Path
from rcm import artefact, usage
usage.EVERY = 0.05
with artefact.recording(sys.argv[1], stage="test", resume=Path(sys.argv[2])):
    time.sleep(0.3)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_attempt_is_remembered(tmp_path: Path) -> None:
    resume = tmp_path / "resume"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "x"), str(resume)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    run = stage(tmp_path, resume=resume)
    assert run["attempts"] == 2 and run["earlier"][0]["wall_seconds"] >= 0.1


def test_other_ranks_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"node": "b", "peak_mib": 1e6, "gpu_peak_mib": 70_000, "cpu_seconds": 7200.0}
    with recording(tmp_path / "x", stage="test", ranks=3) as facts:
        write_text(tmp_path / "x", "x")
        facts["ranks"] = [other, other]
    run = read_json(tmp_path / "x.run.json")
    assert run["ranks"] == 3 and "b" in run["nodes"] and run["facts"] == {}
    assert 4 <= run["core_hours"] < 4.1 and 2e6 < run["peak_mib"] < 2.1e6 and run["gpu_peak_mib"] == 70_000
    monkeypatch.setattr(usage, "usage", lambda: {**other, "gpu_peak_mib": 1, "cpu_seconds": 0.0})
    monkeypatch.setattr(time, "perf_counter", iter([0.0, 1800.0]).__next__)
    spent = usage.Meter(ranks=8).spent()  # cut off, so only this rank is known
    assert spent["gpu_hours"] == 4.0 and spent["peak_mib"] == 8e6


def test_the_command_line_holds_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/usr/bin/python", "-m", "rcm", "x.source=https://host/a.pth?token=s3cret", "y=http://me:s3cret@h/b c"]
    monkeypatch.setattr(sys, "orig_argv", words)
    said = usage.command()
    assert said.startswith("python -m rcm ") and "https://host/a.pth" in said and "://h/b" in said
    assert "s3cret" not in said


def test_versions_of_what_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usage.versions()["torch"] == importlib.metadata.version("torch")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0")  # all are installed
    for module in ("flash_attn", "transformer_engine", "triton"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert not usage.versions().keys() & {"flash-attn", "transformer-engine", "triton"}
    monkeypatch.setitem(sys.modules, "flash_attn", sys)
    assert usage.versions()["flash-attn"] == "1.0"


def test_the_slurm_job_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert stage(tmp_path)["slurm_job_id"] == "4711"


def test_a_new_module_is_a_change_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "src/rcm/usage.py"
    write_text(module, "")
    write_text(tmp_path / ".gitignore", "/data/*\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(usage, "__file__", str(module))
    for path, dirty in (("notes.txt", False), ("data/x", False), ("src/rcm/new.py", True)):
        write_text(tmp_path / path, "x")
        found = usage.git_version()
        assert found and found["dirty"] == dirty, path


def test_what_a_step_took_is_no_identity_of_metrics(tmp_path: Path) -> None:
    one, two = tmp_path / "1" / "metrics.jsonl", tmp_path / "2" / "metrics.jsonl"
    for path, seconds, loss in ((one, 1.0, 0.5), (two, 2.0, 0.5)):
        path.parent.mkdir()
        path.write_text("".join(json.dumps({"step": k, "loss": loss, "wall": {"s": seconds}}) + "\n" for k in (1, 2)))
    assert content_sha256(one) == content_sha256(two)
    two.write_text(two.read_text().replace("0.5", "0.25"))
    assert content_sha256(one) != content_sha256(two)
    for damaged in (one.read_text()[:-9], "[1]\n", "\x00", "[" * 100_000):
        two.write_text(damaged)
        assert content_sha256(one) != content_sha256(two)


@pytest.mark.parametrize("change", ["", "{", "[]", {"git": 3}, {"git": {}}, {"wall_seconds": "1"}, {"gpu_hours": "1"}])
def test_a_damaged_run_record_says_nothing(tmp_path: Path, change: str | dict[str, object]) -> None:
    good = stage(tmp_path)
    path = tmp_path / "x.run.json"
    assert read_run(path) == good and read_run(tmp_path / "y.run.json") is None
    assert read_run(path, good["sha256"]) == good and read_run(path, "0" * 64) is None  # of an artefact that was here
    path.write_text(change if isinstance(change, str) else json.dumps({**good, **change}))
    assert read_run(path) is None
