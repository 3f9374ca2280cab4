"""A command of another environment is recorded as a stage is, and ends as it would alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rcm.artefact import beside, content_sha256, read_json, read_record, write_json
from rcm.cli.external import main

COPY = "import shutil, sys; shutil.copyfile(*sys.argv[1:])"


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("in").write_text("x")
    return ["--stage", "official", "--inputs", "in", "--out", "out", "--config", 'numbers={"a": 1}', "environment=e1"]


def test_it_is_recorded(given: list[str]) -> None:
    assert main([*given, "--", sys.executable, "-c", COPY, "in", "out"]) == 0
    record = read_record("out.prov.json")
    assert (record["stage"], record["artefact"], record["sha256"]) == ("official", "out", content_sha256("out"))
    assert record["inputs"] == [{"path": "in", "sha256": content_sha256("in")}]
    assert record["config"] == {"numbers": {"a": 1}, "environment": "e1"}
    assert read_json("out.run.json")["wall_seconds"] > 0


def test_a_failure_is_passed_on(given: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="3"):
        main([*given, "--", sys.executable, "-c", "import sys; sys.exit(3)"])
    assert main([*given, "--", sys.executable, "-c", ""]) == 2
    assert "has not written out" in capfd.readouterr().err
    assert main([*given, "--", "./absent"]) == 2
    assert not Path("out.prov.json").exists()
    write_json(beside("in", ".prov.json"), {"artefact": "in", "sha256": "0", "stage": "arrange", "code_sha256": "0"})
    assert main([*given, "--", sys.executable, "-c", COPY, "in", "out"]) == 2
    assert "in is damaged or was replaced" in capfd.readouterr().err and not Path("out").exists()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 7), (signal.SIGUSR1, 128 + signal.SIGUSR1)])
def test_a_signal_is_passed_on(number: int, expected: int, given: list[str]) -> None:
    told = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print(flush=True); time.sleep(60)"
    command = [sys.executable, "-m", "rcm.cli.external", *given, "--", sys.executable, "-c", told]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        process.send_signal(number)
        assert process.wait(30) == expected
    assert not Path("out.prov.json").exists()
