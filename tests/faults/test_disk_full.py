"""A full disk: one sentence that names the place, earlier artefacts intact, nothing left over, a rerun succeeds."""

import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rcm.artefact import UserError, atomic_file, atomic_folder, write_text
from rcm.cli import main

from .miniature import STAGES, Server, Victim, hidden

ROOMY = 2**15  # KiB
ROOMS = 0.0, 0.4, 0.8  # what is left, of what a stage needs; and a little more
KEPT = (".1-of-1.tar.unfinished", ".transformer.pth.download", "resume")  # what the next run goes on from

Disk = Callable[[str, int], Path]


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of its own, of some KiB."""
    mounted: list[Path] = []

    def make(name: str, size: int = ROOMY) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        try:
            mount(folder, "-t", "tmpfs", "-o", f"size={size}k", "tmpfs")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a tmpfs cannot be mounted here, which takes the rights of root: {error}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def leave(folder: Path, room: int) -> None:
    """Let a file system have `room` KiB left."""
    found = os.statvfs(folder)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize // 1024
    mount(folder, "-o", f"remount,size={max(4, used + room)}k")


def needed(folder: Path) -> int:
    """KiB that what stands in a folder takes."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


def fill(server: Server, name: str, folder: Path, room: int) -> bool:
    """Run a stage where too little is left, then where there is enough; whether it failed at first."""
    victim = Victim(server, name, folder, older=True)
    leave(folder, room)
    told = server.run(name, folder)
    failed = told["status"] != 0
    if failed:
        assert told["status"] == 2, told["said"]
        assert "Traceback" not in told["said"] and "Exception" not in told["said"], told["said"]
        (line,) = [line for line in told["said"].splitlines() if "error: " in line]
        assert any(place in line for place in (*STAGES[name].outputs, "resume", "metrics.jsonl")), line
        assert "make room" in line, line
        victim.check(None)
        assert [left for left in hidden(folder) if not left.startswith(KEPT)] == []
        assert not [left for left in hidden(folder) if left.endswith(".partial")]
    leave(folder, ROOMY)
    victim.finish()
    return failed


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_on_a_full_disk(server: Server, disk: Disk, name: str) -> None:
    whole, drawn = needed(server.undisturbed(name)[0]), random.Random(name)
    rooms = [4 * int((share + 0.2 * drawn.random()) * whole / 4) if share else 0 for share in ROOMS]
    folders = [disk(f"{number}", ROOMY) for number in range(len(rooms))]
    with ThreadPoolExecutor(2) as pool:
        failed = list(pool.map(lambda folder, room: fill(server, name, folder, room), folders, rooms))
    assert failed[0]
    print(name, dict(zip(rooms, failed, strict=True)))


def test_a_command_on_a_full_disk(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    folder = disk("small")
    words = ["prompts", "suite=report", "--out", str(folder / "report.jsonl")]
    (folder / "earlier").write_text("earlier")
    leave(folder, 0)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"cannot write {folder}/report.jsonl: the disk is full ({folder} has 0.0 MB left" in said
    assert {path.name for path in folder.iterdir()} == {"earlier"}
    leave(folder, ROOMY)
    assert main(words) == 0


def test_a_disk_that_cannot_be_written(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    folder = disk("small")
    mount(folder, "-o", "remount,ro")
    assert main(["prompts", "suite=report", "--out", str(folder / "report.jsonl")]) == 2
    said = capsys.readouterr().err
    assert said == f"rcm prompts: error: {folder}/report.jsonl: Read-only file system\n"


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_whichever_library_was_writing(fault: Exception, tmp_path: Path) -> None:
    cause = OSError(errno.ENOSPC, "No space left on device") if isinstance(fault, RuntimeError) else None
    expected = errno.EDQUOT if "quota" in str(fault) else errno.ENOSPC
    for place in (atomic_file, atomic_folder):
        with pytest.raises(OSError) as told, place(tmp_path / "x"):
            raise fault from cause
        assert (told.value.errno, told.value.filename) == (expected, str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_other_faults_are_not_the_disk_s(tmp_path: Path) -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "input")
    for fault in (UserError("No space left on device"), missing, ValueError("x"), OSError("odd")):
        with pytest.raises(type(fault)) as told, atomic_file(tmp_path / "x"):
            raise fault
        assert told.value is fault
    write_text(tmp_path / "x", "x")
