"""Attention, its Jacobian-vector product and its gradient in plain PyTorch: an oracle and a streaming form.

    S  = q kᵀ · scale                     P = softmax(S)          O  = P v
    tS = (tq kᵀ + q tkᵀ) · scale          H = P ∘ tS              tO = P tv + H v - rowsum(H) ∘ O

`forward` of every backend takes q, k, v and their tangents (`None`: zero) of layout (B, H, S, D) and returns O, tO
(`None` where all tangents are) and the log-sum-exp of the rows of S, (B, H, Sq) in `lse_dtype`. Hq may be a multiple of
Hkv. `causal` masks keys after the query. Inside, q_NRD is (B·Hkv, Hq/Hkv·Sq, D): the query heads of one key head are
more rows, and k_NSD is (B·Hkv, Skv, D).
"""

import torch
from torch import Tensor

KV_BLOCK = 512

Result = tuple[Tensor, Tensor | None, Tensor]


def math(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float, causal: bool
) -> Result:
    """The formulas above, term by term, with the whole score matrix in memory: the oracle.

    Elementary differentiable operations only, so that any transform of PyTorch passes through it.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    tk, tv = (None if x is None else x.repeat_interleave(group, dim=1) for x in (tk, tv))
    s = _seen(q @ k.mT * scale, causal, -torch.inf)
    p = torch.softmax(s, dim=-1)
    o, lse = p @ v, torch.logsumexp(s.to(lse_dtype(q)), dim=-1)
    if tq is None and tk is None and tv is None:
        return o, None, lse
    to = torch.zeros_like(o)
    if tq is not None or tk is not None:
        products = [a @ b.mT for a, b in ((tq, k), (q, tk)) if a is not None and b is not None]
        h = p * _seen(sum(products[1:], products[0]) * scale, causal, 0.0)
        to = h @ v - h.sum(dim=-1, keepdim=True) * o
    if tv is not None:
        to = to + p @ tv
    return o, to, lse


def stream(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float, causal: bool
) -> Result:
    """The same in memory linear in the number of positions, in at least float32."""
    seen = keys_seen(q, k, causal)
    attend = _one_block if seen <= KV_BLOCK else _many_blocks
    k, v = k[:, :, :seen], v[:, :, :seen]
    tk, tv = (None if x is None else x[:, :, :seen] for x in (tk, tv))
    q_NRD, k_NSD, v_NSD = (_fold(x, k) for x in (q, k, v))
    tq_NRD, tk_NSD, tv_NSD = (None if x is None else _fold(x, k) for x in (tq, tk, tv))
    o, to, lse = attend(q_NRD, k_NSD, v_NSD, tq_NRD, tk_NSD, tv_NSD, scale, q.shape[2] if causal else 0)
    shape = (*q.shape[:3], v.shape[3])
    lse = lse.view(q.shape[:3]).to(lse_dtype(q))
    return o.view(shape).to(q.dtype), None if to is None else to.view(shape).to(q.dtype), lse


def math_backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of O, with the whole score matrix.

    dv = Pᵀ dO,   dP = dO vᵀ,   dS = P ∘ (dP - rowsum(P ∘ dP)),   dq = dS k · scale,   dk = dSᵀ q · scale
    """
    group = q.shape[1] // k.shape[1]
    k_BHSD, v_BHSD = (x.repeat_interleave(group, dim=1) for x in (k, v))
    p = torch.softmax(_seen(q @ k_BHSD.mT * scale, causal, -torch.inf), dim=-1)
    dp = go @ v_BHSD.mT
    ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True))
    dk, dv = (x.unflatten(1, (-1, group)).sum(dim=2) for x in (ds.mT @ q * scale, p.mT @ go))
    return ds @ k_BHSD * scale, dk, dv


def stream_backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, block by block: P is computed again from S and its log-sum-exp, and rowsum(P ∘ dP) = rowsum(dO ∘ O).

    Keys are taken from their mean: rows of S move as a whole, and what P does not depend on is not rounded with it.
    """
    go_NRD, q_NRD, o_NRD = (_fold(x, k) for x in (go, q, o))
    k_NSD, v_NSD = _fold(k, k), _fold(v, k)
    mean_N1D = k_NSD.mean(dim=1, keepdim=True)
    k_NSD = k_NSD - mean_N1D
    wide = lse_dtype(q)
    lse_NR1 = lse.reshape(*q_NRD.shape[:2], 1) - q_NRD.to(wide) @ mean_N1D.to(wide).mT * scale
    coarse = lse_NR1.to(q_NRD.dtype)
    fine = (lse_NR1 - coarse).to(q_NRD.dtype)  # S - coarse is exact where P counts: no rounding at the size of S
    delta = (go_NRD * o_NRD).sum(dim=-1, keepdim=True)
    dq, dk, dv = torch.zeros_like(q_NRD), torch.zeros_like(k_NSD), torch.zeros_like(v_NSD)
    seen = keys_seen(q, k, causal)
    for start in range(0, seen, KV_BLOCK):
        block = slice(start, min(start + KV_BLOCK, seen))
        s, _ = _scores(q_NRD, k_NSD[:, block], None, None, scale)
        _mask(s, None, start, q.shape[2] if causal else 0)
        ds = torch.bmm(go_NRD, v_NSD[:, block].mT)
        if seen <= KV_BLOCK:  # the whole row is here: its sums are exact, as if nothing were computed again
            p = torch.softmax(s, dim=-1)
            ds = torch._softmax_backward_data(ds, p, -1, p.dtype)
        else:
            p = s.sub_(coarse).sub_(fine).exp_()
            ds.sub_(delta).mul_(p)
        dv[:, block] = torch.bmm(p.mT, go_NRD)
        dq.baddbmm_(ds, k_NSD[:, block], alpha=scale)
        dk[:, block] = torch.bmm(ds.mT, q_NRD).mul_(scale)
    return dq.view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


def _seen(s: Tensor, causal: bool, other: float) -> Tensor:
    """Scores (or their tangent), and another value where the key comes after the query."""
    return s.masked_fill(_after(s.shape[-2], s.shape[-1], s.device), other) if causal else s


def lse_dtype(q: Tensor) -> torch.dtype:
    """Of the log-sum-exp: its rounding is a relative error of every P of the row, so finer than the inputs."""
    return torch.float32 if q.dtype.itemsize == 2 or q.device.type == "mps" else torch.float64  # MPS has no float64


def keys_seen(q: Tensor, k: Tensor, causal: bool) -> int:
    """Keys that any query sees."""
    return min(k.shape[2], q.shape[2]) if causal else k.shape[2]


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fold(x_BHSD: Tensor, k_BHSD: Tensor) -> Tensor:
    """(B·Hkv, rows, D): the heads that share a key head lie one after the other."""
    heads = k_BHSD.shape[0] * k_BHSD.shape[1]
    return x_BHSD.to(_at_least_float32(x_BHSD)).reshape(heads, -1, x_BHSD.shape[3])


def _after(rows: int, keys: int, device: torch.device, start: int = 0, queries: int | None = None) -> Tensor:
    """Where key start + j comes after the query of row i, which is i modulo `queries`."""
    query = torch.arange(rows, device=device) % (queries or rows)
    return torch.arange(start, start + keys, device=device) > query[:, None]


def _mask(s_NRS: Tensor, ts_NRS: Tensor | None, start: int, causal_queries: int) -> None:
    """Fill the scores of keys after their query, in place; `causal_queries` is 0 where nothing is masked."""
    if causal_queries:
        after = _after(s_NRS.shape[1], s_NRS.shape[2], s_NRS.device, start, causal_queries)
        s_NRS.masked_fill_(after, -torch.inf)
        if ts_NRS is not None:
            ts_NRS.masked_fill_(after, 0.0)


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
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float, causal: int
) -> Result:
    """All keys at once, in few operations: tO = P tv + tP v with tP = P ∘ (tS - rowsum(P ∘ tS))."""
    s, ts = _scores(q, k, tq, tk, scale)
    _mask(s, ts, 0, causal)
    p = torch.softmax(s, dim=-1)
    wide = lse_dtype(q)
    lse = s.amax(dim=-1).to(wide) - p.amax(dim=-1).to(wide).log()  # the largest of a row is at least 1/S
    o = torch.bmm(p, v)
    to = None if tv is None else torch.bmm(p, tv)
    if ts is not None:
        # The Jacobian of softmax is symmetric, so that its fused backward is its forward derivative as well.
        tp = torch._softmax_backward_data(ts, p, -1, p.dtype)
        to = torch.bmm(tp, v) if to is None else to.baddbmm_(tp, v)
    return o, to, lse


def _many_blocks(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float, causal: int
) -> Result:
    """Blocks of keys with a running row maximum m (FlashAttention-2). Unnormalised sums, rescaled together as m grows:

    l = Σ P~     o~ = Σ P~ v     r = Σ H~     g~ = Σ (P~ tv + H~ v)        P~ = exp(S - m),  H~ = P~ ∘ tS
    O = o~ / l   tO = g~ / l - (r / l) ∘ O    LSE = m + log l
    """
    m = q.new_full((*q.shape[:2], 1), -torch.inf)
    sum_p, sum_h = torch.zeros_like(m), torch.zeros_like(m)
    center = None  # about the mean of tS in each row, which tO does not depend on, but the rounding of H~ does
    o = q.new_zeros(*q.shape[:2], v.shape[2])
    g = None if tq is None and tk is None and tv is None else torch.zeros_like(o)
    for start in range(0, k.shape[1], KV_BLOCK):
        block = slice(start, start + KV_BLOCK)
        s, ts = _scores(q, k[:, block], tq, None if tk is None else tk[:, block], scale)
        _mask(s, ts, start, causal)
        m_old, m = m, torch.maximum(m, s.amax(dim=-1, keepdim=True))
        p = s.sub_(m).exp_()
        rescale = torch.exp(m_old - m)
        sum_p = sum_p * rescale + p.sum(dim=-1, keepdim=True)
        o = torch.baddbmm(o.mul_(rescale), p, v[:, block])
        if g is None:
            continue
        g.mul_(rescale)
        if tv is not None:
            g.baddbmm_(p, tv[:, block])
        if ts is not None:
            if center is None:  # of the first keys; under a causal mask of the one that all queries see
                center = ts[:, :, : 1 if causal else 16].mean(dim=-1, keepdim=True)
            h = ts.sub_(center).mul_(p)
            sum_h = sum_h * rescale + h.sum(dim=-1, keepdim=True)
            g.baddbmm_(h, v[:, block])
    o = o / sum_p
    return (
        o,
        None if g is None else g / sum_p - sum_h / sum_p * o,
        (m.to(lse_dtype(q)) + sum_p.to(lse_dtype(q)).log()).squeeze(-1),
    )
