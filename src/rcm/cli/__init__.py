"""The command line: `python -m rcm STAGE`, one thin function a stage.

A stage reads the composed configuration, opens files, calls the library and writes its outputs atomically; formulas
live below. Mistakes of the user, and a full disk, end in one sentence and exit status 2; Ctrl-C, SIGTERM and SIGUSR1 in
one sentence and 128 + their number. A stage's module, and torch with it, is imported only when the stage runs, so that
`--help` is instant.
"""

import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from rcm.artefact import UserError, reason
from rcm.cli.parser import STAGES, overview, parse
from rcm.cli.ranks import other_is_gone, rank, speaker, wait_for_the_end
from rcm.training.signals import SIGNALS, end_with_launcher, restore

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run one stage and return its exit status (0 done, 2 the user's mistake, above 128 ended by a signal)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from rcm import __version__

        print(f"rcm {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in STAGES:
        print(f"rcm: error: there is no stage {name!r}; the stages are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    try:
        arguments = parse(name, rest)
        module, function = STAGES[name].where.split(":")
        with _ended_by_signals():
            end_with_launcher()
            getattr(import_module(module), function)(arguments)
    except UserError as mistake:
        print(f"{speaker(f'rcm {name}')}: error: {one_line(str(mistake))}", file=sys.stderr)
        return 2
    except RuntimeError as fault:
        if not other_is_gone(fault):
            raise
        wait_for_the_end()
        print(f"rcm {name} (rank {rank()}): error: another rank is gone ({reason(fault)})", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads has had enough: `rcm why ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as fault:
        if fault.strerror is None:
            raise
        print(f"{speaker(f'rcm {name}')}: error: {_told(fault)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        if rank() == 0:
            told = "interrupted; no unfinished output was left, run it again to go on"
            print(f"{'' if interrupt.args else chr(10)}rcm {name}: {told}", file=sys.stderr)
        return 128 + (interrupt.args or (signal.SIGINT,))[0]
    return 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End by SIGTERM and SIGUSR1 (a scheduler's warning) as by Ctrl-C, so that nothing unfinished is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came: list[int] = []

    def end(number: int, _frame: Any) -> None:
        came.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_IGN)  # it may come twice, from a scheduler and from a parent
        raise KeyboardInterrupt(number)

    before: dict[int, Any] = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    except Exception:
        if came:  # a library has made a fault of its own of it
            raise KeyboardInterrupt(came[0]) from None
        raise
    finally:
        restore(before)


def _told(fault: OSError) -> str:
    """A fault of files and disks in one sentence that names the place."""
    place = None if fault.filename is None else one_line(os.fsdecode(fault.filename))
    if fault.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{fault.strerror}" if place is None else f"{place}: {fault.strerror}"
    folder = next(folder for folder in Path(place or ".").absolute().parents if folder.is_dir())
    free = [(where, shutil.disk_usage(where).free / 1e6) for where in (folder, Path(tempfile.gettempdir()))]
    left = ", ".join(f"{where} has {megabytes:.1f} MB left" for where, megabytes in dict(free).items())
    what = "the disk is full" if fault.errno == errno.ENOSPC else "the disk quota is used up"
    return f"{'' if place is None else f'cannot write {place}: '}{what} ({left}): make room and run the same again"


def one_line(message: str, limit: int = 1000) -> str:
    """A message without line breaks, shortened in the middle where a value in it is very long."""
    message = " ".join(message.split())
    return message if len(message) <= limit else f"{message[: limit - 203]} … {message[-200:]}"
