"""Signals that ask for an early end: the state is saved first, and the run can be continued."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

EXIT_INTERRUPTED = 75  # exit status: the state is saved, run again (EX_TEMPFAIL)
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1  # the last is a scheduler's warning that time is nearly up


@dataclass
class Caught:
    """The signals so far; `at_once`: as long as nothing would be lost, the first one ends the process."""

    at_once: bool = False
    numbers: list[int] = field(default_factory=list)


@contextmanager
def caught_signals(*, at_once: bool = False, speak: bool = True) -> Iterator[Caught]:
    """Note signals, or leave by SystemExit(EXIT_INTERRUPTED); the second of a kind acts as it did before.

    Not the second SIGUSR1: Slurm sends it to launcher and rank, and the launcher passes it on.
    """
    caught = Caught(at_once)
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, _frame: Any) -> None:
        caught.numbers.append(number)
        signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else before[number])
        if caught.at_once:
            raise SystemExit(EXIT_INTERRUPTED)

    before: dict[int, Any] = {number: signal.signal(number, catch) for number in SIGNALS}
    try:
        try:
            yield caught
        except Exception:
            if caught.at_once and caught.numbers:  # a library has made a fault of its own of it
                raise SystemExit(EXIT_INTERRUPTED) from None
            raise
    except SystemExit:
        if caught.at_once and speak:  # not in the handler, which may have come in the middle of a line
            told = "interrupted before the first iteration: nothing is lost, run the same command again"
            print(told, file=sys.stderr, flush=True)
        raise
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
