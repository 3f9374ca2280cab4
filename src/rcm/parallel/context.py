"""Context parallelism (Ulysses, arXiv 2309.14509): the ranks of a group hold slices of the tokens of the same samples.

All but attention works token by token. Around self-attention one all-to-all turns slices of the tokens with all heads
into all tokens with a slice of the heads, and one turns them back; tangents travel in the same message as their values.
Lengths that do not divide are padded with zeros that no query sees.

Every rank ends with the whole output, computes the whole loss, and sends back the gradient of its own tokens alone: the
sum of the parameters' gradients over the group is the gradient.

Letters: K tensors in one message, B samples, S tokens, s tokens of a rank, P ranks, N heads, D channels.
"""

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
    size = mesh.layout.context
    if network.heads % size:
        fitting = ", ".join(str(n) for n in range(1, network.heads + 1) if network.heads % n == 0)
        raise UserError(
            f"parallel.context is {size}, which does not divide the network's {network.heads} heads; allowed: {fitting}"
        )
    context = _Context(mesh.context_group, mesh.context_rank, size)
    network.split, network.gather = context.split, context.gather
    for block in network.blocks:
        block.self_attn.attend = context.attend


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
        (out,) = self._exchange(_Gather, [x_BsD])
        return out[:, :length]

    def attend(self, q_BNsD: Tensor, k_BNsD: Tensor, v_BNsD: Tensor) -> Tensor:
        """Attention over all tokens, with inputs and output of this rank's tokens and all heads."""
        whole = self._exchange(_ToHeads, [q_BNsD, k_BNsD, v_BNsD])
        out = attention(*(x[:, :, : self.length] for x in whole))
        padding = whole[0].shape[2] - self.length
        if padding:
            out = F.pad(out, (0, 0, 0, padding))
        (out,) = self._exchange(_ToTokens, [out])
        return out

    def _exchange(self, function: Any, tensors: list[Tensor]) -> list[Tensor]:
        """Apply to K tensors and their tangents in one message."""
        primals, tangents = zip(*map(dual.unpack, tensors), strict=True)
        present = [t for t in tangents if t is not None]
        done = list(function.apply(torch.stack([*primals, *(t.detach() for t in present)]), self.group).unbind())
        moved = iter(done[len(primals) :])
        return [
            dual.pack(x, None if t is None else next(moved).detach())
            for x, t in zip(done[: len(primals)], tangents, strict=True)
        ]


def _all_to_all(x: Tensor, cut: int, join: int, group: Any) -> Tensor:
    """Cut axis `cut` into a piece for every rank, and join the pieces that arrive along axis `join`."""
    size = dist.get_world_size(group)
    sent = torch.stack(x.chunk(size, dim=cut))
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent, group=group)
    return torch.cat(arrived.unbind(), dim=join)


_HEADS, _TOKENS = 2, 3  # axes of (K, B, N, S, D)


class _ToHeads(torch.autograd.Function):
    """(K, B, N, s, D) -> (K, B, N / P, S, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_to_all(x, _HEADS, _TOKENS, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _all_to_all(gradient, _TOKENS, _HEADS, ctx.group), None


class _ToTokens(torch.autograd.Function):
    """(K, B, N / P, S, D) -> (K, B, N, s, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_to_all(x, _TOKENS, _HEADS, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _all_to_all(gradient, _HEADS, _TOKENS, ctx.group), None


class _Gather(torch.autograd.Function):
    """(K, B, s, D) -> (K, B, S, D); backwards, the slice of this rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.rank, ctx.size = dist.get_rank(group), dist.get_world_size(group)
        parts = [torch.empty_like(x) for _ in range(ctx.size)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.chunk(ctx.size, dim=2)[ctx.rank], None
