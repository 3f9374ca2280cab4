"""Signals that ask for an early end: the state is saved first, and the run can be continued."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

EXIT_INTERRUPTED = 75  # exit status: the state is saved, run again (EX_TEMPFAIL)
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1  # the last is a scheduler's warning that time is nearly up


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that the signals are put into; the second of a kind acts as it did before."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, _frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, catch) for number in SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(iteration: int, iterations: int, resume_dir: Path, *, speak: bool) -> NoReturn:
    """End the process, in one line for the user."""
    if speak:
        print(
            f"interrupted: the state after iteration {iteration} of {iterations} is in {resume_dir}, "
            "run the same command again to continue",
            file=sys.stderr,
            flush=True,
        )
    raise SystemExit(EXIT_INTERRUPTED)
