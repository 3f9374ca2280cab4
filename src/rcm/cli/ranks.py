"""Who of several ranks speaks: one mistake is one line, and the first cause comes first.

The launcher ends all ranks as soon as one has ended. So a rank with nothing of its own to say waits for that, a moment.
"""

import os
import time

PATIENCE = 5.0  # seconds in which the launcher ends the others


def rank() -> int:
    """The number of this process among those of torchrun; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def speaker(name: str) -> str:
    """How this process calls itself, once it is its turn: rank 0 at once, others if no other rank has ended before.

    What all ranks find wrong is thus said by rank 0 alone.
    """
    if rank() == 0:
        return name
    time.sleep(PATIENCE)
    return f"{name} (rank {rank()})"


def other_is_gone(fault: RuntimeError) -> bool:
    """Whether a collective operation failed because another rank has ended, or does not answer."""
    lost = "gloo" in str(fault) or type(fault).__name__ in ("DistBackendError", "DistNetworkError")
    return "WORLD_SIZE" in os.environ and lost


def wait_for_the_end() -> None:
    """Let the launcher see the rank that ended first."""
    time.sleep(PATIENCE)
