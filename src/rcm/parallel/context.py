"""Context parallelism (Ulysses, arXiv 2309.14509): the ranks of a group hold slices of the tokens of the same samples.

All but attention works token by token. Around self-attention one all-to-all turns slices of the tokens with all heads
into all tokens with a slice of the heads, and one turns them back; tangents travel in the same message as their values.
Lengths that do not divide are padded with zeros that no query sees.

Every rank ends with the whole output, computes the whole loss, and sends back the gradient of its own tokens alone: the
sum of the parameters' gradients over the group is the gradient.

Letters: B samples, S tokens, s tokens of a rank, P ranks, N heads, D channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flash_jvp import attention
from rcm import dual
from rcm.artefact import UserError
from rcm.parallel.mesh import Mesh


def share_tokens(network: Any, mesh: Mesh) -> None:
    """Let `network` share its tokens over the context group of `mesh`; UserError where its heads do not divide."""
    check_heads(network.heads, mesh.layout.context)
    context = _Context(mesh.context_group, mesh.context_rank, mesh.layout.context)
    network.split, network.gather = context.split, context.gather
    for block in network.blocks:
        block.self_attn.attend = context.attend


def check_heads(heads: int, size: int) -> None:
    """Raise UserError where a group of `size` ranks cannot share so many heads."""
    if heads % size:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            f"parallel.context is {size}, which does not divide the network's {heads} heads; allowed: {fitting}"
        )


class _Context:
    def __init__(self, group: Any, rank: int, size: int):
        self.group, self.rank, self.size = group, rank, size
        self.length = 0  # tokens of the sample in work, without padding

    def split(self, x: Tensor, axis: int) -> Tensor:
        """The tokens of this rank, along `axis`."""
        self.length = x.shape[axis]
        here = -(-self.length // self.size)
        padding = here * self.size - self.length
        if padding:
            x = F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, padding))
        return x.narrow(axis, self.rank * here, here)

    def gather(self, x_BsD: Tensor, length: int) -> Tensor:
        """All `length` tokens on every rank."""
        (out,) = self._send(_Gather, [x_BsD])
        return out[:, :length]

    def attend(self, q_BNsD: Tensor, k_BNsD: Tensor, v_BNsD: Tensor) -> Tensor:
        """Attention over all tokens, with inputs and output of this rank's tokens and all heads."""
        whole = self._send(_Exchange, [q_BNsD, k_BNsD, v_BNsD], _HEADS, _TOKENS)
        out = attention(*(x[:, :, : self.length] for x in whole))
        padding = whole[0].shape[2] - self.length
        if padding:
            out = F.pad(out, (0, 0, 0, padding))
        (out,) = self._send(_Exchange, [out], _TOKENS, _HEADS)
        return out

    def _send(self, function: Any, tensors: list[Tensor], *options: int) -> list[Tensor]:
        """Apply to the tensors and their tangents in one message."""
        primals, tangents = zip(*map(dual.unpack, tensors), strict=True)
        present = [t.detach() for t in tangents if t is not None]
        done = function.apply(self.group, *options, *primals, *present)
        moved = iter(done[len(primals) :])
        return [
            dual.pack(x, None if t is None else next(moved).detach())
            for x, t in zip(done[: len(primals)], tangents, strict=True)
        ]


_HEADS, _TOKENS = 1, 2  # axes of (B, N, S, D)


class _Exchange(torch.autograd.Function):
    """All-to-all: each tensor is cut along one axis, a piece for every rank, and the pieces that arrive are joined
    along another. Cut by heads and joined by tokens, (B, N, s, D) becomes (B, N / P, S, D)."""

    @staticmethod
    def forward(ctx: Any, group: Any, cut: int, join: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.cut, ctx.join = group, cut, join
        ctx.set_materialize_grads(False)
        return _all_to_all(tensors, cut, join, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        given = iter(_all_to_all([g for g in gradients if g is not None], ctx.join, ctx.cut, ctx.group))
        return None, None, None, *(None if g is None else next(given) for g in gradients)


def _all_to_all(tensors: Sequence[Tensor], cut: int, join: int, group: Any) -> tuple[Tensor, ...]:
    """K tensors of one shape in one message."""
    size = dist.get_world_size(group)
    pieces = zip(*(x.chunk(size, dim=cut) for x in tensors), strict=True)
    sent = torch.stack([piece for of_rank in pieces for piece in of_rank])
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent, group=group)
    # tensors of their own: the tangent of a view would bring zeros for the whole message
    return tuple(torch.cat(arrived[k :: len(tensors)].unbind(), dim=join) for k in range(len(tensors)))


class _Gather(torch.autograd.Function):
    """(B, s, D) -> (B, S, D), each tensor; backwards, the slice of this rank."""

    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rank, ctx.size = dist.get_rank(group), dist.get_world_size(group)
        ctx.set_materialize_grads(False)
        sent = torch.stack(tensors)
        parts = [torch.empty_like(sent) for _ in range(ctx.size)]
        dist.all_gather(parts, sent, group=group)
        return tuple(torch.cat([part[k] for part in parts], dim=1) for k in range(len(tensors)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, *(None if g is None else g.chunk(ctx.size, dim=1)[ctx.rank] for g in gradients)
