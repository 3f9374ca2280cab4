"""Start the ranks of a command: `python -m rcm.launch TORCHRUN_OPTIONS -m MODULE ARGUMENTS`.

torchrun's options and its machinery, with the ends that a workflow needs: the exit status is that of the rank that
failed first (75: interrupted, the state is saved), its cause is one line, and signals reach the ranks, which save their
state. `--help` lists the options; one machine needs `--nproc-per-node N` alone. The log of torchrun itself, in which
every failure is a page, is shown with TORCHELASTIC_LOG=1.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rcm.training.signals import EXIT_INTERRUPTED, SIGNALS


def main(argv: list[str] | None = None) -> int:
    """Run all ranks of this machine to their end; returns the exit status."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    arguments = parse_args(argv)
    if "TORCHELASTIC_LOG" not in os.environ:
        for name in ("torch.distributed.elastic", "torch.distributed.run"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            run(arguments)
        except BaseException as failure:  # carried over to the main thread
            failures.append(failure)

    # torchrun catches signals in the main thread, to kill its ranks at once; here they may save their state first
    thread = threading.Thread(target=work, daemon=True)
    for number in SIGNALS:
        signal.signal(number, _forward)
    thread.start()
    thread.join()
    if not failures:
        return 0
    if isinstance(failures[0], ChildFailedError):
        return _first_cause(failures[0].failures)
    raise failures[0]


def _forward(number: int, _frame: Any) -> None:
    """Pass a signal on to the ranks; without any yet, end by it."""
    ranks = _children()
    for pid in ranks:
        with suppress(ProcessLookupError):  # it has ended since
            os.kill(pid, number)
    if not ranks:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _children() -> list[int]:
    pids: list[int] = []
    for file in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended since
            pids += map(int, file.read_text().split())
    return pids


def _first_cause(failures: Mapping[int, Any]) -> int:
    """Say in one line which rank failed first, and how; returns its exit status as a shell would."""
    # a rank that was killed takes others with it at once, which fail by its loss: SIGTERM is torchrun's, to those left,
    # and SIGABRT that of NCCL, which waited in vain
    killed = [rank for rank, f in failures.items() if f.exitcode < 0 and -f.exitcode not in _CONSEQUENCES]
    rank = killed[0] if killed else min(failures, key=lambda rank: failures[rank].timestamp)
    code = failures[rank].exitcode
    status = 128 - code if code < 0 else code
    how = f"was killed by {signal.Signals(-code).name}{_HINTS.get(-code, '')}" if code < 0 else f"ended with {code}"
    if code != EXIT_INTERRUPTED:
        print(
            f"rcm.launch: rank {rank} failed first: it {how}; the others on this machine were ended",
            file=sys.stderr,
            flush=True,
        )
    return status


_CONSEQUENCES = signal.SIGTERM, signal.SIGABRT
_HINTS = {signal.SIGKILL: " (by hand, or for want of memory)", signal.SIGBUS: " (for want of shared memory?)"}


if __name__ == "__main__":
    sys.exit(main())
