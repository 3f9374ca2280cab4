"""Which GPU of a machine a process takes."""

import fcntl
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import IO

import torch

from rcm.artefact import UserError

_HELD: list[IO[str]] = []  # open as long as the process lives


@cache
def own_gpu() -> int:
    """The number of this process's GPU: its LOCAL_RANK, or without a launcher the first that no other one has taken.

    A process without a launcher takes a GPU by a lock on a file of the user's, which the kernel releases when the
    process ends: so the jobs of a workflow on one machine have one each. Where all are taken, it is the first.
    Raises UserError for a rank without a GPU.
    """
    count = torch.cuda.device_count()
    if "LOCAL_RANK" in os.environ:
        if (rank := int(os.environ["LOCAL_RANK"])) >= count:
            raise UserError(
                f"process {rank} of this machine, counted from 0, has no GPU, there are {count}: start as many "
                "processes a machine, on more machines with `python -m rcm.launch --nnodes ...`"
            )
        return rank
    folder = Path(tempfile.gettempdir(), f"rcm-gpus-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for number in range(count):
        lock = (folder / str(torch.cuda.get_device_properties(number).uuid)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        _HELD.append(lock)
        return number
    return 0
