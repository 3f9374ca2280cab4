"""Work that several ranks do together: where it fails on one, it fails on all, so that none waits for it in vain."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from rcm.artefact import UserError

Result = TypeVar("Result")


def everywhere(action: Callable[[], Result], group: dist.ProcessGroup | None) -> list[Result]:
    """What `action` returns on each rank of `group`, in their order (None: alone).

    Raises on all ranks what the first that failed raised there: its UserError or OSError, or a RuntimeError that tells
    of it.
    """
    if group is None:
        return [action()]
    outcome: tuple[str | Exception | None, Any]
    try:
        outcome = None, action()
    except (UserError, OSError) as error:
        outcome = error, None
    except Exception as error:
        outcome = f"rank {dist.get_rank(group)}: {type(error).__name__}: {error}", None
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group=group)
    for failure, _ in outcomes:
        if failure is not None:
            raise failure if isinstance(failure, Exception) else RuntimeError(failure)
    return [result for _, result in outcomes]
