"""How fast attention with tangents is, against other ways to compute it; each output is checked in the same run.

    python kernels/benchmarks/speed.py --json speed.json

On a CUDA device: bfloat16 at the lengths of Wan2.1 and Cosmos-Predict2; flash_jvp against a straightforward Triton
kernel with three accumulators (baseline.py), `torch.func.jvp` of plain attention, and jvp-flash-attention where it is
installed; then the gradient kernels, the goals, and what a new length costs. Without: a small float32 selection (CPU).

Times are medians over many runs (CUDA events on a GPU), on random inputs and tangents that rotate where they would stay
in the L2 cache. A result counts only if 64 rows of each head, the first and last among them, agree with float64 within
‖x - ref‖ ≤ 2·‖naive - ref‖ + 4·eps·‖ref‖ (naive: plain attention in the same precision): else it is WRONG, without a
time. TFLOP/s: 12·B·H·Sq·Skv·D operations, 8· with zero tangents of keys and values, 14· for o and its gradients.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import flash_jvp
from benchmarks.accuracy import bound, excess, gradients, norms, plain, plain_jvp, random_inputs
from flash_jvp import library, operators
from flash_jvp import plain as plain_torch

ROWS = 64  # per head, compared with float64
Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    queries: int
    keys: int
    size: int
    tangents: str = "qkv"  # those that are not zero

    @property
    def operations(self) -> int:
        """Floating-point operations of o and to."""
        return (12 if self.tangents == "qkv" else 8) * self.heads * self.queries * self.keys * self.size

    def __str__(self) -> str:
        keys = f"->{self.keys}" if self.keys != self.queries else ""
        return f"{self.name} (1,{self.heads},{self.queries}{keys},{self.size})"


GPU_SHAPES = (
    Shape("Wan self", 12, 32_760, 32_760, 128),
    Shape("Wan self, 1 of 10 ranks", 4, 32_760, 32_760, 128),
    Shape("Cosmos 0.6B self", 20, 4_080, 4_080, 64),
    Shape("Cosmos 2B self", 16, 4_080, 4_080, 128),
    Shape("Wan cross, zero tk and tv", 12, 32_760, 512, 128, "q"),
    Shape("Wan cross, all tangents", 12, 32_760, 512, 128),
)
CPU_SHAPES = (
    Shape("self", 4, 512, 512, 64),
    Shape("long self", 2, 2_048, 2_048, 64),
    Shape("cross, zero tk and tv", 4, 2_048, 512, 64, "q"),
    Shape("cross, all tangents", 4, 2_048, 512, 64),
)
TINY_SHAPES = (Shape("self", 2, 65, 65, 16), Shape("cross, zero tk and tv", 2, 100, 40, 16, "q"))


class Unavailable(Exception):
    """Why a variant cannot run here."""


class Inputs:
    """Primals, tangents (None: zero) and a gradient of the output; that one only at `rows`, if they are given."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, seed: int, rows: Tensor | None = None) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        q_shape, kv_shape = ((1, shape.heads, length, shape.size) for length in (shape.queries, shape.keys))
        primals, tangents = random_inputs(q_shape, kv_shape, generator)
        self.primals = [x.to(dtype) for x in primals]
        self.tangents = [
            t.to(dtype) if name in shape.tangents else None for name, t in zip("qkv", tangents, strict=True)
        ]
        self.gradient = torch.randn(q_shape, generator=generator, device=device).to(dtype)
        if rows is not None:
            others = torch.ones(shape.queries, dtype=torch.bool, device=device)
            others[rows] = False
            self.gradient[:, :, others] = 0

    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.primals, *self.tangents) if x is not None)


# Variants: each takes inputs and returns o and to, or raises Unavailable with the reason.


def with_flash_jvp(inputs: Inputs, backend: str) -> Result:
    return flash_jvp.attention_jvp(*inputs.primals, *inputs.tangents, backend=backend)


def with_baseline(inputs: Inputs) -> Result:
    if not importlib.util.find_spec("triton"):
        raise Unavailable("triton is not installed")
    from benchmarks import baseline

    return baseline.attention_jvp(*inputs.primals, *inputs.tangents)


def with_torch_func(inputs: Inputs) -> Result:
    q, k, _ = inputs.primals
    needed = 6 * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()  # S, P, their tangents and temporaries
    if q.is_cuda and needed > torch.cuda.get_device_properties(q.device).total_memory:
        raise Unavailable(f"six score matrices of it would need {needed / 2**30:.0f} GiB")
    return plain_jvp(inputs.primals, inputs.tangents)


def with_jvp_flash_attention(inputs: Inputs) -> Result:
    """jvp-flash-attention of PyPI: equal lengths, all tangents, dual tensors."""
    if not importlib.util.find_spec("jvp_flash_attention"):
        raise Unavailable("jvp-flash-attention is not installed (pip install jvp-flash-attention)")
    q, k, _ = inputs.primals
    if q.shape != k.shape:
        raise Unavailable("jvp-flash-attention takes no queries and keys of different lengths")
    from jvp_flash_attention.jvp_attention import JVPAttn

    with forward_ad.dual_level():
        tangents = [
            torch.zeros_like(x) if t is None else t for x, t in zip(inputs.primals, inputs.tangents, strict=True)
        ]
        duals = map(forward_ad.make_dual, inputs.primals, tangents)
        return tuple(forward_ad.unpack_dual(JVPAttn.fwd_dual(*duals)))


VARIANTS: dict[str, Callable[[Inputs], Result]] = {
    "flash_jvp triton": partial(with_flash_jvp, backend="triton"),
    "three accumulators": with_baseline,
    "torch.func.jvp, math": with_torch_func,
    "jvp-flash-attention": with_jvp_flash_attention,
    "flash_jvp torch": partial(with_flash_jvp, backend="torch"),
    "flash_jvp math": partial(with_flash_jvp, backend="math"),
}
ON_GPU = tuple(VARIANTS)[:5]
ON_CPU = ("torch.func.jvp, math", "flash_jvp torch", "flash_jvp math")


def with_gradient(inputs: Inputs, name: str) -> tuple[Tensor, ...]:
    """o by the forward that flash_jvp takes by itself, and dq, dk, dv by the backward called `name`."""
    q, k, v = inputs.primals
    scale = q.shape[3] ** -0.5
    o, lse = operators.attention(q, k, v, scale, False, "auto")
    return backwards(inputs)[name](inputs.gradient, q, k, v, o, lse, scale, False)


def backwards(inputs: Inputs) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """The backward kernels that take such inputs, by name."""
    q, k, v = inputs.primals
    found: dict[str, Callable[..., tuple[Tensor, ...]]] = {**library.backwards(q, k, v, False)}
    found["torch"] = plain_torch.stream_backward
    if operators.own_backend(q, k, v, "auto") == "triton":
        from flash_jvp import fused

        found["triton"] = fused.backward
    return found


class Sample:
    """A few query rows of all heads, with their exact and naive results.

    The gradient of the output is zero elsewhere, so that these rows alone make dk and dv.
    """

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(shape.queries)
        chosen = {0, shape.queries - 1, *torch.randint(shape.queries, (ROWS,), generator=generator).tolist()}
        self.rows = torch.tensor(sorted(chosen), device=device)
        self.inputs = Inputs(shape, device, dtype, seed=1, rows=self.rows)
        (q, k, v), (tq, *t_others) = self.inputs.primals, self.inputs.tangents
        primals, tangents = [q[:, :, self.rows], k, v], [tq if tq is None else tq[:, :, self.rows], *t_others]
        go = self.inputs.gradient[:, :, self.rows]
        exact, t_exact = [x.double() for x in primals], [t if t is None else t.double() for t in tangents]
        self.answers = {  # exact and naive
            "jvp": (plain_jvp(exact, t_exact), plain_jvp(primals, tangents)),
            "gradient": (sampled_gradients(exact, go.double()), sampled_gradients(primals, go)),
        }

    def error(self, kind: str, results: Sequence[Tensor]) -> tuple[float, bool]:
        """The largest relative error of the results, and whether all are within their bounds."""
        finite = all(bool(x.isfinite().all()) for x in results)
        sampled = [x[:, :, self.rows] if kind == "jvp" or n == 0 else x for n, x in enumerate(results)]  # dk, dv: all
        errors = [(norms(x - y)[0] / norms(y)[0]).item() for x, y in zip(sampled, self.answers[kind][0], strict=True)]
        within = all(
            excess(x, exact, bound(exact, naive, torch.finfo(x.dtype).eps)) <= 1
            for x, exact, naive in zip(sampled, *self.answers[kind], strict=True)
        )
        return max(errors), finite and within


def sampled_gradients(primals: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    results = gradients(plain, primals, gradient, causal=False)
    return tuple(results[name] for name in ("dq", "dk", "dv"))


@dataclass
class Entry:
    """One way to compute one shape: its times in ms, a list a round, or why it has none."""

    shape: Shape
    variant: str
    kind: str  # "jvp", or "gradient" for a forward and a backward pass
    run: Callable[[Inputs], tuple[Tensor, ...]]
    rounds: list[list[float]] = field(default_factory=list)
    error: float | None = None
    note: str = ""

    @property
    def ms(self) -> float | None:
        return None if self.note else median(t for times in self.rounds for t in times)

    @property
    def operations(self) -> int:
        if self.kind == "gradient":
            return 14 * self.shape.heads * self.shape.queries * self.shape.keys * self.shape.size
        return self.shape.operations

    def check(self, sample: Sample) -> None:
        """Note whether the results on the sample's inputs are wrong; elements that are not written shall be NaN."""
        poison = [torch.full_like(x, math.nan) for x in sample.inputs.primals * 3]
        del poison
        self.error, right = sample.error(self.kind, self.run(sample.inputs))
        if not right:
            self.note = "WRONG"

    def time(self, sets: Sequence[Inputs], seconds: float) -> None:
        self.rounds.append(times(self.run, sets, seconds, sets[0].primals[0].is_cuda))

    def attempt(self, act: Callable[..., None], *arguments: Any) -> None:
        """Note why it cannot be measured, if so: one variant's failure is no reason to lose the others."""
        if self.note:
            return
        try:
            act(*arguments)
        except torch.OutOfMemoryError:
            self.note = "out of memory"
            torch.cuda.empty_cache()
        except (Unavailable, ValueError) as error:
            self.note = str(error)
        except Exception as error:
            self.note = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def times(run: Callable[[Any], Any], sets: Sequence[Any], seconds: float, cuda: bool) -> list[float]:
    """Milliseconds of each of many runs that fill about `seconds`, after a warm-up."""
    run(sets[0])  # may compile
    wait(cuda)
    began = time.perf_counter()
    for n in range(2):
        run(sets[n % len(sets)])
        wait(cuda)
    repeats = min(500, max(5, int(2 * seconds / (time.perf_counter() - began))))
    if not cuda:
        clock = [time.perf_counter()]
        for n in range(repeats):
            run(sets[n % len(sets)])
            clock.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(clock)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for n, (start, end) in enumerate(events):
        start.record()
        run(sets[n % len(sets)])
        end.record()
    wait(cuda)
    return [start.elapsed_time(end) for start, end in events]


def wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def measure(shape: Shape, variants: Sequence[str], device: str, dtype: torch.dtype, seconds: float) -> list[Entry]:
    """All variants of a shape, checked before and after, timed in two rounds that alternate between them."""
    sample = Sample(shape, device, dtype)
    entries = [Entry(shape, name, "jvp", VARIANTS[name]) for name in variants]
    if shape.tangents == "qkv":
        entries += [
            Entry(shape, f"forward + backward: {name}", "gradient", partial(with_gradient, name=name))
            for name in backwards(sample.inputs)
        ]
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    sets = [Inputs(shape, device, dtype, seed=2)]
    sets += [Inputs(shape, device, dtype, seed=3 + n) for n in range(min(7, 2 * cache // sets[0].bytes()))]
    for entry in entries:
        entry.attempt(entry.check, sample)
    for _ in range(2):
        for entry in entries:
            entry.attempt(entry.time, sets, seconds)
    for entry in entries:
        entry.attempt(entry.check, sample)
    return entries


def matmul_rate(size: int, device: str, dtype: torch.dtype, seconds: float) -> float:
    """TFLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / 1e9 / median(times(b.matmul, [a], seconds, a.is_cuda))


def first_results(lengths: Sequence[int]) -> dict[str, float]:
    """Seconds to the first result at lengths that were not seen before, the slowest, where the kernels are compiled."""
    seconds = {}
    for name in ("flash_jvp triton", "three accumulators"):
        spent = []
        for length in lengths:
            inputs = Inputs(Shape("new", 4, length, length, 128), "cuda", torch.bfloat16, seed=length)
            torch.cuda.synchronize()
            began = time.perf_counter()
            VARIANTS[name](inputs)
            torch.cuda.synchronize()
            spent.append(time.perf_counter() - began)
        seconds[name] = max(spent)
    return seconds


def goals(entries: Sequence[Entry], rate: float, new_length: dict[str, float]) -> list[dict[str, Any]]:
    """The goals for an H100 or H200: what was to be reached, and what was (None: not measured)."""
    ms = {(entry.shape.name, entry.variant): entry.ms for entry in entries}
    first, cross = GPU_SHAPES[0], GPU_SHAPES[4:]
    own, baseline = (ms.get((first.name, name)) for name in ("flash_jvp triton", "three accumulators"))
    zero, every = (ms.get((shape.name, "flash_jvp triton")) for shape in cross)
    wanted = (
        (f"time of the three-accumulator kernel, {first}", "at most", 0.67, ratio(own, baseline)),
        (f"bf16 matmul rate, {first}", "at least", 0.60, ratio(first.operations / 1e9, own and own * rate)),
        (f"time with all tangents, {cross[0]}", "at most", 0.60, ratio(zero, every)),
        ("seconds to the first result of a new length", "at most", 2.0, new_length.get("flash_jvp triton")),
    )
    return [
        {
            "goal": text,
            "bound": f"{bound} {limit}",
            "value": value,
            "reached": value and (value <= limit) == (bound == "at most"),
        }
        for text, bound, limit, value in wanted
    ]


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def environment(device: str) -> dict[str, str]:
    versions = {name: installed(name) for name in ("triton", "jvp-flash-attention", "flash-attn")}
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.partition(": ")[2] for line in cpu.read_text().splitlines() if line[:10] == "model name"]
        if cpu.exists()
        else []
    )
    card, driver = (names or [platform.machine()])[0], "none"
    if device == "cuda":
        card = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
    return {"device": card, "driver": driver, "cuda": str(torch.version.cuda), "torch": torch.__version__, **versions}


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def row(entry: Entry, rate: float, baseline: float | None) -> dict[str, Any]:
    ms = entry.ms
    speed = None if ms is None else entry.operations / ms / 1e9
    return {
        "shape": str(entry.shape),
        "variant": entry.variant,
        "ms": ms,
        "spread": ms and abs(median(entry.rounds[0]) - median(entry.rounds[1])) / ms,
        "runs": sum(map(len, entry.rounds)),
        "tflops": speed,
        "of_matmul": speed and speed / rate,
        "of_baseline": ratio(ms, baseline) if entry.kind == "jvp" else None,
        "error": entry.error,
        "note": entry.note,
    }


def table(rows: Sequence[dict[str, Any]]) -> None:
    shape = None
    for r in rows:
        if r["shape"] != shape:
            shape = r["shape"]
            print(f"\n{shape}")
            print(f"  {'variant':30} {'ms':>10} {'±':>5} {'TFLOP/s':>9} {'matmul':>7} {'baseline':>8} {'error':>8}")
        error = "" if r["error"] is None else f"{r['error']:8.1e}"
        if r["note"]:
            print(f"  {r['variant']:30} {r['note']}{error and ', error' + error}")
            continue
        baseline = "" if r["of_baseline"] is None else f"{r['of_baseline']:.3f}"
        print(
            f"  {r['variant']:30} {r['ms']:10.3f} {r['spread']:5.1%} {r['tflops']:9.3f} {r['of_matmul']:7.1%} "
            f"{baseline:>8} {error}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--quick", action="store_true", help="few runs of each; without a GPU also tiny shapes")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    shapes = GPU_SHAPES if cuda else TINY_SHAPES if options.quick else CPU_SHAPES
    names, baseline_name = (ON_GPU, "three accumulators") if cuda else (ON_CPU, "torch.func.jvp, math")
    seconds = (0.2 if cuda else 0.01) if options.quick else 1.0
    torch.set_float32_matmul_precision("highest")

    about = environment(device)
    print(*(f"{key} {value}" for key, value in about.items()), f"{torch.get_num_threads()} CPU thread(s)", sep=", ")
    if not cuda:
        print("CPU SELECTION: no CUDA device here. These figures are of this CPU; none of them speaks for a GPU.")
    size = 8192 if cuda else 256 if options.quick else 1024
    rate = matmul_rate(size, device, dtype, seconds)
    print(f"matmul {size}^3 in {str(dtype).removeprefix('torch.')}: {rate:.3g} TFLOP/s, the ceiling of this run")
    print("baseline:", baseline_name, "| ±: difference of two rounds | error: ‖x - ref‖ / ‖ref‖, the worst result")

    entries, rows = [], []
    for shape in shapes:
        measured = measure(shape, names, device, dtype, seconds)
        baseline = next(entry.ms for entry in measured if entry.variant == baseline_name)
        shown = [row(entry, rate, baseline) for entry in measured]
        table(shown)
        entries += measured
        rows += shown
    new_length = first_results((30_011, 28_672)) if cuda else {}
    wanted = goals(entries, rate, new_length)
    print("\nGoals (H100 or H200)")
    for goal in wanted:
        state = "not measured" if goal["reached"] is None else "reached" if goal["reached"] else "NOT reached"
        value = "" if goal["value"] is None else f": {goal['value']:.3f}"
        print(f"  {state}: {goal['bound']} of {goal['goal']}{value}")
    for name, spent in new_length.items():
        print(f"First result at a new length, {name}: {spent:.2f} s")
    if options.json:
        figures = {"environment": about, "device": device, "matmul_tflops": rate, "figures": rows, "goals": wanted}
        options.json.write_text(json.dumps(figures | {"first_result_s": new_length}, indent=1) + "\n")
    return any(entry.note == "WRONG" and entry.variant.startswith("flash_jvp") for entry in entries)


if __name__ == "__main__":
    sys.exit(main())
