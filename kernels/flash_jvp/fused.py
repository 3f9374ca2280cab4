"""Attention of primals and tangents in Triton: one forward kernel, and the two kernels of the primal's backward.

    S  = q kᵀ · scale                     P = softmax(S)          O  = P v
    tS = (tq kᵀ + q tkᵀ) · scale          H = P ∘ tS              tO = P tv + H v - rowsum(H) ∘ O

Keys and values are streamed as in FlashAttention-2 (Dao, 2023): a running row maximum m, and sums that are rescaled as it
grows. `P~ tv` and `H~ v` are rescaled alike and only their sum is used, so one accumulator g holds both.

    l = Σ P~     o~ = Σ P~ v     r = Σ H~     g = Σ (P~ tv + H~ v)         P~ = exp(S - m),  H~ = P~ ∘ tS
    O = o~ / l   tO = g / l - (r / l) ∘ O     LSE = m + log l

Layout (B, H, S, D). Grid: one axis, query tiles fastest, so that all programs under way share the keys of few heads in L2.
Lengths and head counts are run-time arguments that are not specialised: a new length compiles nothing. Strides are
multiples of 16 and pointers 16-byte aligned, or the launcher copies, so there is one specialisation per kind of call.

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

INTERPRETED = bool(triton.knobs.runtime.interpret)  # decorated functions stay what they were at import
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIMS = (16, 32, 64, 128, 256)
LOG2E = tl.constexpr(1 / math.log(2))
LN2 = tl.constexpr(math.log(2))
COUNTS = ("queries", "keys", "heads", "group")


@triton.jit
def _rows(base, start, stride, length, D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows start ... start + BLOCK of a (length, D) matrix; rows beyond its end are zero. Offsets in a tile fit 32 bits."""
    row = tl.arange(0, BLOCK)[:, None]
    tile = base + tl.cast(start, tl.int64) * stride + (row * stride + tl.arange(0, D)[None, :])
    if MASKED:
        return tl.load(tile, mask=start + row < length, other=0.0)
    return tl.load(tile)


@triton.jit
def _store_rows(base, x, start, length, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)[:, None]
    tile = base + tl.cast(start, tl.int64) * D + (row * D + tl.arange(0, D)[None, :])
    tl.store(tile, x.to(base.dtype.element_ty), mask=start + row < length)


@triton.jit
def _stream(
    begin, end, q, tq, m, l, r, o, g, k, v, tk, tv, k_s, first, keys, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the keys begin ... end to the running sums of the query tile that starts at row `first`."""
    for start in tl.range(begin, end, BLOCK_N, num_stages=None):
        k_tile = _rows(k, start, k_s, keys, D, BLOCK_N, MASKED).trans()
        s = tl.dot(q, k_tile, input_precision="ieee")
        ts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if tq is not None:
            ts = tl.dot(tq, k_tile, ts, input_precision="ieee")
        if tk is not None:
            tk_tile = _rows(tk, start, k_s, keys, D, BLOCK_N, MASKED).trans()
            ts = tl.dot(q, tk_tile, ts, input_precision="ieee")
        if MASKED:  # scaled first: -inf · 0 is not a number
            key = start + tl.arange(0, BLOCK_N)[None, :]
            seen = key < keys
            if CAUSAL:
                seen = seen & (first + tl.arange(0, BLOCK_M)[:, None] >= key)
            s = tl.where(seen, s * (scale * LOG2E), float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
        else:
            m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))  # scale is not negative here
            p = tl.exp2(s * (scale * LOG2E) - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        m = m_new
        l = l * rescale + tl.sum(p, 1)
        v_tile = _rows(v, start, k_s, keys, D, BLOCK_N, MASKED)
        p_cast = p.to(v_tile.dtype)
        if tq is not None or tk is not None:
            h = p * (ts * scale)
            r = r * rescale + tl.sum(h, 1)
            h_cast = h.to(v_tile.dtype)
        o = o * rescale[:, None]
        g = g * rescale[:, None]
        o = tl.dot(p_cast, v_tile, o, input_precision="ieee")
        if tv is not None:
            tv_tile = _rows(tv, start, k_s, keys, D, BLOCK_N, MASKED)
            g = tl.dot(p_cast, tv_tile, g, input_precision="ieee")
        if tq is not None or tk is not None:
            g = tl.dot(h_cast, v_tile, g, input_precision="ieee")
    return m, l, r, o, g


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    q, k, v, tq, tk, tv, o, to, lse,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int32, k_b: tl.int64, k_h: tl.int64, k_s: tl.int32,
    queries, keys, heads, group, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all its keys. Tangents that are None are neither read nor multiplied."""
    tiles = tl.cdiv(queries, BLOCK_M)
    head = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_M
    if CAUSAL:  # the longest rows first, so that the last programs to finish are short
        first = (tiles - 1) * BLOCK_M - first
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)

    q_tile = _rows(q + b * q_b + h * q_h, first, q_s, queries, D, BLOCK_M, True)
    q_tile = tl.where(scale < 0, -q_tile, q_tile)  # from here on the scale is not negative
    tq_tile = None
    if tq is not None:
        tq_tile = _rows(tq + b * q_b + h * q_h, first, q_s, queries, D, BLOCK_M, True)
        tq_tile = tl.where(scale < 0, -tq_tile, tq_tile)
    kv = b * k_b + h // group * k_h
    k += kv
    v += kv
    if tk is not None:
        tk += kv
    if tv is not None:
        tv += kv

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    r_i = tl.zeros([BLOCK_M], tl.float32)
    o_i = tl.zeros([BLOCK_M, D], tl.float32)
    g_i = tl.zeros([BLOCK_M, D], tl.float32)
    full = keys // BLOCK_N * BLOCK_N
    end = keys
    if CAUSAL:
        full = tl.minimum(full, (first + 1) // BLOCK_N * BLOCK_N)
        end = tl.minimum(keys, first + BLOCK_M)
    m_i, l_i, r_i, o_i, g_i = _stream(
        0, full, q_tile, tq_tile, m_i, l_i, r_i, o_i, g_i, k, v, tk, tv, k_s, first, keys,
        tl.abs(scale), CAUSAL, False, D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    m_i, l_i, r_i, o_i, g_i = _stream(
        full, end, q_tile, tq_tile, m_i, l_i, r_i, o_i, g_i, k, v, tk, tv, k_s, first, keys,
        tl.abs(scale), CAUSAL, True, D, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    o_i = o_i / l_i[:, None]
    out = head.to(tl.int64) * queries
    _store_rows(o + out * D, o_i, first, queries, D, BLOCK_M)
    if to is not None:
        _store_rows(to + out * D, g_i / l_i[:, None] - (r_i / l_i)[:, None] * o_i, first, queries, D, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M)
    tl.store(lse + out + row, (m_i + tl.log2(l_i)) * LN2, mask=row < queries)


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
    """(o, to, lse) of tensors that `refusal` takes: o, to (B, Hq, Sq, D) in q's dtype, lse (B, Hq, Sq) in float32.

    None is a zero tangent and costs nothing; `to` is None when all three are.
    """
    q, tq = _alike(q, tq)
    k, v, tk, tv = _alike(k, v, tk, tv)
    (b, heads, queries, d), (kv_heads, keys) = q.shape, k.shape[1:3]
    o = q.new_empty(q.shape)
    to = None if tq is None and tk is None and tv is None else q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    streamed = 0 if to is None else 1 if tk is None and tv is None else 2
    with _device(q):
        tile = tuning.tile("forward", q, keys, streamed)
        _forward[(triton.cdiv(queries, tile.block_m) * b * heads,)](
            q, k, v, tq, tk, tv, o, to, lse,
            *_strides(q), *_strides(k), queries, keys, heads, heads // kv_heads, float(scale),
            CAUSAL=causal, D=d, **tile.options(),
        )  # fmt: skip
    return o, to, lse


@triton.jit(do_not_specialize=COUNTS)
def _backward_queries(
    go, q, k, v, o, lse, delta, dq,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int32, k_b: tl.int64, k_h: tl.int64, k_s: tl.int32,
    queries, keys, heads, group, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, and delta = rowsum(dO ∘ O), which the kernel below reads."""
    tiles = tl.cdiv(queries, BLOCK_M)
    head = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_M
    if CAUSAL:
        first = (tiles - 1) * BLOCK_M - first
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    out = head.to(tl.int64) * queries
    row = first + tl.arange(0, BLOCK_M)
    q_tile = _rows(q + b * q_b + h * q_h, first, q_s, queries, D, BLOCK_M, True)
    go_tile = _rows(go + out * D, first, D, queries, D, BLOCK_M, True)
    o_tile = _rows(o + out * D, first, D, queries, D, BLOCK_M, True)
    delta_i = tl.sum(go_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + out + row, delta_i, mask=row < queries)
    lse_i = tl.load(lse + out + row, mask=row < queries, other=0.0) * LOG2E
    k += b * k_b + h // group * k_h
    v += b * k_b + h // group * k_h

    dq_i = tl.zeros([BLOCK_M, D], tl.float32)
    full = keys // BLOCK_N * BLOCK_N
    end = keys
    if CAUSAL:
        full = tl.minimum(full, (first + 1) // BLOCK_N * BLOCK_N)
        end = tl.minimum(keys, first + BLOCK_M)
    dq_i = _stream_keys(
        0,
        full,
        q_tile,
        go_tile,
        lse_i,
        delta_i,
        dq_i,
        k,
        v,
        k_s,
        first,
        keys,
        scale,
        CAUSAL,
        False,
        D,
        BLOCK_M,
        BLOCK_N,
    )
    dq_i = _stream_keys(
        full,
        end,
        q_tile,
        go_tile,
        lse_i,
        delta_i,
        dq_i,
        k,
        v,
        k_s,
        first,
        keys,
        scale,
        CAUSAL,
        True,
        D,
        BLOCK_M,
        BLOCK_N,
    )
    _store_rows(dq + out * D, dq_i * scale, first, queries, D, BLOCK_M)


@triton.jit
def _stream_keys(
    begin, end, q, go, lse, delta, dq, k, v, k_s, first, keys, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, end, BLOCK_N):
        k_tile = _rows(k, start, k_s, keys, D, BLOCK_N, MASKED)
        v_tile = _rows(v, start, k_s, keys, D, BLOCK_N, MASKED)
        s = tl.dot(q, k_tile.trans(), input_precision="ieee")
        dp = tl.dot(go, v_tile.trans(), input_precision="ieee")
        p = tl.exp2(s * (scale * LOG2E) - lse[:, None])
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)[None, :]
            seen = key < keys
            if CAUSAL:
                seen = seen & (first + tl.arange(0, BLOCK_M)[:, None] >= key)
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=COUNTS)
def _backward_keys(
    go, q, k, v, lse, delta, dk, dv,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int32, k_b: tl.int64, k_h: tl.int64, k_s: tl.int32,
    queries, keys, heads, group, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over the query heads that share them in a fixed order."""
    tiles = tl.cdiv(keys, BLOCK_N)
    head_kv = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_N
    heads_kv = heads // group
    b = (head_kv // heads_kv).to(tl.int64)
    h_kv = head_kv % heads_kv
    k_tile = _rows(k + b * k_b + h_kv.to(tl.int64) * k_h, first, k_s, keys, D, BLOCK_N, True)
    v_tile = _rows(v + b * k_b + h_kv.to(tl.int64) * k_h, first, k_s, keys, D, BLOCK_N, True)
    dk_i = tl.zeros([BLOCK_N, D], tl.float32)
    dv_i = tl.zeros([BLOCK_N, D], tl.float32)
    begin = 0
    free = 0  # the queries from here on see all keys of the tile
    if CAUSAL:
        begin = first // BLOCK_M * BLOCK_M
        free = tl.minimum(tl.cdiv(first + BLOCK_N - 1, BLOCK_M) * BLOCK_M, queries)
    for h in tl.range(h_kv * group, (h_kv + 1) * group):
        out = b * heads * queries + tl.cast(h, tl.int64) * queries
        q_h_base = q + b * q_b + tl.cast(h, tl.int64) * q_h
        if CAUSAL:
            dk_i, dv_i = _stream_queries(
                begin, free, k_tile, v_tile, dk_i, dv_i, go + out * D, q_h_base, lse + out, delta + out, q_s, first,
                queries, scale, True, D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        dk_i, dv_i = _stream_queries(
            free, queries, k_tile, v_tile, dk_i, dv_i, go + out * D, q_h_base, lse + out, delta + out, q_s, first,
            queries, scale, False, D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    out_kv = head_kv.to(tl.int64) * keys
    _store_rows(dk + out_kv * D, dk_i * scale, first, keys, D, BLOCK_N)
    _store_rows(dv + out_kv * D, dv_i, first, keys, D, BLOCK_N)


@triton.jit
def _stream_queries(
    begin, end, k, v, dk, dv, go, q, lse, delta, q_s, first, queries, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q_tile = _rows(q, start, q_s, queries, D, BLOCK_M, True)
        go_tile = _rows(go, start, D, queries, D, BLOCK_M, True)
        lse_i = tl.load(lse + row, mask=row < queries, other=float("inf")) * LOG2E  # beyond the last query P is zero
        delta_i = tl.load(delta + row, mask=row < queries, other=0.0)
        p = tl.exp2(tl.dot(k, q_tile.trans(), input_precision="ieee") * (scale * LOG2E) - lse_i[None, :])
        if MASKED:
            p = tl.where(row[None, :] >= first + tl.arange(0, BLOCK_N)[:, None], p, 0.0)
        dp = tl.dot(v, go_tile.trans(), input_precision="ieee")
        dv = tl.dot(p.to(go_tile.dtype), go_tile, dv, input_precision="ieee")
        ds = p * (dp - delta_i[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


def backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, of the gradient `go` of `o` alone; `o` and `lse` are those of `forward`. Deterministic."""
    (q,), (k, v) = _alike(q), _alike(k, v)
    go, o, lse = map(_packed, (go, o, lse))
    (b, heads, queries, d), (kv_heads, keys) = q.shape, k.shape[1:3]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    sizes = (*_strides(q), *_strides(k), queries, keys, heads, heads // kv_heads, float(scale), causal, d)
    with _device(q):
        tile = tuning.tile("backward_queries", q, keys, 0)
        _backward_queries[(triton.cdiv(queries, tile.block_m) * b * heads,)](
            go, q, k, v, o, lse, delta, dq, *sizes, **tile.options()
        )
        tile = tuning.tile("backward_keys", q, keys, 0)
        _backward_keys[(triton.cdiv(keys, tile.block_n) * b * kv_heads,)](
            go, q, k, v, lse, delta, dk, dv, *sizes, **tile.options()
        )
    return dq, dk, dv


def _device(x: Tensor) -> Any:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, head and row; that of an axis of size 1 means nothing and is 0."""
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape[:3], x.stride(), strict=False))


def _alike(*given: Tensor | None) -> list[Any]:
    """The tensors in one layout: as they are if they share a loadable one, else contiguous (one layout saves registers)."""
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
    """Why the kernels cannot take these primals, as a sentence, or None: they can."""
    given = {"q": q, "k": k, "v": v}
    for name, x in given.items():
        if x.ndim != 4:
            return f"{name} has shape {tuple(x.shape)}: the fused kernel takes (B, H, S, D)"
        if x.numel() == 0:
            return f"{name} has shape {tuple(x.shape)}: the fused kernel takes no empty tensors"
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}: the fused kernel takes float16, bfloat16 and float32"
        if x.dtype != q.dtype or x.device != q.device:
            return (
                f"q is {q.dtype} on {q.device}, {name} is {x.dtype} on {x.device}: the fused kernel takes one of each"
            )
        if x.shape[3] not in DIMS or x.shape[3] != q.shape[3]:
            sizes = ", ".join(map(str, DIMS))
            return f"D is {q.shape[3]} in q and {x.shape[3]} in {name}: the fused kernel takes one D of {sizes}"
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in given.values())
        return f"q, k, v are {shapes}: expected (B, Hq, Sq, D) and twice (B, Hkv, Skv, D) with Hq a multiple of Hkv"
    return _device_refusal(q)


def _device_refusal(q: Tensor) -> str | None:
    if INTERPRETED:
        # The interpreter's dot multiplies the bit patterns of bfloat16 (Triton 3.7.1).
        wrong = q.dtype == torch.bfloat16
        return "q is torch.bfloat16: Triton's interpreter multiplies float16 and float32 only" if wrong else None
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"q is on {q.device}: the fused kernel runs on NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(q.device)
    if major < 8:
        return f"{q.device} has compute capability {major}.{minor}: the fused kernel needs 8.0 or newer"
    return None
