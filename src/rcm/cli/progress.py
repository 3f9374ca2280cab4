"""Progress that people and log files can read: a bar on a terminal, a plain line every 20 seconds elsewhere."""

import sys
import time
from typing import Any, Self

from tqdm import tqdm

INTERVAL = 20.0  # seconds between two plain lines


class Progress:
    """Count `total` units of work: `with Progress("synthesize", 400, "samples") as progress: progress.advance(32)`.

    With `patient` a log file does not hear of what is over before the next line is due.
    """

    def __init__(self, name: str, total: int, unit: str, *, patient: bool = False):
        self.name, self.total, self.unit, self.patient = name, total, unit, patient
        self.done = 0
        self._start = time.monotonic()
        self._spoken = self._start, 0  # time and count of the last plain line: a resumed run starts with a leap
        self._bar = tqdm(desc=name, total=total, unit=f" {unit}", dynamic_ncols=True) if sys.stderr.isatty() else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units; `note` stands behind the figures, such as a loss."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._spoken[0] >= INTERVAL:
            (before, done), self._spoken = self._spoken, (time.monotonic(), self.done)
            left = (self._spoken[0] - before) / max(self.done - done, 1) * (self.total - self.done)
            self._say(f"{self.done} of {self.total} {self.unit}, about {left:.0f} s left{note and f', {note}'}")

    def _say(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and not (self.patient and time.monotonic() - self._start < INTERVAL):
            self._say(f"{self.done} {self.unit} in {time.monotonic() - self._start:.1f} s")
