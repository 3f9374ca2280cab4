"""Many ranks, and less memory on each: applied from outside to a built network, which knows nothing of it.

Everything here changes speed and memory alone: losses, gradients and updated weights are those of one process.
"""

import warnings
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from rcm.artefact import UserError
from rcm.parallel.context import share_tokens
from rcm.parallel.mesh import Layout, Mesh, start
from rcm.parallel.unit import COUNTER, RECOMPUTE, Counter, constant_weights, make_unit

# what a layer returns may be a view, and nothing here writes into one
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")

_ONE_RANK = (
    "which needs ranks, be it one: start with `python -m rcm.launch --standalone --nproc-per-node 1 -m rcm distill ...`"
)

__all__ = [
    "COUNTER",
    "RECOMPUTE",
    "Counter",
    "Layout",
    "Mesh",
    "constant_weights",
    "parallelize",
    "round_weights",
    "start",
]


def parallelize(
    network: Any,
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
        network: has `blocks`, `head`, `heads` and `precise` (see `rcm.networks.wan`); or holds such a one as `score`,
            and as `branch` what reads its features (see `rcm.networks.discriminator`).
        recompute: what the backward pass computes again: none; blocks (whole ones); matmuls (all but products of
            matrices and attention; passes with tangents compute whole blocks again).
        precision: data type of the parameters in forward and backward passes, those named `precise` apart, which stay
            in float32; None: that of the parameters. Sharded ones of a trainable network, their gradients and what
            follows from them keep their own type (the master weights).
        trainable: False: no gradient will be asked for, and the parameters themselves are rounded.
        offload: keep the shards in host memory between passes.
        compile: compile the blocks with `torch.compile` (passes with tangents run as they are).

    Gradients are summed over ranks, so that a loss must be divided by the global batch. Raises UserError for heads that
    do not divide by the context, and for what does not go together.
    """
    if compile and recompute == "matmuls":
        raise UserError(
            "parallel.compile=true hides the products that parallel.recompute=matmuls keeps: set recompute to blocks "
            "or none, or compile to false"
        )
    if offload and mesh.group is None:
        raise UserError(f"parallel.offload_teacher is the work of FSDP, {_ONE_RANK}, or set it to false")
    if hasattr(network, "branch"):
        options: Any = {"recompute": recompute, "precision": precision, "offload": offload, "compile": compile}
        parallelize(network.score, mesh, **options)
        if mesh.group is not None:  # each rank of a context group reads all tokens, and has all of the gradient
            _fsdp([network.branch], mesh, dtype=_dtype(precision), offload=offload, divide=mesh.layout.context)
        return
    if not trainable:
        network.requires_grad_(False)
    dtype = _dtype(precision)
    if dtype and not trainable:
        round_weights(network, dtype)
    precise = [getattr(network, name) for name in network.precise]
    for block in network.blocks:
        make_unit(block, recompute=recompute, share=1 / len(network.blocks), compile=compile)
    for module in (network.head, *precise, network):
        make_unit(module)
    if mesh.layout.context > 1:
        share_tokens(network, mesh)
    if mesh.group is None:
        if dtype and trainable and any(p.dtype != dtype for p in network.parameters()):
            raise UserError(f"parallel.precision={precision} keeps master weights in FSDP, {_ONE_RANK}, or set float32")
        return
    _fsdp(precise, mesh, dtype=None, offload=offload)
    # the last one takes what remains
    _fsdp([*network.blocks, network.head, network], mesh, dtype=dtype if trainable else None, offload=offload)


def _fsdp(modules: list[Any], mesh: Mesh, *, dtype: torch.dtype | None, offload: bool, divide: float = 1.0) -> None:
    """FSDP2 around each module (HSDP where the mesh has two axes); gradients are summed, and divided by `divide`."""
    keeping: Any = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy()
    for module in modules:
        master = next(module.parameters()).dtype
        fully_shard(
            module,
            mesh=mesh.parameters,
            reshard_after_forward=True,  # of the root too, whose weights may change before its next call
            mp_policy=MixedPrecisionPolicy(dtype, master, cast_forward_inputs=False),
            offload_policy=keeping,
        )
        module.set_gradient_divide_factor(divide)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _dtype(precision: str | None) -> torch.dtype | None:
    return getattr(torch, precision) if precision else None


def round_weights(network: Any, dtype: torch.dtype) -> None:
    """Cast all parameters but those of the modules named `precise`."""
    precise = {id(p) for name in network.precise for p in getattr(network, name).parameters()}
    for parameter in network.parameters():
        if id(parameter) not in precise:
            parameter.data = parameter.data.to(dtype)
