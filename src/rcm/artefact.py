"""Artefacts: files and folders, written as a whole or not at all, known by their content, with their provenance.

A writer works in a temporary folder beside the final name and renames. Whoever dies on the way (an exception, Ctrl-C,
kill -9) leaves nothing under the final name; the next writer of that name removes what a killed process left behind.
"""

import ctypes
import errno
import fcntl
import functools
import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rcm import usage

METRICS = "metrics.jsonl"  # rows of a training: what each took, its `wall`, is no part of their identity
MANIFEST = "manifest.json"  # a folder that holds one names its own content there, under "content_sha256"
_PARTIAL = ".partial"
_FOREIGN = re.compile(
    r"(^|/)(\.snakemake_timestamp$|\.DS_Store$|\._|Thumbs\.db$|desktop\.ini$|\.nfs[0-9a-f]+$|\.ipynb_checkpoints/)"
)
_NAMED = ("artefact", "sha256", "stage", "code_sha256")  # texts that a record of provenance must have
_RECORD_BYTES = 64 * 2**20  # more than any record has


class UserError(Exception):
    """A mistake of the user, in one sentence: what was wrong, what was expected, what to do. No traceback is shown."""


def reason(error: BaseException) -> str:
    """First line of an exception's message, or its name, for use inside a UserError."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- Writing -------------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Have what was written to a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have a fault of the disk be an OSError that names `path`, whichever library was writing."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (number := _disk_fault(error, path)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _disk_fault(error: BaseException | None, path: Path) -> int | None:
    """The number of a fault of the disk, also where a library tells of it in words, or it was the cause; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            named = (name for name in (error.filename, error.filename2) if name is not None)
            staged = any(f".{path.name}." in os.fsdecode(name) for name in named)
            if staged or (error.filename is None and error.errno in _DISK):
                return error.errno
        elif numbers := [number for number in _DISK if os.strerror(number) in str(error)]:
            return numbers[0]
        error = error.__cause__ or error.__context__
    return None


def replace(temporary: Path, final: Path) -> None:
    """Give what is finished its final name; what is recorded of an older one of that name is removed before.

    A folder and an older one change places at once where system and file system can; elsewhere the older one is moved
    aside first. Who dies between these two renames leaves both in the staging folder: `remove_leftovers` ends the work.
    """
    for suffix in (".prov.json", ".run.json"):
        beside(final, suffix).unlink(missing_ok=True)
    if final.is_dir() and not _exchange(temporary, final):
        final.replace(temporary.with_name(_aside(final)))
    if not final.is_dir():
        temporary.replace(final)
    sync(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places at once (Linux; not on NFS); whether that was done."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return exchange is not None and exchange(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _aside(final: Path) -> str:
    """Name in a staging folder of what `final` was before."""
    return f".{final.name}.replaced"


def remove_leftovers(final: Path) -> None:
    """Delete staging folders of `final` whose writer is dead: a living writer holds a lock in its own."""
    for folder in final.parent.glob(f".{glob.escape(final.name)}.*{_PARTIAL}"):
        try:
            with _locked(folder) as held:
                if not held:
                    continue
                if (folder / _aside(final)).exists() and not final.exists():  # it died between the two renames
                    (folder / final.name).replace(final)
        except OSError:  # locked, or gone by now
            continue
        shutil.rmtree(folder, ignore_errors=True)  # with the lock closed: on NFS an open file stays


@contextmanager
def _locked(staging: Path) -> Iterator[bool]:
    """Hold the lock of a staging folder; False on a file system without locks, OSError where another holds it.

    It is on a file that is open for writing: NFS knows no other between machines.
    """
    if staging.is_symlink():  # no writer makes one
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(staging))
    path = staging / ".lock"
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "rb+") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            held = False
        path.stat()  # FileNotFoundError where who held it has removed it
        yield held


@contextmanager
def _staging(final: Path) -> Iterator[Path]:
    """A locked folder `.NAME.xxxxxxxx.partial` beside `final` (so on the same file system), removed afterwards."""
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final)
    with writing(final), ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=_PARTIAL, dir=final.parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            with suppress(BlockingIOError, FileNotFoundError):  # who took it for a leftover, before it was locked
                stack.enter_context(_locked(folder))
                break
        yield folder


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path of the same name; when the block succeeds, what it wrote there replaces `path` at once."""
    final = Path(path)
    if final.is_dir():
        raise UserError(f"{final} is a folder, but a file is to be written there; remove it or choose another name")
    with _staging(final) as folder:
        temporary = folder / final.name
        yield temporary
        sync(temporary)
        replace(temporary, final)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder of the same name; when the block succeeds it takes the place of `path`."""
    final = Path(path)
    if final.exists() and not final.is_dir():
        raise UserError(f"{final} is a file, but a folder is to be written there; remove it or choose another name")
    with _staging(final) as folder:
        temporary = folder / final.name
        temporary.mkdir()
        yield temporary
        for root, _, names in os.walk(temporary):
            for name in names:
                sync(Path(root, name))
            sync(Path(root))
        replace(temporary, final)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` (UTF-8, newlines as they are) to `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON; refuses NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def json_value(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for any other, NaN and infinities among them."""
    try:
        return json.loads(text, parse_constant=_refused)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def read_json(path: Path | str) -> Any:
    """Read JSON; a missing or damaged file is a UserError that names it."""
    try:
        return json_value(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON (damaged or truncated?): {error}") from error


# --- Identity ------------------------------------------------------------------------------------------------------


def sha256_json(value: Any) -> str:
    """SHA-256 of a value of JSON types; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: Path | str) -> str:
    """SHA-256 over the relative names and bytes of all files in a folder; times and permissions do not matter.

    Nor do files that others put there (`is_foreign`).
    """
    root = Path(path)
    files = sorted((file.relative_to(root).as_posix(), file) for file in root.rglob("*") if file.is_file())
    return sha256_json([[name, sha256_file(file)] for name, file in files if not is_foreign(name)])


def is_foreign(name: str) -> bool:
    """Whether a file in a folder, by its name there, is one of Snakemake, of a viewer of files, or of NFS."""
    return _FOREIGN.search(name) is not None


def content_sha256(path: Path | str) -> str:
    """What identifies an artefact: the bytes of a file, the files of a folder, or what the folder's manifest names.

    The last is for DCP folders, whose files may differ although their tensors are equal (`rcm.checkpoints.dcp`). Of
    the rows of a training their times do not count.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_dir():
        return _sha256_rows(path) if path.name.endswith(METRICS) else sha256_file(path)
    if (path / MANIFEST).exists():
        manifest = read_json(path / MANIFEST)
        if isinstance(manifest, dict) and isinstance(manifest.get("content_sha256"), str):
            return manifest["content_sha256"]
    return sha256_folder(path)


def _sha256_rows(path: Path) -> str:
    """SHA-256 over the rows of a training without their `wall`; of the bytes where they are no such rows."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return sha256_json([{key: value for key, value in row.items() if key != "wall"} for row in rows])
    except (ValueError, AttributeError, RecursionError):
        return sha256_file(path)


def verified_sha256(path: Path | str, found: str | None = None) -> str:
    """`content_sha256`, where it is not `found` already; it must be what the artefact's `.prov.json` says.

    UserError where it is not, so the artefact is damaged or another, and where the record is of another artefact that
    lies below the same folder of the working directory: one of another name below data/SCALE or results/SCALE, which
    may be renamed. What has no record, such as a user's own file, is taken.
    """
    path = Path(path)
    found = content_sha256(path) if found is None else found
    if not (record := beside(path, ".prov.json")).is_file():
        return found
    said = _said(record)
    name, known, stage = Path(said["artefact"]), said["sha256"], said["stage"]
    what_to_do = f"make it again (stage {stage}), or remove {record} to take it as it is"
    if found != known:
        raise UserError(
            f"{path} is damaged or was replaced: its SHA-256 is {found}, by its record {known}; {what_to_do}"
        )
    own = Path(_relative(path)).parts
    if name.parts[:1] == own[:1] and (name.parts[2:] or name.parts) != (own[2:] or own):
        raise UserError(f"{path} was replaced: by its record it is {name}; {what_to_do}")
    return found


def stated_sha256(path: Path | str) -> str:
    """`verified_sha256`, or what the artefact's record says where that was written since: big files take a minute.

    A file that took the artefact's place later is noticed by the time of that, however old its content is. Bits that
    flip on the disk are not: who reads the content compares it.
    """
    path = Path(path)
    for record in (beside(path, ".download.json"), beside(path, ".prov.json")):
        if record.exists() and not _is_older(record, path):
            said = read_json(record)
            if isinstance(said, dict) and isinstance(said.get("sha256"), str):
                return str(said["sha256"])
    return verified_sha256(path)


def _is_older(record: Path, path: Path) -> bool:
    """Whether the artefact changed, or a file took its place, after its record was written."""
    written, files = record.stat(), [path, *(path.rglob("*") if path.is_dir() else ())]
    times = [file.stat() for file in files if file.name != ".snakemake_timestamp"]
    return any(time.st_mtime > written.st_mtime or time.st_ctime > written.st_ctime for time in times)


@functools.cache
def code_digest(*roots: Path | str) -> str:
    """SHA-256 over the source files below `roots`; by default of this library and of the attention kernels."""
    folders = [Path(root) for root in roots] or [Path(__file__).parent, *_kernel_folders()]
    digests = []
    for root in folders:
        files = [root] if root.is_file() else root.rglob("*")
        sources = [file for file in files if file.is_file() and "__pycache__" not in file.parts]
        digests += [[root.name, file.relative_to(root).as_posix(), sha256_file(file)] for file in sorted(sources)]
    return sha256_json(digests)


def _kernel_folders() -> list[Path]:
    spec = importlib.util.find_spec("flash_jvp")
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


# --- Provenance ----------------------------------------------------------------------------------------------------


def _relative(path: Path) -> str:
    """The path as seen from the working directory; outside of it the bare name, which means the same elsewhere."""
    relative = Path(os.path.relpath(path))
    return path.name if relative.parts[:1] == ("..",) else relative.as_posix()


def beside(path: Path | str, suffix: str) -> Path:
    """The companion of an artefact: `beside("a/x.tar", ".prov.json")` is `a/x.tar.prov.json`."""
    path = Path(path)
    return path.with_name(path.name + suffix)


def _said(record: Path) -> dict[str, Any]:
    """A `.prov.json` that names an artefact, its SHA-256, the stage and the code; else a UserError."""
    small = record.is_file() and record.stat().st_size <= _RECORD_BYTES
    said = read_json(record) if small else None
    if not isinstance(said, dict) or not all(isinstance(said.get(key), str) for key in _NAMED):
        raise UserError(
            f"{record} is damaged, for it does not say what it is about; make the artefact again, or remove the "
            "record to take it as it is"
        )
    return said


def read_record(path: Path | str) -> dict[str, Any]:
    """A `.prov.json`; a UserError where it is damaged or no such record."""
    path = Path(path)
    said = _said(path)
    inputs = said.get("inputs")
    if not isinstance(inputs, list) or not all(
        isinstance(item, dict) and isinstance(item.get("path"), str) and isinstance(item.get("sha256"), str)
        for item in inputs
    ):
        raise UserError(f"{path} is damaged, for it does not say what was read; make the artefact again")
    try:
        agrees = isinstance(said.get("config"), dict) and said.get("config_sha256") == sha256_json(said["config"])
    except (ValueError, RecursionError):  # numbers that JSON does not have
        agrees = False
    if not agrees:
        raise UserError(f"{path} is damaged: its configuration is not the one of its hash; make the artefact again")
    return said


def read_run(path: Path | str, sha256: str | None = None) -> dict[str, Any] | None:
    """A `.run.json`; None where there is none, as after `dvc pull`, or where it is damaged: nothing rests on it.

    With `sha256`, that of the artefact, also None where it tells of another: what was pulled may lie beside the record
    of what was made here before.
    """
    with suppress(UserError):
        said = read_json(path) if Path(path).is_file() else None
        number = float | int
        needed: dict[str, Any] = {"artefact": str, "sha256": str, "stage": str, "started": str, "wall_seconds": number}
        needed |= {"peak_mib": number, "host": dict, "versions": dict, "git": dict | None, "facts": dict}
        newer: dict[str, Any] = {"gpu_hours": number, "core_hours": number, "attempts": int}
        if (
            isinstance(said, dict)
            and all(isinstance(said.get(key), kind) for key, kind in needed.items())
            and all(isinstance(said.get(key, 0), kind) for key, kind in newer.items())
            and (said["git"] is None or isinstance(said["git"].get("commit"), str))
            and sha256 in (None, said["sha256"])
        ):
            return said
    return None


@contextmanager
def recording(
    *outputs: Path | str,
    stage: str,
    inputs: Iterable[Path | str] | Mapping[Path, str] = (),
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
    ranks: int = 1,
    resume: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Write `X.prov.json` and `X.run.json` beside every output X once the block has made them.

    Args:
        outputs: the files and folders that the block writes.
        stage: name of the stage, as on the command line.
        inputs: files and folders that it reads; a missing one, or one that is not what its record says, is a UserError
            before any work is done. They are hashed, unless this is a dict of their SHA-256; what is empty there the
            block fills in, by `verified_sha256`.
        config: the numbers that the stage depends on, JSON types only.
        seed: the seed it ran under.
        ranks: how many processes do this together.
        resume: folder of the state of an unfinished run; it remembers what earlier attempts took.

    `.prov.json` is a function of inputs, code and configuration (no times, hosts, commits or absolute paths). Its
    `code_sha256` is of the whole library, all that could have had a part in it. `.run.json` says what this one run
    took, all attempts together, where, and by which commit. Yields a dict for facts of the run, which end up there;
    under `ranks` it may be given the `usage` of the other ranks.
    """
    for path in map(Path, outputs):
        remove_leftovers(path)  # also where nothing is left to write
    files = [Path(path) for path in inputs]
    for path in files:
        if not path.exists():
            raise UserError(f"input {path} does not exist; make it first, or check the path")
    known = inputs if isinstance(inputs, Mapping) else dict.fromkeys(files)
    verified = {path: verified_sha256(path, sha256) for path, sha256 in known.items() if sha256 != ""}
    hashes = inputs if isinstance(inputs, Mapping) else verified
    provenance: dict[str, Any] = {
        "stage": stage,
        "inputs": [],  # known at the end
        "config": dict(config or {}),
        "config_sha256": sha256_json(dict(config or {})),
        "code_sha256": code_digest(),
        "seed": seed,
    }
    git = usage.git_version()
    facts: dict[str, Any] = {}
    attempts = resume / "attempts" if resume is not None else None
    with usage.metered(attempts, ranks, sha256_json([stage, provenance["config"], seed])) as meter:
        yield facts
    provenance["inputs"] = [{"path": _relative(path), "sha256": hashes[path]} for path in files]
    run = {
        "stage": stage,
        **meter.record(facts.pop("ranks", None)),
        "command": usage.command(),
        "host": usage.host(),
        "versions": usage.versions(),
        "git": git,
        "facts": facts,
    }
    for path in map(Path, outputs):
        identity = {"artefact": _relative(path), "sha256": content_sha256(path)}
        write_json(beside(path, ".prov.json"), identity | provenance)
        write_json(beside(path, ".run.json"), identity | run)
