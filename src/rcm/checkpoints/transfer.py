"""Transfer of one file: in parallel parts, with several tries, going on where an earlier transfer stopped.

A journal beside the partial file notes what of each part is on the disk, so that a process that was killed loses little
(`_NOTED` of each part that was under way), and a machine that lost its power no more.
A file that has changed at its origin since then begins again.
"""

import errno
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rcm.artefact import UserError, beside

PART = 2**26  # bytes
THREADS = 8
TRIES = 5  # in a row without a byte
TRIES_TO_FIND = 3
DELAY = 1.0  # seconds before the second try, doubled before each further one
_CHUNK = 2**20  # bytes
_NOTED = 2**24  # bytes of a part between two lines of the journal, each of which waits for the disk
PASSING = OSError, HTTPException  # what another try may mend, unless `lasting`
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOENT, errno.EACCES)


def lasting(error: BaseException) -> bool:
    """Whether a fault is one of this machine's disk, which another try does not mend."""
    return isinstance(error, OSError) and error.errno in _DISK


class Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Remote:
    """A file elsewhere. `read(start, stop)` opens its bytes from `start` until before `stop` (None: the end).

    It raises a UserError where another try is in vain, OSError or HTTPException where it is not.
    """

    address: str
    read: Callable[[int, int | None], AbstractContextManager[Stream]]
    size: int | None  # bytes; None: unknown
    ranges: bool = True  # whether `start` may be other than 0
    version: str = ""  # changes with the content
    sha256: str | None = None  # where the origin says it
    blob: str | None = None  # likewise: what git calls the content, a SHA-1


def transfer(remote: Remote, partial: Path, arrived: Callable[[int], Any]) -> bool:
    """Bring a file to `partial`; returns whether part of it was there from an earlier transfer.

    `arrived` is called with the number of bytes, also of the earlier transfer. Raises UserError, OSError or
    HTTPException where the file cannot be had. What has arrived is kept then; the journal is left in any case, for the
    caller to remove once the file is verified. That no other process does the same is the caller's to see to, too.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    with journal_of(partial).open("a+b", buffering=0) as journal:
        work = _Transfer(remote, partial, journal, arrived)
        resumed = work.resume()
        work.run()
    return resumed


def journal_of(partial: Path) -> Path:
    """The journal of a transfer to `partial`."""
    return beside(partial, ".parts")


@dataclass
class _Transfer:
    remote: Remote
    partial: Path
    journal: BinaryIO
    arrived: Callable[[int], Any]
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        size = self.remote.size
        self.parts: list[tuple[int, int | None]] = [(0, size)]
        if size is not None and self.remote.ranges:
            self.parts = [(start, min(start + PART, size)) for start in range(0, size, PART)]
        self.done = [0] * len(self.parts)

    def resume(self) -> bool:
        """Take up what the journal says has arrived, or begin anew."""
        identity = json.dumps([self.remote.size, self.remote.version, PART]).encode()
        self.journal.seek(0)
        content = self.journal.read()
        first, *lines = content.split(b"\n")[:-1] or [b""]  # a last line without its end does not count
        if first == identity and self.remote.ranges and self.partial.exists():
            with suppress(ValueError):  # damaged
                done = {int(part): int(count) for part, count in map(bytes.split, lines)}
                self.done = [done.pop(part, 0) for part in range(len(self.parts))]
        self.journal.truncate(content.rfind(b"\n") + 1 if any(self.done) else 0)
        if not any(self.done):
            self.journal.write(identity + b"\n")
        with self.partial.open("r+b" if any(self.done) else "wb") as file:
            file.truncate(self.remote.size or 0)
        self.arrived(sum(self.done))
        return any(self.done)

    def run(self) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                tasks = [pool.submit(self._part, part) for part in range(len(self.parts))]
                for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
                    task.result()
            except BaseException:  # Ctrl-C too
                self.stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        with self.partial.open("rb+") as file:
            os.fsync(file.fileno())

    def _part(self, part: int) -> None:
        failures = 0
        while not self.stopped.is_set():
            before = self.done[part]
            try:
                self._attempt(part)
                return
            except PASSING as error:
                failures = 1 if self.remote.ranges and self.done[part] > before else failures + 1
                if lasting(error) or failures == TRIES:
                    raise
                self.stopped.wait(DELAY * 2 ** (failures - 1))

    def _attempt(self, part: int) -> None:
        """Fetch what a part lacks; without ranges all of it again."""
        start, stop = self.parts[part]
        if not self.remote.ranges:
            self.arrived(-self.done[part])
            self.done[part] = 0
        if stop is not None and start + self.done[part] >= stop:
            return
        noted = self.done[part]
        with self.remote.read(start + noted, stop) as stream, self.partial.open("r+b") as file:
            file.seek(start + noted)
            try:
                while chunk := stream.read(_CHUNK):
                    if self.stopped.is_set():
                        return
                    if stop is not None and start + self.done[part] + len(chunk) > stop:
                        raise UserError(
                            f"{self.remote.address} sends more than the {stop} bytes that it promised; run again"
                        )
                    file.write(chunk)
                    with self.lock:
                        self.done[part] += len(chunk)
                        self.arrived(len(chunk))
                    if self.done[part] >= noted + _NOTED:
                        noted = self._note(part, file)
            finally:
                self._note(part, file)
        if stop is not None and start + self.done[part] < stop:
            raise ConnectionError(f"the connection was lost after {start + self.done[part]} of {stop} bytes")

    def _note(self, part: int, file: BinaryIO) -> int:
        """Journal how much of a part has arrived, once it is on the disk; returns that."""
        file.flush()
        os.fsync(file.fileno())
        with self.lock:
            self.journal.write(b"%d %d\n" % (part, self.done[part]))
        return self.done[part]
