# mypy: disable-error-code="no-untyped-def"
"""Attention of primals and tangents in Triton: one forward kernel, and the two kernels of the primal's backward.

    S  = q kᵀ · scale                     P = softmax(S)          O  = P v
    tS = (tq kᵀ + q tkᵀ) · scale          H = P ∘ tS              tO = P tv + H v - rowsum(H) ∘ O

Keys and values are streamed as in FlashAttention-2 (Dao, 2023): a running row maximum m, and sums that are rescaled as
it grows. `P~ tv` and `H~ v` are rescaled alike and only their sum is used, so one accumulator g holds both.

    l = Σ P~     o~ = Σ P~ v     r = Σ H~     g = Σ (P~ tv + H~ v)         P~ = exp(S - m),  H~ = P~ ∘ tS
    O = o~ / l   tO = g / l - (r / l) ∘ O     LSE = m + log l

tO does not change where a row of tS moves as a whole, so H~ is taken with tS - c, c about its mean: what the two terms
of tO have in common, such as the tangent of a shift of all keys, is not rounded and not subtracted.

Layout (B, H, S, D). The grid has one axis, query tiles fastest: the programs under way share the keys of few heads in
L2. Lengths and head counts are not specialised, so a new length compiles nothing; strides are multiples of 16 and
pointers of 16 bytes, or the launcher copies. WIDE: a head spans 2³¹ elements (offsets of 32 bits save registers).

float16: H~ is cast before its product as in any half-precision attention, so |tS| beyond 65504 overflows to Inf.
"""

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_jvp import tuning
from flash_jvp.plain import lse_dtype
from flash_jvp.tuning import DIMS

INTERPRETED = bool(triton.knobs.runtime.interpret)  # decorated functions stay what they were at import
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(1 / math.log(2))
LN2 = tl.constexpr(math.log(2))
COUNTS = ("queries", "keys", "heads", "group")


@triton.jit
def _load(base, start, stride, length, D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows start ... start + BLOCK of a (length, D) matrix, zero beyond its end. Offsets have the width of `start`."""
    row = tl.arange(0, BLOCK)[:, None]
    tile = base + start * stride + (row * stride + tl.arange(0, D)[None, :])
    if MASKED:
        return tl.load(tile, mask=start + row < length, other=0.0)
    return tl.load(tile)


@triton.jit
def _store(base, x, start, length, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)[:, None]
    tile = base + start.to(tl.int64) * D + (row * D + tl.arange(0, D)[None, :])
    tl.store(tile, x.to(base.dtype.element_ty), mask=start + row < length)


@triton.jit
def _seen(first, start, keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of the keys from `start` exist, and are not in the future of the queries from `first`."""
    key = start + tl.arange(0, BLOCK_N)[None, :]
    seen = key < keys
    if CAUSAL:
        seen = seen & (key <= first + tl.arange(0, BLOCK_M)[:, None])
    return seen


@triton.jit
def _query_tile(queries, heads, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """(batch × head, batch, head, first row) of this program."""
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if CAUSAL:  # the longest rows first, so that the last programs to finish are short
        tile = tiles - 1 - tile
    both = (tl.program_id(0) // tiles).to(tl.int64)
    return both, both // heads, both % heads, tile * BLOCK_M


@triton.jit
def _key_range(first, keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(full, end): tiles of keys before `full` need no mask, those from `end` on are not seen."""
    full = keys
    end = keys
    if CAUSAL:
        full = tl.minimum(keys, first + 1)
        end = tl.minimum(keys, first + BLOCK_M)
    return full // BLOCK_N * BLOCK_N, end


@triton.jit
def _first_mean(base, stride, keys, D: tl.constexpr):
    """The mean of the first 16 rows, or of all if there are fewer."""
    return tl.sum(_load(base, 0, stride, keys, D, 16, True).to(tl.float32), 0) / tl.minimum(keys, 16)


@triton.jit
def _add_keys(
    begin, end, q, tq, center, m, sum_p, sum_h, o, g, k, v, tk, tv, k_s, first, keys, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the keys begin ... end to the running sums of the queries from `first`. The scale is not negative."""
    for i in tl.range(begin, end, BLOCK_N, disable_licm=True):  # offsets computed again, not kept: registers are scarce
        start = tl.cast(i, tl.int64) if WIDE else i
        k_tile = _load(k, start, k_s, keys, D, BLOCK_N, MASKED).trans()
        s = tl.dot(q, k_tile, input_precision="ieee")
        ts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if tq is not None:
            ts = tl.dot(tq, k_tile, ts, input_precision="ieee")
        if tk is not None:
            tk_tile = _load(tk, start, k_s, keys, D, BLOCK_N, MASKED).trans()
            ts = tl.dot(q, tk_tile, ts, input_precision="ieee")
        if MASKED:  # scaled first: -inf · 0 is not a number
            s = tl.where(_seen(first, start, keys, CAUSAL, BLOCK_M, BLOCK_N), s * (scale * LOG2E), float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
        else:
            m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))
            p = tl.exp2(s * (scale * LOG2E) - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        m = m_new
        sum_p = sum_p * rescale + tl.sum(p, 1)
        v_tile = _load(v, start, k_s, keys, D, BLOCK_N, MASKED)
        p_cast = p.to(v_tile.dtype)
        o = o * rescale[:, None]
        g = g * rescale[:, None]
        o = tl.dot(p_cast, v_tile, o, input_precision="ieee")
        if tq is not None or tk is not None:
            h = p * (ts * scale - center[:, None])
            if MASKED and CAUSAL:  # also where a key that is not seen is not finite
                h = tl.where(_seen(first, start, keys, CAUSAL, BLOCK_M, BLOCK_N), h, 0.0)
            sum_h = sum_h * rescale + tl.sum(h, 1)
            g = tl.dot(h.to(v_tile.dtype), v_tile, g, input_precision="ieee")
        if tv is not None:
            tv_tile = _load(tv, start, k_s, keys, D, BLOCK_N, MASKED)
            g = tl.dot(p_cast, tv_tile, g, input_precision="ieee")
    return m, sum_p, sum_h, o, g


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    q, k, v, tq, tk, tv, o, to, lse,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int32, k_b: tl.int64, k_h: tl.int64, k_s: tl.int32,
    queries, keys, heads, group, scale,
    D: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all its keys. Tangents that are None are neither read nor multiplied."""
    both, b, h, first = _query_tile(queries, heads, CAUSAL, BLOCK_M)
    q += b * q_b + h * q_h
    q_tile = _load(q, first.to(tl.int64), q_s, queries, D, BLOCK_M, True)
    tq_tile = None
    if tq is not None:
        tq += b * q_b + h * q_h
        tq_tile = _load(tq, first.to(tl.int64), q_s, queries, D, BLOCK_M, True)
    shared = b * k_b + h // group * k_h
    k += shared
    v += shared
    if tk is not None:
        tk += shared
    if tv is not None:
        tv += shared

    center = tl.zeros([BLOCK_M], tl.float32)  # about the mean of tS in each row, which tO does not depend on
    known = tl.minimum(keys, first + 1) if CAUSAL else keys  # those that all queries of the tile see
    if tq is not None:
        center += tl.sum(tl.cast(tq_tile, tl.float32) * _first_mean(k, k_s, known, D)[None, :], 1) * scale
    if tk is not None:
        center += tl.sum(q_tile.to(tl.float32) * _first_mean(tk, k_s, known, D)[None, :], 1) * scale
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    r_i = tl.zeros([BLOCK_M], tl.float32)
    o_i = tl.zeros([BLOCK_M, D], tl.float32)
    g_i = tl.zeros([BLOCK_M, D], tl.float32)
    full, end = _key_range(first, keys, CAUSAL, BLOCK_M, BLOCK_N)
    m_i, l_i, r_i, o_i, g_i = _add_keys(
        0, full, q_tile, tq_tile, center, m_i, l_i, r_i, o_i, g_i, k, v, tk, tv, k_s, first, keys, scale,
        False, CAUSAL, WIDE, D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    m_i, l_i, r_i, o_i, g_i = _add_keys(
        full, end, q_tile, tq_tile, center, m_i, l_i, r_i, o_i, g_i, k, v, tk, tv, k_s, first, keys, scale,
        True, CAUSAL, WIDE, D, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    o_i = o_i / l_i[:, None]
    _store(o + both * queries * D, o_i, first, queries, D, BLOCK_M)
    if to is not None:
        g_i = g_i / l_i[:, None] - (r_i / l_i)[:, None] * o_i
        _store(to + both * queries * D, g_i, first, queries, D, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M)
    wide = lse.dtype.element_ty
    tl.store(lse + both * queries + row, (m_i.to(wide) + tl.log2(l_i.to(wide))) * LN2, mask=row < queries)


@triton.jit
def _probabilities(s, lse, scale):
    """exp(scale · s - lse). The wide log-sum-exp of float32 inputs is taken off in two parts, each nearly exactly."""
    lse2 = lse * LOG2E
    coarse = lse2.to(tl.float32)
    exponent = s * (scale * LOG2E) - coarse
    if lse.dtype == tl.float64:
        exponent -= (lse2 - coarse).to(tl.float32)
    return tl.exp2(exponent)


@triton.jit
def _add_to_dq(
    begin, end, q, go, lse, delta, dq, k, v, k_s, first, keys, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq += (P ∘ (go vᵀ - delta)) k over the keys begin ... end."""
    for i in tl.range(begin, end, BLOCK_N):
        start = tl.cast(i, tl.int64) if WIDE else i
        k_tile = _load(k, start, k_s, keys, D, BLOCK_N, MASKED)
        v_tile = _load(v, start, k_s, keys, D, BLOCK_N, MASKED)
        s = tl.dot(q, k_tile.trans(), input_precision="ieee")
        dp = tl.dot(go, v_tile.trans(), input_precision="ieee")
        p = _probabilities(s, lse[:, None], scale)
        if MASKED:
            p = tl.where(_seen(first, start, keys, CAUSAL, BLOCK_M, BLOCK_N), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=COUNTS)
def _backward_queries(
    go, q, k, v, o, lse, delta, dq,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int32, k_b: tl.int64, k_h: tl.int64, k_s: tl.int32,
    queries, keys, heads, group, scale,
    D: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, and delta = rowsum(go ∘ o), which the kernel below reads."""
    both, b, h, first = _query_tile(queries, heads, CAUSAL, BLOCK_M)
    q_tile = _load(q + b * q_b + h * q_h, first.to(tl.int64), q_s, queries, D, BLOCK_M, True)
    go_tile = _load(go + both * queries * D, first.to(tl.int64), D, queries, D, BLOCK_M, True)
    o_tile = _load(o + both * queries * D, first.to(tl.int64), D, queries, D, BLOCK_M, True)
    row = first + tl.arange(0, BLOCK_M)
    delta_i = tl.sum(go_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + both * queries + row, delta_i, mask=row < queries)
    lse_i = tl.load(lse + both * queries + row, mask=row < queries, other=0.0)
    k += b * k_b + h // group * k_h
    v += b * k_b + h // group * k_h

    dq_i = tl.zeros([BLOCK_M, D], tl.float32)
    full, end = _key_range(first, keys, CAUSAL, BLOCK_M, BLOCK_N)
    dq_i = _add_to_dq(
        0, full, q_tile, go_tile, lse_i, delta_i, dq_i, k, v, k_s, first, keys, scale,
        False, CAUSAL, WIDE, D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dq_i = _add_to_dq(
        full, end, q_tile, go_tile, lse_i, delta_i, dq_i, k, v, k_s, first, keys, scale,
        True, CAUSAL, WIDE, D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    _store(dq + both * queries * D, dq_i * scale, first, queries, D, BLOCK_M)


@triton.jit
def _add_queries(
    begin, end, k, v, dk, dv, q, go, lse, delta, q_s, first, queries, scale,
    CAUSAL: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dv += Pᵀ go and dk += (P ∘ (go vᵀ - delta))ᵀ q over the queries begin ... end; all tiles are transposed."""
    for i in tl.range(begin, end, BLOCK_M):
        start = tl.cast(i, tl.int64) if WIDE else i
        row = start + tl.arange(0, BLOCK_M)
        q_tile = _load(q, start, q_s, queries, D, BLOCK_M, True)
        go_tile = _load(go, start, D, queries, D, BLOCK_M, True)
        lse_i = tl.load(lse + row, mask=row < queries, other=1e30)  # P is zero beyond the last query
        delta_i = tl.load(delta + row, mask=row < queries, other=0.0)
        s = tl.dot(k, q_tile.trans(), input_precision="ieee")
        p = _probabilities(s, lse_i[None, :], scale)
        if CAUSAL:
            p = tl.where(row[None, :] >= first + tl.arange(0, BLOCK_N)[:, None], p, 0.0)
        dp = tl.dot(v, go_tile.trans(), input_precision="ieee")
        dv = tl.dot(p.to(go_tile.dtype), go_tile, dv, input_precision="ieee")
        ds = p * (dp - delta_i[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def _backward_keys(
    go, q, k, v, lse, delta, dk, dv,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int32, k_b: tl.int64, k_h: tl.int64, k_s: tl.int32,
    queries, keys, heads, group, scale,
    D: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over the query heads that share them in a fixed order."""
    tiles = tl.cdiv(keys, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    both = (tl.program_id(0) // tiles).to(tl.int64)  # batch × head of keys; its query heads are neighbours
    b = both // (heads // group)
    h = both % (heads // group)
    k_tile = _load(k + b * k_b + h * k_h, first.to(tl.int64), k_s, keys, D, BLOCK_N, True)
    v_tile = _load(v + b * k_b + h * k_h, first.to(tl.int64), k_s, keys, D, BLOCK_N, True)
    dk_i = tl.zeros([BLOCK_N, D], tl.float32)
    dv_i = tl.zeros([BLOCK_N, D], tl.float32)
    begin = 0
    if CAUSAL:  # the queries before `begin` see no key of this tile, those from `free` on see all
        begin = first // BLOCK_M * BLOCK_M
        free = tl.minimum(tl.cdiv(first + BLOCK_N - 1, BLOCK_M) * BLOCK_M, queries)
    for i in tl.range(0, group):
        q_i = q + b * q_b + (h * group + i) * q_h
        out = (both * group + i) * queries
        if CAUSAL:
            dk_i, dv_i = _add_queries(
                begin, free, k_tile, v_tile, dk_i, dv_i, q_i, go + out * D, lse + out, delta + out, q_s, first,
                queries, scale, True, WIDE, D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        dk_i, dv_i = _add_queries(
            free if CAUSAL else 0, queries, k_tile, v_tile, dk_i, dv_i, q_i, go + out * D, lse + out, delta + out, q_s,
            first, queries, scale, False, WIDE, D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    _store(dk + both * keys * D, dk_i * scale, first, keys, D, BLOCK_N)
    _store(dv + both * keys * D, dv_i, first, keys, D, BLOCK_N)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(o, to, lse) of tensors that `refusal` takes: o, to (B, Hq, Sq, D) in q's dtype, lse (B, Hq, Sq) in `lse_dtype`.

    None is a zero tangent and costs nothing; `to` is None when all three are.
    """
    if scale < 0:  # the kernel takes the largest of the unscaled scores for the row maximum
        q, tq, scale = -q, None if tq is None else -tq, -scale
    q, tq = _alike(q, tq)
    k, v, tk, tv = _alike(k, v, tk, tv)
    o = q.new_empty(q.shape)
    to = None if tq is None and tk is None and tv is None else q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q))
    kind = "forward" if to is None else "forward_tq" if tk is None and tv is None else "forward_jvp"
    with _device(q):
        tile = tuning.tile(kind, q, k)
        _forward[(triton.cdiv(q.shape[2], tile.block_m) * q.shape[0] * q.shape[1],)](
            q, k, v, tq, tk, tv, o, to, lse, *_sizes(q, k, scale, causal), **tile.options()
        )
    return o, to, lse


def backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, for the gradient `go` of o alone; o and lse are those of `forward`. Deterministic."""
    (q,), (k, v) = _alike(q), _alike(k, v)
    go, o, lse = (_packed(x) for x in (go, o, lse))
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = q.new_empty(q.shape[:3], dtype=torch.float32)
    with _device(q):
        tile = tuning.tile("backward_queries", q, k)
        _backward_queries[(triton.cdiv(q.shape[2], tile.block_m) * q.shape[0] * q.shape[1],)](
            go, q, k, v, o, lse, delta, dq, *_sizes(q, k, scale, causal), **tile.options()
        )
        tile = tuning.tile("backward_keys", q, k)
        _backward_keys[(triton.cdiv(k.shape[2], tile.block_n) * k.shape[0] * k.shape[1],)](
            go, q, k, v, lse, delta, dk, dv, *_sizes(q, k, scale, causal), **tile.options()
        )
    return dq, dk, dv


def _sizes(q: Tensor, k: Tensor, scale: float, causal: bool) -> tuple[int | float | bool, ...]:
    """The arguments that all kernels share, from the strides to CAUSAL."""
    (heads, queries, d), (heads_kv, keys) = q.shape[1:], k.shape[1:3]
    q_strides, k_strides = _strides(q), _strides(k)
    wide = max((queries + 256) * max(q_strides[2], d), (keys + 256) * max(k_strides[2], d)) >= 1 << 31
    return (*q_strides, *k_strides, queries, keys, heads, heads // heads_kv, float(scale), d, wide, causal)


def _device(x: Tensor) -> Any:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, head and row; that of an axis of size 1 means nothing and is 0."""
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape[:3], x.stride(), strict=False))


def _alike(*given: Tensor | None) -> list[Any]:
    """The tensors in one layout, which saves registers: as they are if they share a loadable one, else contiguous."""
    present = [x for x in given if x is not None]
    if all(map(_loadable, present)) and len({_strides(x) for x in present}) == 1:
        return list(given)
    return [None if x is None else _packed(x) for x in given]


def _loadable(x: Tensor) -> bool:
    """Whether rows load in pieces of 16 bytes, with offsets within a tile that fit 32 bits."""
    strides = _strides(x)
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and not any(n % 16 for n in strides) and strides[2] < 1 << 22


def _packed(x: Tensor) -> Tensor:
    """x, or a contiguous copy of it at an address that is a multiple of 16 bytes."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take primals of fitting shapes, dtypes and devices, as a sentence, or None: they can."""
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}: the fused kernel takes float16, bfloat16 and float32"
    for name, x in {"q": q, "v": v}.items():
        if x.shape[3] not in DIMS or x.shape[3] != q.shape[3]:
            return f"D is {x.shape[3]} in {name}: the fused kernel takes one D of {', '.join(map(str, DIMS))} for all"
    if INTERPRETED and isinstance(tl.sum, triton.JITFunction):
        return "TRITON_INTERPRET was set after Triton was imported: half of Triton is interpreted, set it before"
    if INTERPRETED and q.device.type in ("cpu", "cuda"):
        # Its dot multiplies the bit patterns of bfloat16 (Triton 3.7.1).
        wrong = q.dtype == torch.bfloat16
        return "q is torch.bfloat16: Triton's interpreter multiplies float16 and float32 only" if wrong else None
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"q is on {q.device}: the fused kernel runs on NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(q.device)
    if major < 8:
        return f"{q.device} has compute capability {major}.{minor}: the fused kernel needs 8.0 or newer"
    return None
