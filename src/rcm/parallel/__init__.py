"""Many ranks, and less memory on each: applied from outside to a built network, which knows nothing of it.

Everything here changes speed and memory alone: losses, gradients and updated weights are those of one process.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from rcm.artefact import UserError
from rcm.parallel.context import share_tokens
from rcm.parallel.mesh import Layout, Mesh, start
from rcm.parallel.unit import COUNTER, RECOMPUTE, Counter, make_unit

__all__ = ["COUNTER", "RECOMPUTE", "Counter", "Layout", "Mesh", "parallelize", "round_weights", "start"]


def parallelize(
    network: nn.Module,
    mesh: Mesh,
    *,
    recompute: str = "none",
    precision: str | None = None,
    trainable: bool = True,
    offload: bool = False,
    compile: bool = False,
) -> None:
    """Share a network over the ranks of `mesh`, in place; the names in its state dict stay.

    A network on the meta device is materialised by `network.to_empty(device=mesh.device)` afterwards, sharded.

    Args:
        network: has `blocks`, `head`, `heads` and `precise` (see `rcm.networks.wan`), or holds one as `score`.
        recompute: what the backward pass computes again: none; blocks (whole ones); matmuls (all but products of
            matrices and attention; passes with tangents compute whole blocks again).
        precision: data type of the parameters in forward and backward passes, those named `precise` apart, which stay
            in float32; None: that of the parameters. Sharded ones of a trainable network, their gradients and what
            follows from them keep their own type (the master weights).
        trainable: False: no gradient will be asked for, and the parameters themselves are rounded.
        offload: keep the shards in host memory between passes.
        compile: compile the blocks with `torch.compile` (passes with tangents run as they are).

    Gradients are summed over ranks, so that a loss must be divided by the global batch. Raises UserError for heads that
    do not divide by the context, and for rounding without ranks.
    """
    if not trainable:
        network.requires_grad_(False)
    dtype = getattr(torch, precision) if precision else None
    if dtype and not trainable:
        round_weights(network, dtype)
    precise: Any = [getattr(network, name) for name in network.precise]
    for block in network.blocks:
        make_unit(block, recompute=recompute, share=1 / len(network.blocks), compile=compile)
    for module in (network.head, *precise, network):
        make_unit(module)
    if mesh.layout.context > 1:
        share_tokens(network, mesh)
    if mesh.group is None:
        if dtype and trainable and any(p.dtype != dtype for p in network.parameters()):
            raise UserError(
                f"parallel.precision={precision} keeps its master weights in FSDP, which needs ranks, be it one: start "
                "with `python -m rcm.launch --standalone --nproc-per-node 1 -m rcm distill ...`, or leave it at float32"
            )
        return
    _shard(network, mesh, [*network.blocks, network.head], precise, dtype if trainable else None, offload)


def _shard(
    network: nn.Module, mesh: Mesh, units: list[nn.Module], precise: list[nn.Module], dtype: Any, offload: bool
) -> None:
    """FSDP2 around each unit and around the rest; HSDP where the mesh has two dimensions."""
    keeping: Any = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy()
    options: Any = {"mesh": mesh.parameters(), "reshard_after_forward": True, "offload_policy": keeping}
    rounded = MixedPrecisionPolicy(dtype, _master(network), cast_forward_inputs=False)
    kept = MixedPrecisionPolicy(cast_forward_inputs=False)
    for module in precise:
        fully_shard(module, mp_policy=kept, **options)
    for module in (*units, network):  # the last one takes what remains
        fully_shard(module, mp_policy=rounded, **options)
    for module in (*precise, *units, network):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # sums are exact; gloo has no other


def _master(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def round_weights(network: Any, dtype: torch.dtype) -> None:
    """Cast all parameters but those of the modules named `precise`."""
    precise = {id(p) for name in network.precise for p in getattr(network, name).parameters()}
    for parameter in network.parameters():
        if id(parameter) not in precise:
            parameter.data = parameter.data.to(dtype)
