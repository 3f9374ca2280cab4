"""The ranks of a run and how they share the work: replicate x shard x context.

Parameters are sharded over shard x context and replicated over replicate. The ranks of one context group hold slices
of the same samples; the other replicate x shard = `data_size` groups share the global batch out. Rank numbers count
the context fastest, so that its traffic, the heaviest, stays inside a node.
"""

import datetime
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from rcm.artefact import UserError
from rcm.parallel.gpu import own_gpu


@dataclass(frozen=True)
class Layout:
    """How many ranks share what."""

    replicate: int = 1  # copies of the sharded parameters (HSDP)
    shard: int = 1  # ranks that share the parameters of one copy
    context: int = 1  # ranks that share the tokens of a sample

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def data_size(self) -> int:
        """Groups that the global batch is shared out to."""
        return self.replicate * self.shard


class Mesh:
    """This process among all: alone (`group` is None), or one of `world` ranks of an initialised process group."""

    def __init__(self, layout: Layout | None, device: torch.device, timeout: float = 600):
        self.device, self.timeout = device, datetime.timedelta(seconds=timeout)
        self.group = dist.group.WORLD if layout else None
        self.layout = layout or Layout()
        self.rank = dist.get_rank() if layout else 0
        self.world = self.layout.world
        self.is_main = self.rank == 0
        self.data_size = self.layout.data_size
        self.data_rank, self.context_rank = divmod(self.rank, self.layout.context)
        if layout:
            self.context_group = self._groups((self.data_size, layout.context))[1]

    @cached_property
    def parameters(self) -> DeviceMesh:
        """The mesh that parameters live on: one-dimensional for FSDP, two-dimensional for HSDP."""
        sharing = self.layout.shard * self.layout.context
        names: tuple[str, ...] = ("replicate", "shard")
        sizes: tuple[int, ...] = (self.layout.replicate, sharing)
        if self.layout.replicate == 1:
            names, sizes = names[1:], sizes[1:]
        ranks = torch.arange(self.world).view(sizes)
        return DeviceMesh.from_group(self._groups(sizes), self.device.type, mesh=ranks, mesh_dim_names=names)

    def _groups(self, sizes: tuple[int, ...]) -> list[Any]:
        """The group of this rank along each axis of ranks in an array of these sizes.

        PyTorch's own meshes would leave them with its time-out instead of ours.
        """
        ranks, groups = torch.arange(self.world).view(sizes), []
        for axis, size in enumerate(sizes):
            rows = ranks.movedim(axis, -1).reshape(-1, size).tolist()
            whole = size == self.world
            groups.append(self.group if whole else dist.new_subgroups_by_enumeration(rows, timeout=self.timeout)[0])
        return groups

    def close(self) -> None:
        """End the process group."""
        if self.group is not None:
            dist.destroy_process_group()


def start(
    *, replicate: int = 1, shard: int | None = None, context: int = 1, timeout: float = 600, device: str = "auto"
) -> Mesh:
    """Join the ranks that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or be alone without it.

    shard     None: all ranks that replicate and context leave
    timeout   seconds after which a rank that waits for another gives up
    device    cpu, cuda, or auto: cuda where there is one

    Raises UserError where the ranks do not fit the sizes, or the device is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout = fit(world, replicate, shard, context)
    chosen = _device(device)
    if "RANK" not in os.environ:
        return Mesh(None, chosen)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    return Mesh(layout, chosen, timeout)


def fit(world: int, replicate: int, shard: int | None, context: int) -> Layout:
    """The layout of `world` ranks; raises UserError where they do not divide so."""
    if shard is None:
        shard = max(1, world // (replicate * context))
    layout = Layout(replicate, shard, context)
    if layout.world != world:
        raise UserError(
            f"{world} process{'es' * (world > 1)} do{'es' * (world == 1)} not fit parallel.replicate {replicate} x "
            f"parallel.shard {shard} x parallel.context {context} = {layout.world}: start {layout.world} processes, "
            "or change these sizes (parallel.shard=null takes all that remain)"
        )
    return layout


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("parallel.device is cuda, and there is no CUDA device: set parallel.device=cpu")
    device = torch.device("cuda", own_gpu())
    torch.cuda.set_device(device)
    return device
