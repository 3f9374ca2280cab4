"""Forward-mode differentiation by dual tensors: a value and its derivative along one direction, in one pass.

Dual tensors are ordinary tensors, so they pass through any `nn.Module` unchanged, sharded or recomputed ones included.
"""

from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor


@torch.no_grad()
def jvp(
    fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """fn(*primals) and its derivative along `tangents` (`None`: zero), neither with a graph.

    The derivative is zero where the output does not depend on a primal that has a tangent. Calls do not nest.
    """
    with forward_ad.dual_level():
        duals = [x if tx is None else forward_ad.make_dual(x, tx) for x, tx in zip(primals, tangents, strict=True)]
        out, tangent = forward_ad.unpack_dual(fn(*duals))
    return out, torch.zeros_like(out) if tangent is None else tangent
