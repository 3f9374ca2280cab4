"""Start the ranks of a command: `python -m rcm.launch TORCHRUN_OPTIONS -m MODULE ARGUMENTS`.

torchrun's options and its machinery, with the ends that a workflow needs: the exit status is that of the rank that
failed first (75: interrupted, the state is saved), its cause is one line, and signals reach the ranks, which save their
state. `--help` lists the options; one machine needs `--nproc-per-node N` alone. Several machines need no more where
Slurm starts one launcher on each, `srun --ntasks-per-node=1 python -m rcm.launch --nproc-per-node N ...`: how they meet
is asked of Slurm, and they end together, with one status. The log of torchrun itself, in which every failure is a page,
is shown with TORCHELASTIC_LOG=1.
"""

import datetime
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rcm.artefact import UserError
from rcm.training.signals import EXIT_INTERRUPTED, SIGNALS

PATIENCE = 35.0  # seconds between the end of one machine's ranks and that of the others'; torchrun takes up to 30
START = 600.0  # seconds in which all machines have to start
POLL = 0.3  # seconds between two looks at the other machines
SCONTROL = 60.0  # seconds in which Slurm's controller answers, or the name of a node has to do


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

    told = arguments.standalone or arguments.rdzv_endpoint or arguments.nnodes != "1:1"
    try:
        place = None if told else Place.of_slurm(os.environ)
    except UserError as mistake:
        print(f"rcm.launch: error: {mistake}", file=sys.stderr)
        return 2
    if place:
        arguments.nnodes, arguments.node_rank = str(place.machines), place.machine
        arguments.master_addr, arguments.master_port = place.address, place.port
    # torchrun catches signals in the main thread, to kill its ranks at once; here they may save their state first
    thread = threading.Thread(target=work, daemon=True)
    for number in SIGNALS:
        signal.signal(number, _forward)
    others = Others(place) if place else None
    thread.start()
    late = others.end_with(thread) if others else False
    thread.join()
    if late:
        failures.clear()  # consequences
    unknown = failures and not isinstance(failures[0], ChildFailedError)
    own = cause = None
    if failures:
        own = cause = Cause(1, time.time(), -1, 1) if unknown else first_cause(failures[0].failures)  # type: ignore[attr-defined]
    if others:
        cause = others.end(own)
    if unknown and cause == own:
        raise failures[0]
    if cause is None:
        return 0
    if cause == own:
        cause.speak()
    return cause.status


class Cause(NamedTuple):
    """How a rank failed; the least of several is the first cause."""

    # 0: killed, which takes others along at once; 1: ended by itself, or by the loss of another, as by SIGABRT of NCCL;
    # 2: by SIGTERM, which torchrun sends to those that are left
    consequence: int
    timestamp: float  # that of torchrun, in whole seconds
    rank: int
    code: int

    @property
    def status(self) -> int:
        """The exit status, as a shell would say it."""
        return 128 - self.code if self.code < 0 else self.code

    def speak(self) -> None:
        """Say it in one line; an interrupted rank has said so itself."""
        name = signal.Signals(-self.code).name if self.code < 0 else ""
        how = f"was killed by {name}{_HINTS.get(-self.code, '')}" if name else f"ended with {self.code}"
        if self.code != EXIT_INTERRUPTED:
            told = f"rcm.launch: rank {self.rank} failed first: it {how}; the others were ended"
            print(told, file=sys.stderr, flush=True)


def first_cause(failures: Mapping[int, Any]) -> Cause:
    """The first of torchrun's failures on this machine."""
    return min(Cause(_consequence(f.exitcode), f.timestamp, rank, f.exitcode) for rank, f in failures.items())


def _consequence(code: int) -> int:
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return 2
    return int(code >= 0 or code == -signal.SIGABRT)


class Place(NamedTuple):
    """This machine among those of a run, and where they meet: at `port` the ranks, at the next one the launchers."""

    machine: int
    machines: int
    address: str
    port: int

    @classmethod
    def of_slurm(cls, environment: Mapping[str, str]) -> "Place | None":
        """From the variables of a job step; None on one machine, or without Slurm."""
        machines = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        if machines == 1:
            return None
        # steps of a job, and jobs that share a machine, must not meet each other
        number = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
        address = _address(environment["SLURM_STEP_NODELIST"])
        return cls(int(environment["SLURM_NODEID"]), machines, address, 20000 + 2 * (number % 5000))


def _address(nodes: str) -> str:
    """Where the first of a list of nodes, such as n[3-5,7],m1, is reached: its name, where Slurm does not say more."""
    matched = re.match(r"([^,\[]+)(?:\[(\d+)[^]]*\])?([^,\[]*)", nodes)
    if matched is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}; expected: a list of nodes, as srun sets it")
    head = "".join(filter(None, matched.groups()))
    try:
        asked = ["scontrol", "--oneliner", "show", "node", head]
        said = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=SCONTROL).stdout
    except (OSError, subprocess.SubprocessError):  # some sites have no scontrol on their nodes
        return head
    return dict(word.split("=", 1) for word in said.split() if "=" in word).get("NodeAddr", head)


class Others:
    """The launchers of the other machines: one that ends with a failure ends all, and all end with the first cause."""

    def __init__(self, place: Place):
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.place, self.known = place, dict[int, "Cause | None"]()
        self.store = TCPStore(
            place.address,
            place.port + 1,
            is_master=place.machine == 0,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=START),
        )

    def end_with(self, thread: threading.Thread) -> bool:
        """Wait for this machine's ranks; a while after another's have failed, end them, and say so."""
        while thread.is_alive() and not any(self._look().values()):
            thread.join(POLL)
        thread.join(PATIENCE)
        late = thread.is_alive()
        for pid in _children() if late else ():  # with their peers gone there is nothing left that they could save
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return late

    def end(self, own: Cause | None) -> Cause | None:
        """Say how this machine's ranks ended; returns the first cause of all machines, None where all went well."""
        with suppress(RuntimeError):  # the head has ended
            self.store.set(f"ended {self.place.machine}", json.dumps(own))
        self.known[self.place.machine] = own
        self._wait(lambda: len(self._look()) == self.place.machines)
        with suppress(RuntimeError):
            self.store.add("read", 1)
        if self.place.machine == 0:  # it keeps the store
            self._wait(lambda: self.store.add("read", 0) == self.place.machines)
        return min((cause for cause in self.known.values() if cause), default=None)

    def _look(self) -> "dict[int, Cause | None]":
        """How the machines ended that have; the head's silence is a failure like those of its ranks."""
        for machine in {*range(self.place.machines)} - {*self.known}:
            try:
                if self.store.check([f"ended {machine}"]):
                    told = json.loads(self.store.get(f"ended {machine}"))
                    self.known[machine] = Cause(*told) if told else None
            except RuntimeError:
                if 0 not in self.known:
                    told = f"rcm.launch: the launcher of the first machine, {self.place.address}, is gone"
                    print(told, file=sys.stderr, flush=True)
                    self.known[0] = Cause(1, time.time(), 0, 1)
                break
        return self.known

    def _wait(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < end and not done():
            time.sleep(POLL)


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


_HINTS: dict[int, str] = {
    signal.SIGKILL: " (by hand, or for want of memory)",
    signal.SIGBUS: " (for want of shared memory?)",
}


if __name__ == "__main__":
    sys.exit(main())
