"""SIGTERM, SIGUSR1 and Ctrl-C: a distillation saves its state and goes on bit for bit, other stages leave nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rcm.cli import main
from rcm.training.signals import EXIT_INTERRUPTED, caught_signals

from .miniature import LIGHT, ROOT, STAGES, Server, hidden, made, run_ranks

NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
PROMPT = 30.0  # seconds in which a run that was asked to has ended
KEPT = (".1-of-1.tar.unfinished", ".transformer.pth.download")  # what the next run goes on from


def end(server: Server, name: str, folder: Path, number: int, **when: Any) -> dict[str, Any]:
    """End a stage early, look at what it leaves, and have it done; what the server told of the first run."""
    folder.mkdir()
    new = server.undisturbed(name)[1]["made"]
    told = server.run(name, folder, number=number, **when)
    assert told["status"] in (0, EXIT_INTERRUPTED, 128 + number), told["said"]
    assert (told["since"] or 0) < PROMPT
    assert "Traceback" not in told["said"]
    if told["status"]:
        (line,) = [line for line in told["said"].splitlines() if "interrupted" in line]
        assert "again" in line
        assert told["status"] != EXIT_INTERRUPTED or name == "distill"
    assert [left for left in hidden(folder) if not left.startswith(("resume", *KEPT))] == []
    found = made(folder)
    assert found.items() <= new.items()
    again = server.run(name, folder)
    assert again["status"] == 0, again["said"]
    assert made(folder) == new
    return told


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_ends_at_once_in_one_line(server: Server, name: str, tmp_path: Path) -> None:
    seconds, drawn = server.undisturbed(name)[1]["seconds"], random.Random(name)
    moments = [(k + drawn.random()) / len(NUMBERS) * seconds for k in range(len(NUMBERS))]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(end, server, name, tmp_path / number.name, number, after=moment)
            for number, moment in zip(NUMBERS, moments, strict=True)
        ]
        print(name, [(job.result()["status"], job.result()["since"]) for job in jobs])


def test_one_stage_ends_at_once_in_one_line(tmp_path: Path) -> None:
    server = Server(tmp_path, LIGHT)
    try:
        told = end(server, "prompts", tmp_path / "ended", signal.SIGTERM, before=1)
        assert told["status"] == 128 + signal.SIGTERM
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_distillation_saves_its_state(server: Server, number: signal.Signals, tmp_path: Path) -> None:
    """At a change of a name in the middle of its training, for a signal may come while a state is being written."""
    changes = server.undisturbed("distill")[1]["changes"]
    for share in range(12, 2, -1):  # what comes behind the last iteration is only noted
        told = end(server, "distill", tmp_path / str(share), number, before=changes // share)
        if "interrupted: the state after iteration" in told["said"]:
            assert told["status"] == EXIT_INTERRUPTED
            return
    raise AssertionError(f"no signal came during the training: {told['said']}")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_a_library_takes_for_a_fault(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistaken(*_: object) -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            raise AttributeError("'NoneType' object has no attribute 'x'") from None

    monkeypatch.setattr("rcm.cli.data.compose", mistaken)
    assert main(["prompts", "--out", str(tmp_path / "x.jsonl")]) == 128 + number
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(SystemExit) as leaving, caught_signals(at_once=True):
        mistaken()
    assert leaving.value.code == EXIT_INTERRUPTED
    assert signal.getsignal(number) is (signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.mark.parametrize("number", NUMBERS[:2])
def test_a_launched_rank_is_told_twice(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Slurm and by the launcher, or by torchrun once another rank has ended: to the end of the process."""
    before = signal.getsignal(number)
    monkeypatch.setenv("LOCAL_RANK", "0")
    try:
        with caught_signals() as caught:
            for _ in range(2):
                signal.raise_signal(number)
        signal.raise_signal(number)
        assert caught.numbers == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.slow
def test_two_ranks_save_their_state(server: Server, tmp_path: Path) -> None:
    """The signal goes to the launcher, as Slurm and Snakemake send it."""
    longer = "distillation.student_updates=8"
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = ["--standalone", "--nproc-per-node", "2", "-m", "rcm", *server.words("distill"), longer]
    for name in ("whole", "ended"):
        (tmp_path / name).mkdir()
    launch = [sys.executable, "-m", "rcm.launch", *words]
    with subprocess.Popen(launch, cwd=tmp_path / "ended", env=environment, stderr=subprocess.PIPE, text=True) as run:
        while not (tmp_path / "ended/resume/000000002").exists() and run.poll() is None:
            time.sleep(0.005)
        asked = time.monotonic()
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=120)[1]
    seconds = time.monotonic() - asked
    assert run.returncode == EXIT_INTERRUPTED, said
    assert seconds < PROMPT
    print(f"two ranks: {seconds:.1f} s")
    assert said.count("interrupted: the state after iteration") == 1
    assert made(tmp_path / "ended") == {}
    for name in ("whole", "ended"):
        assert [told["status"] for told in run_ranks(server, tmp_path / name, longer)] == [0, 0]
    assert made(tmp_path / "ended") == made(tmp_path / "whole")
