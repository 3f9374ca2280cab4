"""Runs of several processes from their start to their end: killed, interrupted, wrong, and resumed on other ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.cli.conftest import SMALL, Mini, mini  # noqa: F401  (a fixture)
from tests.distributed.test_training import data, fake_score, network, whole
from tests.training.test_distill import configuration

from rcm.checkpoints import load_dcp
from rcm.cli import main
from rcm.cli.ranks import PATIENCE, speaker
from rcm.launch import _address, _children, _forward, first_cause
from rcm.launch import main as launcher
from rcm.parallel import parallelize, start
from rcm.training.distill import distill
from rcm.training.signals import EXIT_INTERRUPTED

ROOT = Path(__file__).parents[2]
TEN = {"student_updates": 5, "critic_warmup": 1, "state_every": 5, "batch": 5, "max_rollout": 2, "eps": 1e-3}
LIMIT = 120  # seconds that a run may take


def train(folder, act=lambda iteration, mesh, folder: None):
    """Ten iterations on all ranks, from where an earlier run was stopped: weights of the student, rows of figures."""
    torch.set_num_threads(1)
    mesh = start(device="cpu")
    student, teacher, fake = network(1), network(0), fake_score("rcm")
    for built in (student, teacher, fake):
        parallelize(built, mesh, recompute="blocks")
    done = [0]

    def advance(count, note):
        done[0] += count
        act(done[0], mesh, folder)

    try:
        distill(
            configuration(**TEN), student=student, teacher=teacher, fake=fake, data=data(),
            null_text=torch.zeros(1, 3, 8), resume_dir=folder / "resume", metrics_path=folder / "metrics.jsonl",
            mesh=mesh, advance=advance,
        )  # fmt: skip
    except SystemExit as leaving:
        if __name__ == "__main__":
            raise
        return leaving.code
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] if mesh.is_main else []
    return {name: whole(p) for name, p in student.named_parameters()}, [row | {"wall": None} for row in rows]


def signalled(folder):
    """A signal to rank 1 alone."""

    def act(iteration, mesh, _folder):
        if mesh.rank == 1 and iteration == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    return train(folder, act)


def until(true):
    """Wait, on a busy machine too, for what another process or thread does."""
    end = time.monotonic() + LIMIT / 2
    while not true() and time.monotonic() < end:
        time.sleep(0.01)


def killed(iteration, mesh, folder):
    if mesh.rank == 1 and iteration == 7:
        until((folder / "resume" / "000000005").exists)  # it is written in the background
        os.kill(os.getpid(), signal.SIGKILL)


def terminated(iteration, mesh, _folder):
    if mesh.rank == 1 and iteration == 2:
        before = signal.getsignal(signal.SIGTERM)
        os.kill(os.getppid(), signal.SIGTERM)  # the launcher's to pass on
        until(lambda: signal.getsignal(signal.SIGTERM) != before)  # caught: the second would end the process


if __name__ == "__main__":  # a rank of a run that ends as told: FOLDER ACTION
    train(Path(sys.argv[1]), globals()[sys.argv[2]])


def started(*arguments, nproc=2):
    """A running launcher of some ranks, whose stderr is that of the ranks too."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels"), str(ROOT)])
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rcm.launch", "--nproc-per-node", str(nproc), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def launch(*arguments, nproc=2):
    """The ended launcher of some ranks: exit status, and what it and they said on stderr."""
    with started(*arguments, nproc=nproc) as run:
        errors = run.communicate(timeout=LIMIT)[1]
    said = [line for line in errors.splitlines() if line and "UserWarning" not in line and line[:2] != "  "]
    return run.returncode, said


@pytest.fixture(scope="module")
def straight(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, ranks(2, train, folder)


def test_ten_steps_are_five_a_death_and_five(ranks, straight, tmp_path):
    status, said = launch(__file__, tmp_path, "killed")
    assert status == 128 + signal.SIGKILL
    assert any("rank 1 failed first: it was killed by SIGKILL" in line for line in said)
    assert sorted(path.name for path in (tmp_path / "resume").glob("0*")) == ["000000005"]
    assert not (tmp_path / "metrics.jsonl").exists()
    shutil.copytree(tmp_path / "resume", tmp_path / "four" / "resume")

    resumed = ranks(2, train, tmp_path)
    for (weights, rows), (expected, expected_rows) in zip(resumed, straight[1], strict=True):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert rows == expected_rows
    (weights, rows), *_ = ranks(4, train, tmp_path / "four")
    expected, expected_rows = straight[1][0]
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    for row, other in zip(rows, expected_rows, strict=True):
        numbers = [key for key, value in other.items() if isinstance(value, float | int)]
        assert [row[key] for key in numbers] == pytest.approx([other[key] for key in numbers], rel=1e-12, abs=1e-12)


def test_a_signal_to_one_rank_ends_all_at_the_same_iteration(ranks, straight, tmp_path):
    assert ranks(2, signalled, tmp_path) == [EXIT_INTERRUPTED] * 2
    assert [path.name for path in (tmp_path / "resume").glob("0*")] == ["000000004"]
    resumed = ranks(2, train, tmp_path)
    for (weights, rows), (expected, expected_rows) in zip(resumed, straight[1], strict=True):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert rows == expected_rows


def test_a_signal_to_the_launcher_reaches_the_ranks(tmp_path):
    status, said = launch(__file__, tmp_path, "terminated")
    assert status == EXIT_INTERRUPTED
    (line,) = said
    assert "interrupted: the state after iteration 3 of 10" in line


def test_a_rank_or_thread_that_has_just_ended_keeps_no_signal_from_the_others(monkeypatch):
    ended, alive = [subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({s})"]) for s in (0, 60)]
    ended.wait()
    monkeypatch.setattr(Path, "glob", lambda *_: [Path("/proc/self/task/0/children")])
    assert _children() == []
    monkeypatch.undo()
    assert alive.pid in _children()
    monkeypatch.setattr("rcm.launch._children", lambda: [ended.pid, alive.pid])
    _forward(signal.SIGTERM, None)
    assert alive.wait(10) == -signal.SIGTERM


def test_the_first_cause_is_not_its_consequence(capsys):
    failures = {0: (1, 4), 1: (-signal.SIGABRT, 3), 2: (-signal.SIGKILL, 5), 3: (-signal.SIGTERM, 6)}
    table = {rank: SimpleNamespace(exitcode=code, timestamp=at) for rank, (code, at) in failures.items()}
    assert first_cause(table).status == 128 + signal.SIGKILL
    first_cause(table).speak()
    assert "rank 2 failed first: it was killed by SIGKILL" in capsys.readouterr().err
    del table[2], table[1]
    assert first_cause(table).status == 1
    first_cause(table).speak()
    assert "rank 0 failed first: it ended with 1" in capsys.readouterr().err
    for others in (-signal.SIGTERM, 128 + signal.SIGTERM):  # torchrun's, in the same whole second
        table = {0: SimpleNamespace(exitcode=others, timestamp=7), 1: SimpleNamespace(exitcode=75, timestamp=7)}
        assert first_cause(table).status == EXIT_INTERRUPTED


def test_a_place_without_scontrol(monkeypatch, capsys):
    def refused(*_, **__):
        raise FileNotFoundError("scontrol")

    monkeypatch.setattr("rcm.launch.subprocess.run", refused)
    lists = {"n1": "n1", "n[3-5,7],m1": "n3", "gpu-a[009,011]-ib": "gpu-a009-ib", "a.b.c,n[1-2]": "a.b.c"}
    assert {nodes: _address(nodes) for nodes in lists} == lists
    for name, value in {"STEP_NUM_NODES": "2", "STEP_NODELIST": "", "JOB_ID": "1", "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert launcher(["-m", "rcm"]) == 2
    assert "SLURM_STEP_NODELIST is ''" in capsys.readouterr().err


@pytest.fixture(scope="module")
def project(mini: Mini, tmp_path_factory):  # noqa: F811
    """Arguments of `rcm distill` on a teacher and a shard in miniature, but for its outputs."""
    folder = tmp_path_factory.mktemp("project")
    teacher, train_prompts, shard = folder / "teacher", folder / "train.jsonl", folder / "1-of-1.tar"
    for stage in (
        ("convert", *SMALL, "--checkpoint", mini.transformer, "--out", teacher),
        ("prompts", "suite=train", "suites.train.prompts=8", "--out", train_prompts),
        (
            *("synthesize", *SMALL, "teacher.steps=1", "--teacher", teacher, "--prompts", train_prompts),
            *("--shard", "1-of-1", "--out", shard),
        ),
    ):
        assert main([str(word) for word in stage]) == 0
    quick = [f"distillation.{key}" for key in (
        "student_updates=3", "batch=5", "preview_every=3", "scm_only=1", "critic_warmup=1", "student_every=2",
        "profile=[2,3]",
    )]  # fmt: skip

    def arguments(out, *overrides):
        outputs = {"out": "dcp", "metrics": "metrics.jsonl", "previews": "previews", "resume": "resume"}
        named = [word for option, file in outputs.items() for word in (f"--{option}", out / file)]
        given = ("--teacher", teacher, "--data", shard, "--codec", mini.codec)
        return [str(word) for word in ("distill", *SMALL, *quick, *overrides, *given, *named)]

    return arguments


def test_distill_on_two_processes(project, tmp_path):
    assert main(project(tmp_path / "one")) == 0
    status, said = launch("-m", "rcm", *project(tmp_path / "two", "parallel.micro_batch=2"))
    assert status == 0, said
    one, two = (load_dcp(tmp_path / name / "dcp") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    for name in ("one", "two"):
        assert [path.name for path in (tmp_path / name / "previews").iterdir()] == ["000003.png"]
        assert not (tmp_path / name / "resume").exists()
        trace = json.loads((tmp_path / name / "resume.trace.json").read_text())
        assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    alone, run = (json.loads((tmp_path / name / "dcp.run.json").read_text()) for name in ("one", "two"))
    assert (alone["ranks"], run["ranks"]) == (1, 2) and run["core_hours"] > 0
    facts = run["facts"]
    assert facts["optimizer"] == "torch" and facts["parallel"]["shard"] == 2


@pytest.mark.slow
def test_ranks_end_with_their_launcher(project, tmp_path):
    run = started("-m", "rcm", *project(tmp_path, "distillation.student_updates=100000", "distillation.profile=null"))
    until(lambda: (tmp_path / "resume/metrics.jsonl").exists())
    run.kill()
    run.communicate(timeout=LIMIT / 2)  # until no rank keeps its stderr open
    assert not (tmp_path / "dcp").exists()


def test_a_mistake_on_all_ranks_is_said_once(project, tmp_path):
    status, said = launch("-m", "rcm", *project(tmp_path, "parallel.context=3"))
    assert status == 2
    mistake, cause = said
    assert mistake.startswith("rcm distill: error: 2 processes do not fit")
    assert cause.startswith("rcm.launch: rank 0 failed first: it ended with 2")


def test_ranks_speak_one_after_the_other(monkeypatch):
    waits = []
    monkeypatch.setattr("rcm.cli.ranks.time.sleep", waits.append)
    monkeypatch.delenv("RANK", raising=False)
    assert (speaker("rcm distill"), waits) == ("rcm distill", [])
    monkeypatch.setenv("RANK", "0")
    assert (speaker("rcm distill"), waits) == ("rcm distill", [])
    monkeypatch.setenv("RANK", "3")
    assert (speaker("rcm distill"), waits) == ("rcm distill (rank 3)", [PATIENCE])
