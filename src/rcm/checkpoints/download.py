"""Checkpoints from elsewhere: a source in, verified files and a manifest out."""

import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rcm.artefact import (
    UserError,
    beside,
    content_sha256,
    is_foreign,
    read_json,
    reason,
    replace,
    sha256_file,
    sha256_json,
    write_json,
)
from rcm.checkpoints import transfer
from rcm.checkpoints.origins import Origin, find, is_folder, page_of, public, scheme_of
from rcm.checkpoints.safe import INDEX, read_index
from rcm.checkpoints.transfer import journal_of

_MANIFEST = ".download.json"
_PARTIAL = ".download"
_LOCK = ".lock"
_PACE = 20.0  # seconds
_SHA256 = re.compile("[0-9a-f]{8,64}")


def download(source: str, out: Path | str, sha256: str | None = None) -> None:
    """Bring `source` to `out`, verified, with a manifest `OUT.download.json`.

    Args:
        source: PATH, file://PATH, http(s)://..., s3://BUCKET/KEY or hf://OWNER/REPO[@REVISION]/PATH. A trailing slash
            means the whole folder, except over HTTP; so does a pattern on the Hub, such as hf://OWNER/REPO/*.json or
            hf://OWNER/REPO/[cm]*.
        out: the file to make, or the folder.
        sha256: 64 hexadecimal digits, or at least the first 8, of the file, or of the folder as
            `rcm.artefact.sha256_folder` has it. Where there are none, the hash in the Hub's record is compared;
            otherwise what came first is recorded in the manifest. That has all digits, for later calls with a few.

    Files come in parallel parts where the server has ranges. An interrupted transfer, also of a killed process, goes on
    where it stopped. Nothing unverified appears under `out`; what is there already, and right by the manifest or by
    `sha256`, is left, and what has changed since its download is a UserError. Of an HTTP address the query is neither
    said nor recorded, and only another query (a new signature) is no other source. Where another process is at it, this
    one waits. With HF_HUB_OFFLINE=1 (for the Hub) or
    RCM_OFFLINE=1 (for all but paths) nothing is fetched: a UserError says which files to put where, and these are
    accepted.
    """
    out, sha256 = Path(out), None if sha256 is None else sha256.lower()
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise UserError(f"{sha256!r} is not a SHA-256: expected 64 hexadecimal digits, or at least the first 8")
    address = public(source)
    sha256 = _whole(address, out, sha256)
    if not _lock(out).exists() and _is_there(address, out, sha256):
        return
    if _offline(address):
        _accept(address, out, sha256)
        return
    with _alone(out):
        if _is_there(address, out, sha256):  # by now
            return
        if sha256 is not None and out.exists() and _fits(sha256, content_sha256(out)):
            _record(address, out, None, _hashes(out, is_folder(address)))
            return
        origin = _found(source, out, sha256)
        files = (_already(origin, out) if sha256 is None else None) or _fetch(origin, address, out, sha256)
        _record(address, out, origin.revision, files)


def _fits(expected: str | None, found: str) -> bool:
    """Whether a SHA-256 is the expected one, of which the first digits may be known, or none."""
    return expected is None or found.startswith(expected)


def _whole(source: str, out: Path, sha256: str | None) -> str | None:
    """The SHA-256 of which only the first digits are given, where the first download noted all of them."""
    manifest = None if sha256 is None else _manifest(out)
    if manifest is None or manifest["source"] != source or not _fits(sha256, manifest["sha256"]):
        return sha256
    return manifest["sha256"]


def _is_there(source: str, out: Path, sha256: str | None) -> bool:
    """Whether this was downloaded before; a UserError if it has changed since."""
    manifest = _manifest(out)
    known = manifest is not None and manifest["source"] == source and _fits(sha256, manifest["sha256"])
    return out.exists() and known and verify(out) is not None


def _lock(out: Path) -> Path:
    return out.with_name(f".{out.name}{_PARTIAL}{_LOCK}")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lock what is downloaded to `out`, until it is there and recorded; wait for a process that has locked it."""
    lock = _lock(out)
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{out} is being downloaded by another process; waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
            if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                continue  # who had it has removed it
            try:
                yield
                journal_of(_staging(out)).unlink(missing_ok=True)
            finally:
                lock.unlink(missing_ok=True)
            return


def verify(path: Path | str, whole: bool = True) -> str | None:
    """SHA-256 of a file or folder (`content_sha256`), which is compared with the manifest of its download.

    Without `whole`, None for what has no manifest, unread. What has changed since its download is a UserError.
    """
    path = Path(path)
    manifest = _manifest(path)
    if manifest is None:
        return content_sha256(path) if whole else None
    for name, known in manifest["files"].items():
        file = path / name if name else path
        if not file.is_file() or file.stat().st_size != known["size"] or sha256_file(file) != known["sha256"]:
            what = "has changed since" if file.is_file() else "is missing since"
            records = (beside(path, suffix) for suffix in (_MANIFEST, ".prov.json"))
            raise UserError(
                f"{file} {what} it was downloaded from {manifest['source']}: remove {path} to fetch it again, or "
                f"{' and '.join(str(record) for record in records if record.exists())} to keep it as it is"
            )
    return manifest["sha256"]


Files = dict[str, dict[str, Any]]  # size and SHA-256 by path in a folder, or of the one file under ""


# --- Manifests -------------------------------------------------------------------------------------------------------


def _manifest(out: Path) -> dict[str, Any] | None:
    path = beside(out, _MANIFEST)
    if not path.exists():
        return None
    manifest = read_json(path)
    try:
        known = {name: {"size": int(f["size"]), "sha256": f["sha256"]} for name, f in manifest["files"].items()}
        for value in (manifest["source"], manifest["sha256"], *(f["sha256"] for f in known.values())):
            if not isinstance(value, str):
                raise TypeError(f"{value!r} is no text")
        return {"source": manifest["source"], "sha256": manifest["sha256"], "files": known}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: remove it to download {out.name} again") from error


def _hashes(out: Path, folder: bool) -> Files:
    files = {file.relative_to(out).as_posix(): file for file in sorted(out.rglob("*")) if file.is_file()}
    return {name: _hashed(file) for name, file in (files if folder else {"": out}).items()}


def _hashed(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": sha256_file(file)}


def _identity(files: Files) -> str:
    """What `content_sha256` says of a file or folder with these."""
    if "" in files:
        return files[""]["sha256"]
    return sha256_json([[name, known["sha256"]] for name, known in sorted(files.items()) if not is_foreign(name)])


def _record(source: str, out: Path, revision: str | None, files: Files) -> None:
    write_json(
        beside(out, _MANIFEST),
        {"source": source, "revision": revision, "sha256": _identity(files), "files": files},
    )


# --- Without a network -----------------------------------------------------------------------------------------------


def _offline(source: str) -> bool:
    def on(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("1", "on", "yes", "true")

    scheme = scheme_of(source)
    return scheme not in ("", "file") and (on("RCM_OFFLINE") or (scheme == "hf" and on("HF_HUB_OFFLINE")))


def _accept(source: str, out: Path, sha256: str | None) -> None:
    """Take what was put at `out` by hand."""
    there = out.is_dir() and any(out.iterdir()) if is_folder(source) else out.is_file()
    if not there:
        raise UserError(
            f"downloads are switched off (RCM_OFFLINE, HF_HUB_OFFLINE): {_wanted(source, out, sha256, _manifest(out))}"
        )
    if is_folder(source):
        for index in sorted(out.rglob(f"*{INDEX}")):
            try:
                read_index(index)
            except UserError as error:
                raise UserError(f"{error}; downloads are switched off: {_wanted(source, out, sha256)}") from error
    files = _hashes(out, is_folder(source))
    if not _fits(sha256, _identity(files)):
        raise UserError(f"{out} has SHA-256 {_identity(files)}, expected {sha256}; put {source} there")
    _record(source, out, None, files)


def _wanted(source: str, out: Path, sha256: str | None, manifest: dict[str, Any] | None = None) -> str:
    """Which files to put where."""
    if manifest is not None and manifest["source"] == source:
        files = {out / name if name else out: known for name, known in manifest["files"].items()}
        listed = (f"{path} ({known['size']} bytes, SHA-256 {known['sha256']})" for path, known in files.items())
        return f"put the files of {source} there: {', '.join(listed)}"
    known = f" with SHA-256 {sha256}{'...' if len(sha256) < 64 else ''}" if sha256 else ""
    if is_folder(source):
        page = f", which {page_of(source)} lists," if scheme_of(source) == "hf" else ""
        return f"put the files of {source}{known}{page} into the folder {out} and run again"
    return f"put the file {source}{known} at {out} and run again"


# --- With one --------------------------------------------------------------------------------------------------------


def _found(source: str, out: Path, sha256: str | None) -> Origin:
    """What is at the source, with a few tries."""
    for attempt in range(transfer.TRIES_TO_FIND):
        try:
            return find(source)
        except transfer.PASSING as error:
            if attempt == transfer.TRIES_TO_FIND - 1:
                address = public(source)
                raise UserError(
                    f"cannot reach {address} ({reason(error)}); without a network, {_wanted(address, out, sha256)}"
                ) from error
            time.sleep(transfer.DELAY * 2**attempt)
    raise AssertionError


def _already(origin: Origin, out: Path) -> Files | None:
    """The files at `out`, where they are what the origin says it has, by the hashes that it names."""
    places = {name: out / name if name else out for name in origin.files}
    for name, remote in origin.files.items():
        if not remote.sha256 and not remote.blob:
            return None
        if not places[name].is_file() or places[name].stat().st_size != remote.size:
            return None
    files = {name: _hashed(file) for name, file in places.items()}
    faults = (_fault(remote, remote.sha256, places[name], files[name]) for name, remote in origin.files.items())
    return None if any(faults) else files


def _fault(remote: transfer.Remote, sha256: str | None, file: Path, found: Mapping[str, Any]) -> str | None:
    """What is wrong with the content of a file."""
    if not _fits(sha256, found["sha256"]):
        return f"has SHA-256 {found['sha256']}, expected {sha256}"
    if remote.blob is not None and remote.blob != (actual := _blob(file)):
        return f"is {actual} to git, expected {remote.blob}"
    return None


def _blob(file: Path) -> str:
    """What git calls a file, which is small."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _fetch(origin: Origin, source: str, out: Path, sha256: str | None) -> Files:
    """Fetch all files beside `out`, verify them, and rename."""
    if folder := is_folder(source):
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise UserError(
                f"{out} is there already and is not what {source} holds: remove it, or choose another place"
            )
    elif out.is_dir():
        raise UserError(f"{out} is a folder, but {source} is one file: remove it, or choose another name")
    staging = _staging(out)
    places = {name: staging / name if folder else staging for name in origin.files}
    total = sum(remote.size or 0 for remote in origin.files.values()) or None
    _check_space(source, out, (total or 0) - sum(_on_disk(place) for place in places.values()))
    pace = {} if sys.stderr.isatty() else {"delay": _PACE, "mininterval": _PACE}  # a line now and then in a log file
    with tqdm(total=total, unit="B", unit_scale=True, desc=out.name, **pace) as bar:
        fetch = _Fetch(bar, _wanted(source, out, sha256))
        files = {
            name: fetch(remote, places[name], remote.sha256 if folder else _expected(sha256, remote.sha256))
            for name, remote in origin.files.items()
        }
    if folder and not _fits(sha256, actual := _identity(files)):
        raise UserError(f"{source} has SHA-256 {actual}, expected {sha256}: it is not the folder that was meant")
    if folder:
        for partial in places.values():
            journal_of(partial).unlink()
        if out.is_dir():
            out.rmdir()
    beside(out, _MANIFEST).unlink(missing_ok=True)  # of what was there before
    replace(staging, out)
    return files


def _staging(out: Path) -> Path:
    """Where a download lies until it is verified."""
    return out.with_name(f".{out.name}{_PARTIAL}")


def _expected(sha256: str | None, recorded: str | None) -> str | None:
    """What a file is compared with: the caller's hash, or the Hub's where that is the same and longer."""
    return recorded if recorded is not None and _fits(sha256, recorded) else sha256


def _on_disk(partial: Path) -> int:
    """Bytes that an unfinished file takes, which has holes."""
    return min(partial.stat().st_size, partial.stat().st_blocks * 512) if partial.exists() else 0


def _check_space(source: str, out: Path, needed: int) -> None:
    if needed > (free := shutil.disk_usage(out.parent).free):
        raise UserError(
            f"{source} needs {needed / 1e9:.2f} GB more at {out.parent}, where there are {free / 1e9:.2f} GB; make "
            "room or choose another place"
        )


@dataclass(frozen=True)
class _Fetch:
    """Fetch a file and verify it; once more from the beginning where it was resumed and turns out wrong."""

    bar: tqdm
    wanted: str  # what to do without a network

    def __call__(self, remote: transfer.Remote, partial: Path, sha256: str | None) -> dict[str, Any]:
        before = self.bar.n
        try:
            resumed = transfer.transfer(remote, partial, self.bar.update)
        except transfer.PASSING as error:
            if transfer.lasting(error):
                raise
            raise UserError(
                f"cannot fetch {remote.address} ({reason(error)}); what has arrived is kept, run again to go on; "
                f"without a network, {self.wanted}"
            ) from error
        found = _hashed(partial)
        if (fault := _fault(remote, sha256, partial, found)) is None:
            return found
        partial.unlink()
        journal_of(partial).unlink()
        if resumed:
            self.bar.update(before - self.bar.n)
            return self(remote, partial, sha256)
        raise UserError(f"{remote.address} {fault}: it is damaged, or not the file that was meant")
