"""What is said about the machine, and about progress where there is no terminal."""

import re
import tomllib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from rcm.artefact import UserError
from rcm.cli import doctor, progress


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, str]]:
    """What doctor says of each part where some distributions are absent."""
    known = doctor.installed

    def call(*absent: str) -> dict[str, str]:
        monkeypatch.setattr(doctor, "installed", lambda name: None if name in absent else known(name))
        doctor.doctor(Namespace())
        lines = capsys.readouterr().out.splitlines()
        return {line[:35].strip(): line[35:] for line in lines if line.startswith("  ")} | {"last": lines[-1]}

    return call


def test_doctor_names_every_part(said: Callable[..., dict[str, str]]) -> None:
    lines = said("wandb", "imageio-ffmpeg", "transformer-engine", "dvc")
    named = {*doctor.REQUIRED, *doctor.OPTIONAL, *(name for extra in doctor.EXTRAS.values() for name in extra)}
    expected = {"python", "system", "open files", "text", "films", "threads", "CUDA", "git", "slurm", "data/", "Hub"}
    assert named | expected <= lines.keys() and "DVC remote" not in lines
    assert lines["wandb"] == "absent: metrics go to JSON lines only"
    assert lines["films"].startswith("absent")
    assert lines["transformer-engine"].startswith("absent: on a GPU, AdamW is that of PyTorch; pip install --no-build-")
    assert lines["attention on cpu"] == "flash-cpu; with tangents torch; gradient flash-cpu"
    assert re.match(r"[0-9.]+ GiB free, \w+, .*link", lines["data/"])
    assert lines["last"] == "this machine can run every stage of the scale tiny"


def test_doctor_promises_the_pipeline_only_with_snakemake(said: Callable[..., dict[str, str]]) -> None:
    assert "one by one; the whole pipeline needs snakemake" in said("snakemake")["last"]


def test_doctor_looks_for_what_is_installed_by_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    def names(lines: list[str]) -> set[str]:
        return {re.split(r"[<>=\[; ]", line)[0] for line in lines}

    assert {*doctor.REQUIRED, *doctor.OPTIONAL} == names(project["dependencies"])  # OPTIONAL: things work without these
    extras = project["optional-dependencies"]
    for extra, known in doctor.EXTRAS.items():
        others = {name for other in doctor.EXTRAS if other != extra for name in doctor.EXTRAS[other]}
        assert names(extras[extra]) - others <= known.keys() <= names(extras[extra])
    assert doctor.EXTRAS.keys() == extras.keys() - {"dev"}


def test_doctor_refuses_a_machine_without_torch(said: Callable[..., dict[str, str]]) -> None:
    with pytest.raises(UserError, match="missing torch: run `make setup`"):
        said("torch")


def test_doctor_never_shows_a_token(
    said: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert dict(doctor.files())["Hub"] == f"{tmp_path}, no token, which gated repositories want: hf auth login"
    (tmp_path / "token").write_text("hf_secret")
    assert dict(doctor.files())["Hub"] == f"{tmp_path}, a token is there"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub = dict(doctor.files())["Hub"]
    assert hub.endswith("a token is there") and "secret" not in hub


@pytest.mark.parametrize(
    ("line", "written", "expected"),
    [
        ("0::/job/step", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, (1.5, None)),
        ("0::/job/step", {"job/memory.max": "4096", "job/step/memory.max": "8192"}, (None, 4096)),
        (
            "4:cpu,cpuacct:/job\n3:memory:/job",
            {
                "cpu/job/cpu.cfs_quota_us": "300000",
                "cpu/job/cpu.cfs_period_us": "100000",
                "memory/job/memory.limit_in_bytes": "4096",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            (3.0, 4096),
        ),
        ("0::/", {}, (None, None)),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path, line: str, written: dict[str, str], expected: tuple[float | None, int | None]
) -> None:
    (tmp_path / "own").write_text(f"{line}\n")
    for name, text in written.items():
        (path := tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert doctor.cgroup_limits(tmp_path / "cgroup", tmp_path / "own") == expected


def test_slurm_with_and_without_a_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = ["sbatch", "squeue", "scancel", "sacct"]
    said = "ClusterName             = big\nAccountingStorageType   = accounting_storage/slurmdbd"
    monkeypatch.setattr(doctor, "installed", lambda name: "2.8.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(doctor, "answer", lambda *command: said)
    assert doctor.slurm() == "cluster big, executor 2.8.0, accounting: snakemake --profile slurm"
    said = said.replace("slurmdbd", "none")
    assert "no accounting: states of jobs are asked of squeue" in doctor.slurm()
    said = ""
    assert "its controller does not answer" in doctor.slurm()
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert "pip install -c constraints.txt -e '.[cluster]'" in doctor.slurm()
    programs.clear()
    assert doctor.slurm().startswith("absent (sbatch, squeue, scancel): jobs run on this machine")


def test_the_remote_of_dvc(tmp_path: Path) -> None:
    folder = tmp_path / "clone" / ".dvc"
    folder.mkdir(parents=True)
    assert doctor.remote(folder).startswith("none: dvc remote add")
    (folder / "config").write_text("[core]\n    remote = near\n['remote \"near\"']\n    url = ../../store\n")
    assert doctor.remote(folder) == f"near, {tmp_path / 'store'} (not there yet: the first dvc push makes it)"
    (tmp_path / "store").mkdir()
    assert doctor.remote(folder) == f"near, {tmp_path / 'store'}"
    (folder / "config.local").write_text("['remote \"near\"']\n    url = s3://bucket/%(x)s\n")
    assert doctor.remote(folder) == "near, s3://bucket/%(x)s (not contacted; dvc status --cloud does)"


def test_pins_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cu128", "numpy": "2.5.0"}
    monkeypatch.setattr(doctor, "installed", versions.get)
    path = tmp_path / "constraints.txt"
    path.write_text("# exact\nnumpy==2.4.6\ntorch==2.13.0\ntriton==3.7.1; sys_platform == 'linux'\n")
    assert doctor.pins(path) == "1 with other versions than tested: numpy 2.5.0 (2.4.6)"
    versions["numpy"] = "2.4.6"
    assert doctor.pins(path) == "what is installed has the versions that are tested"


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
