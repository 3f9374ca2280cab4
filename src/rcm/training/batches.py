"""What is random in an update, as functions of (seed, purpose, update, position in the global batch).

Nothing lives on a generator, so a resumed run repeats an uninterrupted one and the number of processes does not matter.
Which samples a batch holds is such a function too (`rcm.data.stream`).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rcm import randomness
from rcm.artefact import UserError
from rcm.flow import time_distribution
from rcm.objectives import Rollout, rollout_times

from .settings import Settings


class Draws:
    """What is random in an update, for the samples at `positions` of the global batch."""

    def __init__(self, null_text: Tensor, settings: Settings, positions: Sequence[int], device: Any):
        self.null_text, self.settings = null_text.to(device), settings
        self.positions, self.device = list(positions), device
        self.dmd_time = time_distribution(settings.dmd_time)
        self.scm_time = time_distribution(settings.scm_time)

    def drop(self, text_BLD: Tensor, role: str, update: int) -> Tensor:
        """The text, some prompts replaced by the empty one."""
        if self.settings.prompt_dropout == 0:
            return text_BLD
        dropped = self.uniform((), f"{role} dropout", update) < self.settings.prompt_dropout
        return torch.where(dropped[:, None, None], self.null_text, text_BLD)

    def rollout(self, role: str, update: int, shape: Sequence[int]) -> Rollout:
        """Times (N, B) and noises (N, B, ...) of a rollout; N is the same for the whole batch."""
        s, steps = self.settings, self.rollout_steps(role, update)
        if s.rollout_times is None:
            drawn = self.dmd_time.quantile(self.uniform((steps,), f"{role} rollout time", update))
            times = rollout_times(drawn.T)
        else:
            fixed = torch.tensor([math.pi / 2, *s.rollout_times][:steps], dtype=torch.float64, device=self.device)
            times = fixed[:, None].expand(-1, len(self.positions))
        return Rollout(times, self.normal((steps, *shape), f"{role} rollout noise", update).transpose(0, 1))

    def rollout_steps(self, role: str, update: int) -> int:
        """N: 1, 2, ... N_max take turns over a role's updates, or are drawn evenly."""
        s = self.settings
        if s.rollout_steps == "cycle":
            return update % s.max_rollout + 1
        drawn = randomness.uniform((), seed=s.seed, purpose=f"{role} rollout steps", step=update, indices=[0])
        return int(drawn.item() * s.max_rollout) + 1

    def normal(self, shape: Sequence[int], purpose: str, update: int) -> Tensor:
        drawn = randomness.normal(
            tuple(shape), seed=self.settings.seed, purpose=purpose, step=update, indices=self.positions
        )
        return drawn.to(self.device)

    def uniform(self, shape: Sequence[int], purpose: str, update: int) -> Tensor:
        drawn = randomness.uniform(
            tuple(shape), seed=self.settings.seed, purpose=purpose, step=update, indices=self.positions
        )
        return drawn.to(self.device)


def shares(batch: int, groups: int, micro_batch: int | None) -> list[list[range]]:
    """The positions of each group's micro-batches: slices of the global batch, as even as they can be.

    All groups have the same number of micro-batches, because each of their passes is a collective operation. Raises
    UserError where there are too few samples for that.
    """
    if batch < groups:
        raise UserError(
            f"distillation.batch is {batch}, but {groups} groups of processes share it out: "
            f"take at least {groups}, or fewer processes (parallel.context makes groups larger)"
        )
    slices = _split(range(batch), groups)
    count = -(-len(slices[0]) // (micro_batch or batch))
    if count > len(slices[-1]):
        raise UserError(
            f"distillation.batch {batch} over {groups} groups of processes gives {len(slices[-1])} to "
            f"{len(slices[0])} samples to each, which do not make {count} micro-batches everywhere: "
            f"take a larger parallel.micro_batch than {micro_batch}, or a batch that {groups} divides"
        )
    return [_split(positions, count) for positions in slices]


def _split(positions: range, parts: int) -> list[range]:
    """Contiguous slices whose lengths differ by at most one, the longer ones first."""
    length, longer = divmod(len(positions), parts)
    ends = [length * k + min(k, longer) for k in range(parts + 1)]
    return [positions[a:b] for a, b in pairwise(ends)]
