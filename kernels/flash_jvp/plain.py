"""The Jacobian-vector product of attention in plain PyTorch: an oracle and a streaming form.

    S  = q kᵀ · scale                     P = softmax(S)          O  = P v
    tS = (tq kᵀ + q tkᵀ) · scale          H = P ∘ tS              tO = P tv + H v - rowsum(H) ∘ O

Shapes: `q_NSD` and the like, N = batch × heads folded, S = positions, D = channels. `None` is a zero tangent.
"""

import torch
from torch import Tensor

KV_BLOCK = 512


def math(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The formulas above, term by term, with the whole score matrix in memory: the oracle. Layout (..., S, D)."""
    p = torch.softmax(q @ k.mT * scale, dim=-1)
    o = p @ v
    to = torch.zeros_like(o)
    if tq is not None or tk is not None:
        ts = sum(a @ b.mT for a, b in ((tq, k), (q, tk)) if a is not None and b is not None) * scale
        h = p * ts
        to = to + h @ v - h.sum(dim=-1, keepdim=True) * o
    if tv is not None:
        to = to + p @ tv
    return o, to


def stream(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in memory linear in the number of positions, in at least float32. Layout (B, H, S, D)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_NSD, k_NSD, v_NSD = _fold(q, dtype), _fold(k, dtype), _fold(v, dtype)
    tq_NSD, tk_NSD, tv_NSD = (None if t is None else _fold(t, dtype) for t in (tq, tk, tv))
    attend = _one_block if k.shape[2] <= KV_BLOCK else _many_blocks
    o, to = attend(q_NSD, k_NSD, v_NSD, tq_NSD, tk_NSD, tv_NSD, scale)
    shape = (*q.shape[:3], v.shape[3])
    return o.view(shape).to(q.dtype), to.view(shape).to(q.dtype)


def _fold(x_BHSD: Tensor, dtype: torch.dtype) -> Tensor:
    return x_BHSD.to(dtype).reshape(-1, *x_BHSD.shape[2:])


def _scores(q: Tensor, k: Tensor, tq: Tensor | None, tk: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """S = q kᵀ · scale and tS = (tq kᵀ + q tkᵀ) · scale, the latter None where both tangents are."""
    ts = None
    nothing = q.new_empty(1, 1, 1)  # not read: beta = 0
    if tk is not None:
        ts = torch.baddbmm(nothing, q, tk.mT, beta=0, alpha=scale)
    if tq is not None:
        ts = torch.baddbmm(nothing if ts is None else ts, tq, k.mT, beta=0 if ts is None else 1, alpha=scale)
    return torch.baddbmm(nothing, q, k.mT, beta=0, alpha=scale), ts


def _one_block(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """All keys at once, in few operations: tO = P tv + tP v with tP = P ∘ (tS - rowsum(P ∘ tS))."""
    s, ts = _scores(q, k, tq, tk, scale)
    p = torch.softmax(s, dim=-1)
    o = torch.bmm(p, v)
    to = None if tv is None else torch.bmm(p, tv)
    if ts is not None:
        # The Jacobian of softmax is symmetric, so that its fused backward is its forward derivative as well.
        tp = torch._softmax_backward_data(ts, p, -1, p.dtype)
        to = torch.bmm(tp, v) if to is None else to.baddbmm_(tp, v)
    return o, torch.zeros_like(o) if to is None else to


def _many_blocks(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Blocks of keys with a running row maximum m (FlashAttention-2). Unnormalised sums, rescaled together as m grows:

    l = Σ P~     o~ = Σ P~ v     r = Σ H~     g~ = Σ (P~ tv + H~ v)        P~ = exp(S - m),  H~ = P~ ∘ tS
    O = o~ / l   tO = g~ / l - (r / l) ∘ O
    """
    m = q.new_full((*q.shape[:2], 1), -torch.inf)
    sum_p, sum_h = torch.zeros_like(m), torch.zeros_like(m)
    o = q.new_zeros(*q.shape[:2], v.shape[2])
    g = torch.zeros_like(o)
    for start in range(0, k.shape[1], KV_BLOCK):
        block = slice(start, start + KV_BLOCK)
        s, ts = _scores(q, k[:, block], tq, None if tk is None else tk[:, block], scale)
        m_old, m = m, torch.maximum(m, s.amax(dim=-1, keepdim=True))
        p = s.sub_(m).exp_()
        rescale = torch.exp(m_old - m)
        sum_p = sum_p * rescale + p.sum(dim=-1, keepdim=True)
        o = torch.baddbmm(o.mul_(rescale), p, v[:, block])
        g.mul_(rescale)
        if tv is not None:
            g.baddbmm_(p, tv[:, block])
        if ts is not None:
            h = ts.mul_(p)
            sum_h = sum_h * rescale + h.sum(dim=-1, keepdim=True)
            g.baddbmm_(h, v[:, block])
    o = o / sum_p
    return o, g / sum_p - sum_h / sum_p * o
