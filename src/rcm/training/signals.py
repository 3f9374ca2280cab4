"""Signals that ask for an early end: the state is saved first, and the run can be continued."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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

    Not the second SIGUSR1, nor, of a launched rank, the second SIGTERM, to its end: Slurm sends them to launcher and
    rank, the launcher passes them on, and torchrun adds a SIGTERM as soon as another rank has ended.
    """
    caught = Caught(at_once)
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, _frame: Any) -> None:
        caught.numbers.append(number)
        again = number == signal.SIGUSR1 or (number == signal.SIGTERM and launched())
        signal.signal(number, signal.SIG_IGN if again else before[number])
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
        restore(before)


def restore(handlers: Mapping[int, Any]) -> None:
    """Set the handlers of signals as they were; a launched rank goes on ignoring what it has begun to ignore."""
    for number, handler in handlers.items():
        if not launched() or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def launched() -> bool:
    """Whether this process is a rank that torchrun or `rcm.launch` started."""
    return "LOCAL_RANK" in os.environ


def end_with_launcher() -> None:
    """Have the kernel send this rank SIGTERM when the thread that started it is gone, as after a kill -9 (Linux)."""
    if launched():
        with suppress(AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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
