"""A shard goes on behind what a killed run has written, and ends as if nothing had happened."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from rcm.artefact import UserError, read_json
from rcm.data.shards import Sample, read_shards, write_shard
from rcm.data.unfinished import unfinished

TOTAL, BATCH = 7, 2
MANIFEST = {"part": "1-of-1", "teacher_sha256": "t"}
IDENTITY = {**MANIFEST, "batch": BATCH}


def sample(index: int) -> Sample:
    generator = torch.Generator().manual_seed(index)
    latents = torch.randn(3, 1, 20, 20, generator=generator)  # 4800 bytes: samples end within blocks of the file
    return Sample(index, f"number {index}", 5, latents, torch.randn(1 + index % 2, 4, generator=generator))


def draw(path: Path, identity: dict = IDENTITY, said: list[str] | None = None, fail_at: int | None = None) -> list[int]:
    """Draw what `path` lacks in batches; returns the indices that were drawn."""
    drawn: list[int] = []
    with unfinished(path, identity, (said if said is not None else []).append) as shard:
        for first in range(shard.count, TOTAL, BATCH):
            batch = range(first, min(first + BATCH, TOTAL))
            if fail_at in batch:
                raise KeyboardInterrupt
            drawn += batch
            shard.append(map(sample, batch))
        shard.finish(MANIFEST)
    return drawn


@pytest.fixture
def whole(tmp_path: Path) -> tuple[bytes, bytes]:
    """Tar and manifest, written at once."""
    path = tmp_path / "at once" / "x.tar"
    write_shard(path, map(sample, range(TOTAL)), MANIFEST)
    return path.read_bytes(), Path(f"{path}.json").read_bytes()


def content(path: Path) -> tuple[bytes, bytes]:
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.json"}
    return path.read_bytes(), Path(f"{path}.json").read_bytes()


def test_it_equals_what_is_written_at_once(tmp_path: Path, whole: tuple[bytes, bytes]) -> None:
    path = tmp_path / "new" / "x.tar"
    assert draw(path) == list(range(TOTAL))
    assert content(path) == whole
    assert len(read_shards([path])) == TOTAL


@pytest.mark.parametrize("fail_at", [0, 2, 5, 6])
def test_an_interrupted_run_goes_on(tmp_path: Path, whole: tuple[bytes, bytes], fail_at: int) -> None:
    path, said = tmp_path / "new" / "x.tar", []
    with pytest.raises(KeyboardInterrupt):
        draw(path, fail_at=fail_at)
    assert not path.exists()
    border = fail_at // BATCH * BATCH
    assert draw(path, said=said) == list(range(border, TOTAL))
    assert content(path) == whole
    assert len(said) == (border > 0) and all(f"behind its first {border} samples" in line for line in said)


def die_at(path: Path, moment: str, call: int) -> None:
    """Draw in this process until the `call`-th time that something happens, which is never done."""
    import tarfile

    import rcm.data.unfinished as module

    def deadly(function):
        calls = 0

        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == call:
                if moment == "write":  # half of a sample's latents reach the file
                    (tar, member, file) = arguments
                    tar.fileobj.write(member.tobuf(tar.format) + file.read(member.size // 2))
                    tar.fileobj.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    if moment == "write":
        tarfile.TarFile.addfile = deadly(tarfile.TarFile.addfile)  # type: ignore[method-assign]
    elif moment == "fsync":
        os.fsync = deadly(os.fsync)
    elif moment == "replace":
        plain, dying = Path.replace, deadly(Path.replace)
        Path.replace = lambda self, to: (dying if self.name == ".x.tar.unfinished" else plain)(self, to)  # type: ignore
    else:
        setattr(module, moment, deadly(getattr(module, moment)))
    draw(path)


@pytest.mark.parametrize(
    ("moment", "call", "kept"),
    [
        ("write", 2, 0),  # in the first sample
        ("write", 11, 2),  # in the fourth sample, the second of its batch
        ("write", 21, 6),  # in the last one
        ("fsync", 1, 0),
        ("write_json", 1, 0),
        ("write_json", 3, 2),  # behind the second batch, before the journal knows of it
        ("write_manifest", 1, 7),
        ("replace", 1, 7),
    ],
)
def test_a_killed_run_goes_on(tmp_path: Path, whole: tuple[bytes, bytes], moment: str, call: int, kept: int) -> None:
    path = tmp_path / "new" / "x.tar"
    if not (child := os.fork()):
        try:
            die_at(path, moment, call)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not path.exists()
    assert draw(path) == list(range(kept, TOTAL))
    assert content(path) == whole


def test_another_origin_begins_anew(tmp_path: Path, whole: tuple[bytes, bytes]) -> None:
    path, said = tmp_path / "new" / "x.tar", []
    with pytest.raises(KeyboardInterrupt):
        draw(path, IDENTITY | {"teacher_sha256": "another"}, fail_at=5)
    assert draw(path, said=said) == list(range(TOTAL))
    assert len(said) == 1 and "another teacher_sha256" in said[0]
    assert content(path) == whole


def test_damage_begins_anew(tmp_path: Path, whole: tuple[bytes, bytes]) -> None:
    path = tmp_path / "new" / "x.tar"
    partial, journal = path.with_name(".x.tar.unfinished"), path.with_name(".x.tar.unfinished.json")

    def flip(content: bytes, place: int) -> bytes:
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    def less(content: dict) -> dict:
        return content | {"samples": content["samples"][:2]}

    damages = [
        lambda: partial.write_bytes(flip(partial.read_bytes(), 3000)),
        lambda: partial.write_bytes(partial.read_bytes()[:9000]),
        lambda: partial.write_bytes(b""),
        lambda: journal.write_text("{"),
        lambda: journal.write_text("[]"),
        lambda: journal.write_text(json.dumps(less(read_json(journal)))),
        journal.unlink,
    ]
    for damage in damages:
        with pytest.raises(KeyboardInterrupt):
            draw(path, fail_at=5)
        damage()
        assert draw(path) == list(range(TOTAL))
        assert content(path) == whole
        path.unlink()


def test_two_processes_do_not_write_one_shard(tmp_path: Path) -> None:
    with unfinished(tmp_path / "x.tar", IDENTITY) as shard:
        shard.append([sample(0)])
        with pytest.raises(UserError, match="being written by another process"), unfinished(tmp_path / "x.tar", {}):
            pass
        assert shard.count == 1
    (tmp_path / "y.tar").mkdir()
    with pytest.raises(UserError, match="is a folder"), unfinished(tmp_path / "y.tar", {}):
        pass
