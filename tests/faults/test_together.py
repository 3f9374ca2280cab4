"""Two runs at once: in one folder the second says so and harms nothing; of two scales, each goes its way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rcm.artefact import beside, content_sha256, read_json

from .test_damage import CODEC, STAGES, mini, tree  # noqa: F401  fixtures

ROOT = Path(__file__).parents[2]
SLOW = """
import sys, time
from pathlib import Path
import rcm.artefact, rcm.training.state
from rcm.cli import main
place, plain = Path(sys.argv[1]), rcm.artefact.sync
def sync(path):
    if not place.exists():
        place.touch()
        while place.with_name("go").exists() is False: time.sleep(0.02)
    plain(path)
rcm.artefact.sync = rcm.training.state.sync = sync
sys.exit(main(sys.argv[2:]))
"""  # which waits where its first output is about to be kept


def started(words: list[str], out: Path, folder: Path, reached: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SLOW, str(reached), *(word.replace("{out}", str(out)) for word in words)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def until(condition: Path, process: "subprocess.Popen[str]", limit: float = 120) -> None:
    end = time.monotonic() + limit
    while not condition.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["synthesize", "distill"])
def test_the_second_run_of_a_stage_says_so(
    stage: str,
    tree: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rcm.cli import main

    words = [*STAGES[stage], *(["distillation.state_every=1", "distillation.student_updates=2"] * (stage == "distill"))]
    first, reached = started(words, tmp_path / "out", tree, tmp_path / "reached"), tmp_path / "reached"
    try:
        until(reached, first)
        capsys.readouterr()
        assert main([word.replace("{out}", str(tmp_path / "out")) for word in words]) == 2
        said = capsys.readouterr().err
        assert "another process" in said and said.count("error: ") == 1 and "Traceback" not in said
    finally:
        (tmp_path / "go").touch()
        error = first.communicate(timeout=120)[1]
    assert first.returncode == 0, error
    alone, made = tmp_path / "alone", {"synthesize": "1-of-2.tar", "distill": "dcp"}[stage]
    assert main([word.replace("{out}", str(alone)) for word in words]) == 0
    assert content_sha256(tmp_path / "out" / made) == content_sha256(alone / made)


WHOLE = {
    "convert": "teacher", "export": "student.safetensors", "sample control": "samples", "evaluate": "rcm-0-1.json",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", WHOLE)
def test_two_runs_of_a_stage_without_a_state_harm_nothing(
    stage: str,
    tree: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The first is about to keep its output when the second has done all of its work."""
    from rcm.cli import main

    first, reached = started(STAGES[stage], tmp_path / "out", tree, tmp_path / "reached"), tmp_path / "reached"
    try:
        until(reached, first)
        for folder in ("out", "alone"):
            assert main([word.replace("{out}", str(tmp_path / folder)) for word in STAGES[stage]]) == 0
    finally:
        (tmp_path / "go").touch()
        error = first.communicate(timeout=120)[1]
    assert first.returncode == 0, error
    out, alone = (tmp_path / folder / WHOLE[stage] for folder in ("out", "alone"))
    assert content_sha256(out) == content_sha256(alone) == read_json(beside(out, ".prov.json"))["sha256"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_the_second_download_waits(mini: object, tree: Path, tmp_path: Path) -> None:  # noqa: F811
    source, out = CODEC.absolute(), tmp_path / "x.pth"
    words = [
        "download",
        f"checkpoints.codec.source={source}",
        "checkpoints.codec.sha256=null",
        "--name",
        "codec",
        "--out",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "rcm", *words, str(out)]
    runs = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for run in runs:
        error = run.communicate(timeout=120)[1]
        assert run.returncode == 0 and "Traceback" not in error, error
    assert content_sha256(out) == content_sha256(source) == read_json(beside(out, ".prov.json"))["sha256"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- Snakemake ------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the project in it, whose stages wait for a file."""
    for name in ("Snakefile", "workflow", "config", "src", "kernels", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def snakemake(project: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "snakemake", "-c1", "--nocolor", *words]
    path = os.pathsep.join([str(project / "wait"), str(project / "src"), str(project / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PROJECT": str(project)}
    (project / "wait").mkdir(exist_ok=True)
    (project / "wait" / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if sys.argv[:1] == ['-m'] and 'prompts' in sys.orig_argv and 'rcm' in sys.orig_argv:\n"
        "    open(os.environ['PROJECT'] + '/reached', 'w').close()\n"
        "    while not os.path.exists(os.environ['PROJECT'] + '/go'): time.sleep(0.05)\n"
    )
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


PROMPT_FILE = "data/tiny/images/prompts/dev.jsonl"


@pytest.mark.slow
def test_two_runs_in_one_folder_and_one_that_was_killed(project: Path) -> None:
    """The second says that the folder is locked; what a killed one left is unlocked as the README says."""
    first = snakemake(project, PROMPT_FILE)
    until(project / "reached", first)
    second = snakemake(project, PROMPT_FILE)
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 1 and "LockException" in said and "--unlock" in said and "Traceback" not in said, said
    first.send_signal(signal.SIGKILL)
    first.wait()  # its job lives on, and holds the pipe
    third = snakemake(project, PROMPT_FILE)
    said = third.communicate(timeout=120)[0]
    assert third.returncode == 1 and "--unlock" in said
    assert snakemake(project, "--unlock").wait(timeout=120) == 0
    (project / "go").touch()
    fourth = snakemake(project, "--rerun-incomplete", PROMPT_FILE)
    assert fourth.wait(timeout=120) == 0, fourth.communicate()[0]
    record = read_json(beside(project / PROMPT_FILE, ".prov.json"))
    assert record["sha256"] == content_sha256(project / PROMPT_FILE)


@pytest.mark.slow
def test_two_scales_side_by_side(project: Path) -> None:
    first = snakemake(project, PROMPT_FILE)
    until(project / "reached", first)
    (project / "reached").unlink()
    other = "data/cosmos-predict2-0.6b/images/prompts/report.jsonl"
    second = snakemake(project, other, "--config", "scale=cosmos-predict2-0.6b")
    until(project / "reached", second)  # both are at work
    (project / "go").touch()
    for run, path in ((first, PROMPT_FILE), (second, other)):
        said = run.communicate(timeout=120)[0]
        assert run.returncode == 0, said
        assert read_json(beside(project / path, ".prov.json"))["sha256"] == content_sha256(project / path)
