"""The part of a tensor that this rank holds: a DTensor's own shard, and the whole of a plain tensor.

What works element by element (an optimiser, an average) works on these parts, on any number of ranks alike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part here, sharing memory with the tensor, without a graph."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The tensor, shared over ranks as `like` is, whose part here is `part`, in the same memory."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements of all tensors, over all ranks."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def count_nonfinite(tensors: Sequence[Tensor]) -> int:
    """How many elements are not finite, over all ranks."""
    counts = [(~tensor.isfinite()).sum() for tensor in tensors]
    return sum(int((c.full_tensor() if isinstance(c, DTensor) else c).item()) for c in counts)
