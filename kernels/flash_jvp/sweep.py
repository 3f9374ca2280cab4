"""Measure tiles and backward kernels on the GPU at hand: `python -m flash_jvp.sweep`.

Without a mask, whatever the calls will have: the tiles of a card serve both. Every candidate's output is checked.
"""

import argparse
import contextlib
import functools
import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_jvp.tuning import Tile, cache_file, cache_key, forced, save, shipped


@dataclass(frozen=True)
class Shape:
    """Self-attention, or cross-attention with zero context tangents where the lengths differ."""

    batch: int
    heads: int
    queries: int
    keys: int
    d: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From "B,H,S,D" or "B,H,Sq,Skv,D"."""
        numbers = [int(x) for x in text.split(",")]
        if len(numbers) not in (4, 5) or min(numbers) < 1:
            raise ValueError(text)
        return cls(*numbers[:3], *numbers[-2:])

    def __str__(self) -> str:
        return ",".join(map(str, astuple(self)))


SHAPES = ("1,12,32760,128", "1,4,32760,128", "1,12,32760,512,128", "1,20,4080,64", "1,16,4080,128")


def candidates(kernel: str, usual: Tile) -> list[Tile]:
    """What the sweep tries, the shipped tile first; one that does not fit the card is passed over."""
    sides = (16, 32, 64, 128)
    own = 1 if kernel == "backward_keys" else 0  # the side that a program keeps
    blocks = [x for x in itertools.product(sides, sides) if x[own] >= 32 and 1 << 11 <= x[0] * x[1] <= 1 << 14]
    tiles = [Tile(m, n, warps, stages) for m, n in blocks for warps in (4, 8) for stages in (2, 3, 4)]
    return [usual, *(tile for tile in tiles if tile != usual)]


def _sample(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(shape.queries,), (shape.keys,), (shape.keys,)] * 2
    return [
        torch.randn(shape.batch, shape.heads, *n, shape.d, device=device, generator=generator).to(dtype) for n in sizes
    ]


def _rows_in_float64(
    q: Tensor, k: Tensor, v: Tensor, tangents: list[Tensor | None], scale: float
) -> tuple[Tensor, ...]:
    """(o, to) of the given queries, plainly, in float64."""
    tq, tk, tv = (torch.zeros_like(x) if t is None else t for x, t in zip((q, k, v), tangents, strict=True))
    return torch.func.jvp(
        lambda q, k, v: torch.softmax(q @ k.mT * scale, -1) @ v,
        tuple(x.double() for x in (q, k, v)),
        tuple(x.double() for x in (tq, tk, tv)),
    )


def _runs(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Callable[[], object], Callable[[], float]]]:
    """For each kernel that the shape needs: a call of it, and the error of that call's output relative to another's."""
    from flash_jvp import fused

    q, k, v, tq, tk, tv = _sample(shape, dtype, device)
    scale = shape.d**-0.5
    context = (tk, tv) if shape.queries == shape.keys else (None, None)
    rows = torch.linspace(0, shape.queries - 1, min(64, shape.queries), device=device).long()
    expected = _rows_in_float64(q[:, :, rows], k, v, [tq[:, :, rows], *context], scale)
    o, _, lse = fused.forward(q, k, v, None, None, None, scale, False)
    go = torch.randn_like(o)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(
        F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], scale=scale), leaves, go
    )

    def forward(
        tq: Tensor | None, tk: Tensor | None, tv: Tensor | None
    ) -> tuple[Callable[[], object], Callable[[], float]]:
        def run() -> tuple[Tensor, Tensor | None, Tensor]:
            return fused.forward(q, k, v, tq, tk, tv, scale, False)

        def error() -> float:
            return max(_relative(x[:, :, rows], y) for x, y in zip(run()[:2], expected, strict=True) if x is not None)

        return run, error

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        return fused.backward(go, q, k, v, o, lse, scale, False)

    def backward_error() -> float:
        return max(_relative(x, y) for x, y in zip(backward(), gradients, strict=True))

    return {
        "forward": forward(None, None, None),
        ("forward_tq" if context[0] is None else "forward_jvp"): forward(tq, *context),
        "backward_queries": (backward, backward_error),
        "backward_keys": (backward, backward_error),
    }


def _relative(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def sweep(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, dict[Tile | str, float]]:
    """Milliseconds of every candidate that fits the card and whose output is right, by key of the cache."""
    import triton
    from triton.errors import TritonError

    found = {}
    for kernel, (run, error) in _runs(shape, dtype, device).items():
        times: dict[Tile | str, float] = {}
        tiles = candidates(kernel, shipped(kernel, _architecture(device), dtype.itemsize, shape.d))
        for i, choice in enumerate(tiles):
            _progress(f"{shape} {kernel} {i + 1}/{len(tiles)}")
            # TritonError: it does not fit, or does not compile
            with forced(kernel, choice), contextlib.suppress(TritonError):
                wrong = error()
                if not wrong < 0.02:  # also when it is not a number
                    print(f"\r{shape} {kernel} {choice}: error {wrong:.1e}, not used")
                    continue
                times[choice] = triton.testing.do_bench(run, return_mode="median")
        found[cache_key(kernel, dtype.itemsize, shape.d, shape.queries, shape.keys)] = times
    return found


def sweep_backwards(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, dict[Tile | str, float]]:
    """Milliseconds of every backward of the primal that is here and right, from O and log-sum-exp of `fused`."""
    import triton

    from flash_jvp import fused, library

    q, k, v, *_ = _sample(shape, dtype, device)
    o, _, lse = fused.forward(q, k, v, None, None, None, shape.d**-0.5, False)
    go = torch.randn_like(o)
    expected = fused.backward(go, q, k, v, o, lse, shape.d**-0.5, False)  # `sweep` has checked it
    times: dict[Tile | str, float] = {}
    for name, run in {**library.backwards(q, k, v, causal=False), "triton": fused.backward}.items():
        _progress(f"{shape} backward {name}")
        call = functools.partial(run, go, q, k, v, o, lse, shape.d**-0.5, False)
        try:
            wrong = max(_relative(x, y) for x, y in zip(call(), expected, strict=True))
        except (RuntimeError, TypeError, ImportError) as error:  # another version of its package, or of cuDNN
            print(f"\r{shape} backward {name}: {str(error).splitlines()[0]}, not used")
            continue
        if not wrong < 0.02:
            print(f"\r{shape} backward {name}: differs from triton's by {wrong:.1e}, not used")
            continue
        times[name] = triton.testing.do_bench(call, return_mode="median")
    return {cache_key("backward", dtype.itemsize, shape.d, shape.queries, shape.keys): times}


def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _progress(text: str) -> None:
    print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_jvp.sweep",
        description="Measure tiles of the fused kernels on this GPU, check the output of each, keep the fastest.",
    )
    parser.add_argument(
        "--shape",
        action="append",
        type=Shape.parse,
        metavar="B,H,S,D",
        help="self-attention of S tokens, or B,H,Sq,Skv,D: cross-attention with zero tangents of keys and values; "
        f"repeatable; default: {' '.join(SHAPES)} (Wan2.1 480p, a tenth of its heads, its cross-attention, Cosmos)",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("flash_jvp.sweep: no CUDA device is visible; tiles can only be measured on one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    dtype, file = getattr(torch, options.dtype), cache_file(device)
    times: dict[str, dict[Tile | str, float]] = {}
    best: dict[str, Tile | str] = {}
    for shape in options.shape or map(Shape.parse, SHAPES):
        for find in (sweep, sweep_backwards):  # the second runs on the tiles that the first has found
            for key, measured in find(shape, dtype, device).items():
                known = times.setdefault(key, measured)
                if known is not measured:  # shapes of one bucket: the least time of both together
                    times[key] = {choice: t + measured.get(choice, math.inf) for choice, t in known.items()}
            best = {key: min(found, key=found.__getitem__) for key, found in times.items() if found}
            save(file, best)
    _progress("")
    print(f"\n{torch.cuda.get_device_name(device)}")
    print(f"{'kernel':<52} {'M×N, warps, stages':<22} {'ms':>9} {'shipped ms':>11}")
    for key, choice in best.items():
        kernel, size, d = re.match(r"(\w+) bytes=(\d+) D=(\d+)", key).groups()  # type: ignore[union-attr]
        usual: Tile | str = (
            "flash" if kernel == "backward" else shipped(kernel, _architecture(device), int(size), int(d))
        )
        print(f"{key:<52} {choice!s:<22} {times[key][choice]:>9.3f} {times[key].get(usual, math.nan):>11.3f}")
    print(f"kept in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
