"""A shard on its way: the next run goes on behind the samples that a killed one has written.

Beside `X.tar` stand, hidden, `.X.tar.unfinished`, its beginning, and `.X.tar.unfinished.json`, the journal: what the
samples follow from, their lines of the manifest, and the byte up to which they reach. The journal follows the samples,
so that whatever a death tears lies behind that byte, and is cut off.
"""

import fcntl
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rcm.artefact import UserError, beside, read_json, remove_leftovers, replace, sha256_file, write_json, writing
from rcm.data.samples import Sample, naming, read_sample, sample_sha256, write_sample
from rcm.data.shards import write_manifest


class Unfinished:
    """The samples of a shard that are written so far; `count` of them."""

    def __init__(self, path: Path, file: BinaryIO, journal: dict[str, Any]) -> None:
        self._path, self._file, self._journal = path, file, journal
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  closed at the end

    @property
    def count(self) -> int:
        return len(self._journal["samples"])

    def append(self, samples: Iterable[Sample]) -> None:
        """Write samples, which a later run will find all together or not at all."""
        self._journal["samples"] += [write_sample(self._tar, sample) for sample in samples]
        self._sync()
        self._journal["bytes"] = self._file.tell()
        write_json(_journal_path(self._path), self._journal)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Make it what `rcm.data.shards.write_shard` would have written at once."""
        self._tar.close()
        self._sync()
        partial = _partial_path(self._path)
        write_manifest(self._path, manifest, self._journal["samples"], sha256_file(partial))
        replace(partial, self._path)
        _journal_path(self._path).unlink()


@contextmanager
def unfinished(
    path: Path, identity: Mapping[str, Any], say: Callable[[str], None] = lambda text: None
) -> Iterator[Unfinished]:
    """What an earlier run has written of the shard `path`, or an empty one.

    Args:
        identity: all that the samples follow from (JSON types); what was written under another one is removed.
        say: told in one sentence that there was something, and what becomes of it.

    Raises UserError where another process is writing it.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, but a shard is to be written there; remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    if _partial_path(path).is_symlink():  # no run makes one; what it points to is not ours to write
        _partial_path(path).unlink()
    with writing(path), _partial_path(path).open("a+b") as file:
        _lock(file, path)
        remove_leftovers(_journal_path(path))
        journal = _resumed(path, file, identity, say)
        if journal is None:
            journal = {"of": dict(identity), "bytes": 0, "samples": []}
            file.truncate(0)  # before the journal speaks of it
            write_json(_journal_path(path), journal)
        file.truncate(journal["bytes"])
        file.seek(0, os.SEEK_END)
        yield Unfinished(path, file, journal)


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _journal_path(path: Path) -> Path:
    return beside(_partial_path(path), ".json")


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is being written by another process; wait for it, or end it") from None
    except OSError:  # a file system without locks
        pass


def _resumed(
    path: Path, file: BinaryIO, identity: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The journal of an earlier run whose samples can be kept."""
    if not _journal_path(path).exists() or not file.seek(0, os.SEEK_END):
        return None
    try:
        journal = read_json(_journal_path(path))
        if differing := [key for key, value in identity.items() if journal["of"].get(key) != value]:
            say(f"an earlier run has begun {path} with another {differing[0]}; it is begun anew")
            return None
        with naming(f"the beginning of {path}"):
            _check(file, journal)
    except (UserError, KeyError, TypeError, AttributeError) as error:
        say(f"what an earlier run has written of {path} is damaged, so it is begun anew ({error})")
        return None
    say(f"going on with {path} behind its first {len(journal['samples'])} samples, which an earlier run has written")
    return journal


def _check(file: BinaryIO, journal: Mapping[str, Any]) -> None:
    """Raise what `naming` knows where a file does not begin with the samples of its journal."""
    file.seek(0)
    end = 0
    if journal["samples"]:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for line in journal["samples"]:
                sample = read_sample(tar)
                if (sample.index, sample_sha256(sample)) != (line["index"], line["sha256"]):
                    raise ValueError(f"sample {line['index']} is not the one that was written")
            end = tar.offset
    if end != journal["bytes"]:
        raise ValueError(f"{end} bytes of samples, where the journal has {journal['bytes']}")
