"""Checkpoints from elsewhere: a path or an address and a SHA-256 in, a verified file out."""

import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from rcm.artefact import UserError, atomic_file, sha256_file

_CHUNK = 2**20  # bytes
_TIMEOUT = 30  # seconds without a byte
_TRIES = 3


def download(source: str, sha256: str, out: Path | str) -> None:
    """Bring `source` to `out`, which then has the given SHA-256.

    Args:
        source: a path relative to the working directory, or a file://, http:// or https:// address.
        sha256: 64 hexadecimal digits.
        out: the file to make; nothing is done if it is there already with the right content.

    An interrupted transfer over HTTP goes on where it stopped, also in a later call. Content of another hash never
    appears under `out`.
    """
    out, sha256 = Path(out), sha256.lower()
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise UserError(f"{sha256!r} is not a SHA-256: expected 64 hexadecimal digits")
    if out.is_file() and sha256_file(out) == sha256:
        return
    scheme = urllib.parse.urlsplit(source).scheme
    if scheme in ("http", "https"):
        _fetch(source, sha256, out)
    elif scheme in ("", "file"):
        _copy(source, sha256, out)
    else:
        raise UserError(f"cannot download from {source!r}: expected a path or a file://, http:// or https:// address")


def _copy(source: str, sha256: str, out: Path) -> None:
    parts = urllib.parse.urlsplit(source)
    path = Path(urllib.request.url2pathname(parts.path)) if parts.scheme == "file" else Path(source)
    if not path.is_file():
        raise UserError(f"{path} does not exist; put the file with SHA-256 {sha256} there")
    with atomic_file(out) as temporary:
        shutil.copyfile(path, temporary)
        _verify(temporary, sha256, str(path))


def _verify(path: Path, sha256: str, origin: str) -> None:
    if (actual := sha256_file(path)) != sha256:
        raise UserError(
            f"{origin} has SHA-256 {actual}, expected {sha256}: it is damaged, or not the file that was meant"
        )


def _fetch(url: str, sha256: str, out: Path) -> None:
    """Append to `.NAME.SHA.download` beside `out` until complete, verify, and rename."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{sha256[:8]}.download")
    resumed = partial.exists()
    _transfer(url, sha256, partial, out)
    try:
        _verify(partial, sha256, url)
    except UserError:
        partial.unlink()
        if not resumed:
            raise
        _transfer(url, sha256, partial, out)  # the earlier part may have been of another version of the file
        try:
            _verify(partial, sha256, url)
        except UserError:
            partial.unlink()
            raise
    partial.replace(out)


def _transfer(url: str, sha256: str, partial: Path, out: Path) -> None:
    """Fetch what `partial` lacks, with a few tries; what has arrived is kept for the next call."""
    for attempt in range(_TRIES):
        try:
            _transfer_once(url, partial)
            return
        except (OSError, HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or attempt == _TRIES - 1:
                raise UserError(
                    f"cannot download {url} ({error}); without a network, put the file with SHA-256 {sha256} at {out}"
                    " and run again"
                ) from error
            time.sleep(2**attempt)


def _transfer_once(url: str, partial: Path) -> None:
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing after what is there: complete, or not of this file; the hash decides
            return
        raise
    with response:
        continued = response.status == 206
        length = response.headers.get("Content-Length")
        start = done if continued else 0
        total = start + int(length) if length else None
        with (
            partial.open("ab" if continued else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=partial.name, disable=None) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and partial.stat().st_size < total:
        raise ConnectionError(f"connection lost after {partial.stat().st_size} of {total} bytes")
