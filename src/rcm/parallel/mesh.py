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
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rcm.artefact import UserError


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

    def __init__(self, layout: Layout | None, device: torch.device):
        self.device = device
        self.group = dist.group.WORLD if layout else None
        self.layout = layout or Layout()
        self.rank = dist.get_rank() if layout else 0
        self.world = self.layout.world
        self.is_main = self.rank == 0
        self.data_size = self.layout.data_size
        self.data_rank, self.context_rank = divmod(self.rank, self.layout.context)
        if layout:
            sizes = self.data_size, layout.context
            work = init_device_mesh(device.type, sizes, mesh_dim_names=("data", "context"))
            self.data_group, self.context_group = work.get_group("data"), work.get_group("context")

    @cached_property
    def parameters(self) -> DeviceMesh:
        """The mesh that parameters live on: one-dimensional for FSDP, two-dimensional for HSDP."""
        sharing = self.layout.shard * self.layout.context
        if self.layout.replicate == 1:
            return init_device_mesh(self.device.type, (sharing,), mesh_dim_names=("shard",))
        sizes = self.layout.replicate, sharing
        return init_device_mesh(self.device.type, sizes, mesh_dim_names=("replicate", "shard"))

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the groups that share the batch out, a new tensor; x itself where there is one group."""
        if self.data_size == 1:
            return x
        summed = x.detach().clone().to(self.device)
        dist.all_reduce(summed, group=self.data_group)
        return summed

    def broadcast_object(self, value: Any) -> Any:
        """What rank 0 has, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier()

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
    return Mesh(layout, chosen)


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
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
