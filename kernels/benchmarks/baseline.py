"""The straightforward Triton kernel that the benchmark compares with: FlashAttention-2 with tangents carried along.

One product a line of the formulas, and so three accumulators, o~ = Σ P~ v, a~ = Σ P~ tv and b~ = Σ H~ v; every tile is
masked; the lengths are compile-time constants, so that each new one compiles and tunes anew; zero tangents are tensors.

    python kernels/benchmarks/baseline.py    # what the compiler makes of its tiles for an H100, without one (D = 128)
"""

import os
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILES = ((128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3))  # rows, keys, warps, stages
CONFIGS = [triton.Config({"ROWS": m, "COLUMNS": n}, num_warps=w, num_stages=s) for m, n, w, s in TILES]


@triton.autotune(CONFIGS[-1:] if INTERPRETED else CONFIGS, key=["QUERIES", "KEYS", "SIZE"])
@triton.jit
def _kernel(
    q,
    k,
    v,
    tq,
    tk,
    tv,
    o,
    to,
    scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, SIZE)
    at_q = head * QUERIES * SIZE + row[:, None] * SIZE + channel[None, :]
    in_q = row[:, None] < QUERIES
    q_tile = tl.load(q + at_q, in_q, other=0.0)
    tq_tile = tl.load(tq + at_q, in_q, other=0.0)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    sum_p = tl.zeros([ROWS], tl.float32)
    sum_h = tl.zeros([ROWS], tl.float32)
    acc_pv = tl.zeros([ROWS, SIZE], tl.float32)
    acc_ptv = tl.zeros([ROWS, SIZE], tl.float32)
    acc_hv = tl.zeros([ROWS, SIZE], tl.float32)
    for start in range(0, KEYS, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at_k = head * KEYS * SIZE + column[:, None] * SIZE + channel[None, :]
        in_k = column[:, None] < KEYS
        k_tile = tl.load(k + at_k, in_k, other=0.0)
        tk_tile = tl.load(tk + at_k, in_k, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * 1.4426950408889634)
        s = tl.where(column[None, :] < KEYS, s, float("-inf"))
        ts = tl.dot(tq_tile, tl.trans(k_tile), input_precision="ieee") * scale
        ts += tl.dot(q_tile, tl.trans(tk_tile), input_precision="ieee") * scale
        m_new = tl.maximum(m, tl.max(s, 1))
        rescale = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        h = p * ts
        sum_p = sum_p * rescale + tl.sum(p, 1)
        sum_h = sum_h * rescale + tl.sum(h, 1)
        v_tile = tl.load(v + at_k, in_k, other=0.0)
        tv_tile = tl.load(tv + at_k, in_k, other=0.0)
        p = p.to(v_tile.dtype)
        acc_pv = acc_pv * rescale[:, None] + tl.dot(p, v_tile, input_precision="ieee")
        acc_ptv = acc_ptv * rescale[:, None] + tl.dot(p, tv_tile, input_precision="ieee")
        acc_hv = acc_hv * rescale[:, None] + tl.dot(h.to(v_tile.dtype), v_tile, input_precision="ieee")
        m = m_new
    out = acc_pv / sum_p[:, None]
    t_out = (acc_ptv + acc_hv) / sum_p[:, None] - (sum_h / sum_p)[:, None] * out
    tl.store(o + at_q, out.to(o.dtype.element_ty), in_q)
    tl.store(to + at_q, t_out.to(to.dtype.element_ty), in_q)


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None = None, tk: Tensor | None = None, tv: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ/√D) v of (B, H, S, D) tensors and its derivative along the tangents; D a power of two from 16."""
    tangents = (torch.zeros_like(x) if t is None else t for x, t in ((q, tq), (k, tk), (v, tv)))
    tensors = [x.contiguous() for x in (q, k, v, *tangents)]
    o, to = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
    batch, heads, queries, size = q.shape

    def blocks(tile: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(queries, tile["ROWS"]), batch * heads

    _kernel[blocks](*tensors, o, to, size**-0.5, QUERIES=queries, KEYS=k.shape[2], SIZE=size)
    return o, to


def compile_for_hopper() -> None:
    """Print registers, stack and shared memory of every tile at 32,760 tokens, D = 128, bfloat16."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from flash_jvp import compiled

    tensors = [torch.empty(1, 1, 256, 128, dtype=torch.bfloat16)] * 8
    print("sm_90, bfloat16, D = 128\nM×N, warps, stages  registers  stack  shared KiB")
    for config in CONFIGS:
        machine = compiled.Machine(90)
        triton.runtime.driver.set_active(machine)
        _kernel.fn[(1, 1)](*tensors, 1.0, QUERIES=32_760, KEYS=32_760, SIZE=128, **config.all_kwargs())
        figures = compiled.read(*machine.kernels[0])
        tile = f"{config.kwargs['ROWS']}×{config.kwargs['COLUMNS']}, {config.num_warps}, {config.num_stages}"
        print(f"{tile:<20}{figures.registers:>9}{figures.stack:>7}{figures.shared / 1024:>12.1f}", flush=True)


if __name__ == "__main__":
    compile_for_hopper()
