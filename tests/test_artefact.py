"""Writes are whole or not at all; identity follows content; provenance is stable and tells no machine's secrets."""

import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import flash_jvp
from rcm.artefact import (
    UserError,
    atomic_file,
    atomic_folder,
    beside,
    code_digest,
    content_sha256,
    read_json,
    recording,
    remove_leftovers,
    sha256_file,
    sha256_folder,
    sha256_json,
    stated_sha256,
    verified_sha256,
    write_json,
    write_text,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- Writing


def test_file_appears_at_the_end_and_alone(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "x.bin"
    with atomic_file(final) as temporary:
        temporary.write_bytes(b"new")
        assert not final.exists()
        assert temporary.name == final.name  # what depends on the name does not depend on the temporary place
        assert temporary.is_relative_to(final.parent)  # one file system, so the rename is atomic
    assert final.read_bytes() == b"new"
    assert names(final.parent) == {"x.bin"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failed_write_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    final = tmp_path / "x"
    write_text(final, "old")
    with pytest.raises(error), atomic_file(final) as temporary:
        temporary.write_text("half")
        raise error
    assert final.read_text() == "old"
    assert names(tmp_path) == {"x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_write_keeps_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    final = tmp_path / "folder"
    with atomic_folder(final) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(error), atomic_folder(final) as temporary:
        (temporary / "b").write_text("half")
        raise error
    assert names(final) == {"a"}
    assert names(tmp_path) == {"folder"}


def test_folder_is_replaced_not_merged(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    for name in ("a", "b", "b"):
        with atomic_folder(final) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
    assert names(final / "sub") == {"b"}
    assert names(tmp_path) == {"folder"}


def test_file_and_folder_do_not_replace_each_other(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a folder"), atomic_file(tmp_path / "folder"):
        pass
    with pytest.raises(UserError, match="is a file"), atomic_folder(tmp_path / "file"):
        pass


KILLED = """
import signal, sys, time
from rcm.artefact import atomic_file, atomic_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a shell ignores
with atomic_file(sys.argv[1]) as file, atomic_folder(sys.argv[2]) as folder:
    file.write_text("half"); (folder / "a").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_writer_leaves_nothing_final_and_is_cleaned_up_after(tmp_path: Path, number: signal.Signals) -> None:
    file, folder = tmp_path / "x[1]", tmp_path / "folder"  # brackets mean something to glob
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(file), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
    assert not file.exists()
    assert not folder.exists()
    assert len(names(tmp_path)) == (2 if number == signal.SIGKILL else 0)
    write_text(file, "whole")
    with atomic_folder(folder):
        pass
    assert names(tmp_path) == {"x[1]", "folder"}


def killed_between_renames(final: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, killed_before: int) -> bool:
    """Replace a folder in a process that dies before a rename; whether there were so many."""
    if (child := os.fork()) == 0:
        plain, count = Path.replace, iter(range(1, 9))

        def rename(self: Path, target: Path) -> Path:
            if next(count) == killed_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, target)

        monkeypatch.setattr(Path, "replace", rename)
        if not exchange:  # NFS, Lustre
            monkeypatch.setattr("rcm.artefact._exchange", lambda one, other: False)
        with atomic_folder(final) as temporary:
            (temporary / "new").write_text("new")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("exchange", "before", "left", "kept"),
    [(False, 1, "old", "old"), (False, 2, None, "new"), (False, 3, "new", "new"), (True, 1, "new", "new")],
)
def test_a_folder_is_there_before_or_after(
    exchange: bool, before: int, left: str | None, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first rename, between both, and not at all; the next writer puts back what was meant."""
    final = tmp_path / "folder"
    with atomic_folder(final) as temporary:
        (temporary / "old").write_text("old")
    killed = killed_between_renames(final, monkeypatch, exchange, before)
    assert killed == (not exchange and before < 3)
    assert (names(final) if final.exists() else None) == ({left} if left else None)
    remove_leftovers(final)
    assert names(final) == {kept} and names(tmp_path) == {"folder"}


def test_the_lock_of_a_writer_is_on_a_file_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS has it, where locks are of byte ranges."""
    plain, locked = fcntl.flock, list[int]()

    def flock(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
        locked.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        plain(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_file(tmp_path / "x") as slow:
        slow.write_text("slow")
        remove_leftovers(tmp_path / "x")
    assert locked == [os.O_RDWR] * 2
    assert names(tmp_path) == {"x"}


def test_without_locks_nobody_s_staging_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_file(tmp_path / "x") as slow:
        slow.write_text("slow")
        remove_leftovers(tmp_path / "x")
        assert slow.exists()
    assert names(tmp_path) == {"x"}


def test_a_writer_whose_staging_was_taken_for_a_leftover_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, made = tempfile.mkdtemp, list[str]()

    def mkdtemp(**options: Any) -> str:
        made.append(plain(**options))
        if len(made) == 1:
            remove_leftovers(tmp_path / "x")  # by another process, before it is locked
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    write_text(tmp_path / "x", "x")
    assert len(made) == 2 and names(tmp_path) == {"x"}


def test_living_writer_is_not_cleaned_up(tmp_path: Path) -> None:
    final = tmp_path / "x"
    with atomic_file(final) as slow:
        slow.write_text("slow")
        write_text(final, "fast")
        assert slow.exists()
    assert final.read_text() == "slow"


def test_json_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"a": [1, 2.5, None], "é": "line\nbreak"}
    write_json(path, value)
    assert read_json(path) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    assert read_json(path) == value
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_json(path)
    with pytest.raises(UserError, match="No such file"):
        read_json(tmp_path / "absent.json")


# --- Identity


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert sha256_json({"b": 1, "a": 2}) == hashlib.sha256(b'{"a": 2, "b": 1}').hexdigest()


def test_folder_hash_follows_names_and_bytes_only(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, order in ((one, ("a", "b")), (two, ("b", "a"))):
        (folder / "sub").mkdir(parents=True)
        for name in order:
            (folder / "sub" / name).write_text(name)
    os.utime(two / "sub" / "a", (1, 1))
    assert sha256_folder(one) == sha256_folder(two) == content_sha256(one)
    (two / "sub" / "a").rename(two / "a")
    assert sha256_folder(one) != sha256_folder(two)
    (two / "a").rename(two / "sub" / "a")
    assert sha256_folder(one) == sha256_folder(two)
    for foreign in (".DS_Store", "sub/Thumbs.db", ".ipynb_checkpoints/x.ipynb", "sub/.nfs00000001", "._a"):
        (two / foreign).parent.mkdir(exist_ok=True)
        (two / foreign).write_text("a viewer")
    assert sha256_folder(one) == sha256_folder(two)
    (two / ".hidden").write_text("A")
    assert sha256_folder(one) != sha256_folder(two)
    (two / ".hidden").unlink()
    (two / "sub" / "a").write_text("A")
    assert sha256_folder(one) != sha256_folder(two)


def test_manifest_names_the_content(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"content_sha256": "abc"})
    assert content_sha256(tmp_path) == "abc"
    write_json(tmp_path / "manifest.json", {"other": 1})
    assert content_sha256(tmp_path) == sha256_folder(tmp_path)


@pytest.mark.parametrize("suffix", [".download.json", ".prov.json"])
def test_a_hash_that_was_stated_since_is_taken(tmp_path: Path, suffix: str) -> None:
    weights, record = tmp_path / "x.safetensors", beside(tmp_path / "x.safetensors", suffix)
    weights.write_text("x")
    assert stated_sha256(weights) == sha256_file(weights)
    write_json(record, {"artefact": "x", "sha256": "abc", "stage": "s", "code_sha256": "c"})
    assert stated_sha256(weights) == "abc"
    (tmp_path / "other").write_text("y")
    os.utime(tmp_path / "other", (1, 1))
    (tmp_path / "other").rename(weights)  # its content is older than the record
    if suffix == ".download.json":  # which those compare who read it
        assert stated_sha256(weights) == sha256_file(weights)
    else:
        with pytest.raises(UserError, match="damaged or was replaced"):
            stated_sha256(weights)


def test_code_digest_follows_sources_only(tmp_path: Path) -> None:
    digests: list[str] = []
    for text in ("x = 1", "x = 1", "x = 2"):
        root = tmp_path / str(len(digests)) / "package"  # where it lies does not matter
        (root / "__pycache__").mkdir(parents=True)
        (root / "__pycache__" / "a.pyc").write_text(str(len(digests)))
        (root / "a.py").write_text(text)
        digests.append(code_digest(root))
    assert digests[0] == digests[1] != digests[2]
    assert len(code_digest()) == 64


# --- Provenance


def run_stage(folder: Path, **settings: Any) -> tuple[str, str]:
    """A stage that copies a file, in a folder of its own as working directory."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "in.txt").write_text("content")
    os.chdir(folder)
    out = folder / "data" / "out.txt"
    chosen: dict[str, Any] = {"config": {"b": 1, "a": 2}, "seed": 3} | settings
    with recording(out, stage="copy", inputs=["data/in.txt"], **chosen) as facts:
        write_text(out, "content")
        facts["steps"] = 7
    return beside(out, ".prov.json").read_text(), beside(out, ".run.json").read_text()


def test_provenance_is_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # and back at the end
    stable, run = run_stage(tmp_path / "here")
    assert run_stage(tmp_path / "elsewhere")[0] == stable
    abc = hashlib.sha256(b"content").hexdigest()
    provenance = json.loads(stable)
    assert provenance["artefact"] == "data/out.txt"
    assert provenance["sha256"] == abc
    assert provenance["inputs"] == [{"path": "data/in.txt", "sha256": abc}]
    assert provenance["config"] == {"a": 2, "b": 1}
    assert provenance["seed"] == 3
    assert provenance["code_sha256"] == code_digest()
    assert str(tmp_path) not in stable + run
    facts = json.loads(run)
    assert facts["facts"] == {"steps": 7}
    assert facts["wall_seconds"] >= 0
    assert 5 < facts["peak_mib"] < 10_000
    assert facts["versions"]["numpy"]


def test_provenance_follows_configuration_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = json.loads(run_stage(tmp_path / "1")[0])
    same = json.loads(run_stage(tmp_path / "2", config={"a": 2, "b": 1})[0])
    other = json.loads(run_stage(tmp_path / "3", config={"a": 2, "b": 5}, seed=4)[0])
    assert first["config_sha256"] == same["config_sha256"] != other["config_sha256"]
    assert other["seed"] == 4


def test_path_outside_of_the_working_directory_is_a_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    with recording(tmp_path / "x.txt", stage="write"):
        write_text(tmp_path / "x.txt", "")
    assert read_json(tmp_path / "x.txt.prov.json")["artefact"] == "x.txt"


@pytest.mark.parametrize(
    ("place", "refused"),
    [
        ("results/tiny/images/scores/a.json", False),
        ("results/tiny-seed0/images/scores/a.json", False),  # its folder was renamed
        ("results/tiny/videos/scores/a.json", True),
        ("results/tiny/images/scores/b.json", True),
        ("results/b.json", True),
        ("elsewhere/b.json", False),
    ],
)
def test_an_artefact_below_the_same_folder_keeps_its_name(
    place: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Path("results/tiny/images/scores/a.json" if place != "results/b.json" else "results/a.json")
    with recording(made, stage="evaluate"):
        write_text(made, "1")
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", ".prov.json"):
        beside(made, suffix).rename(beside(place, suffix))
    if refused:
        with pytest.raises(UserError, match=f"{re.escape(place)} was replaced"):
            verified_sha256(place)
    else:
        assert verified_sha256(place) == sha256_file(place)


def test_failed_stage_leaves_no_provenance(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), recording(tmp_path / "x", stage="fail"):
        write_text(tmp_path / "x", "made before the failure")
        raise RuntimeError
    assert names(tmp_path) == {"x"}


def test_missing_input_is_told_before_the_work(tmp_path: Path) -> None:
    started = False
    with pytest.raises(UserError, match=r"absent\.tar"), recording("x", stage="s", inputs=[tmp_path / "absent.tar"]):
        started = True
    assert not started


def test_run_json_says_which_attention_kernels_ran(tmp_path: Path) -> None:
    q = torch.randn(1, 1, 4, 16)
    with recording(tmp_path / "out", stage="test"):
        flash_jvp.attention_jvp(q, q, q, q, backend="math")
        (tmp_path / "out").write_text("x")
    taken = json.loads((tmp_path / "out.run.json").read_text())["host"]["attention"]
    assert "math" in taken["attention_jvp"]
