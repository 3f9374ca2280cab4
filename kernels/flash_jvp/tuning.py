"""Tile configurations of the fused kernels: shipped ones, and those measured on a card by `python -m flash_jvp.tuning`.

Nothing is measured at a first call: a new length costs nothing, and the same call always takes the same tiles. Measured
tiles are kept in $FLASH_JVP_CACHE or ~/.cache/flash_jvp, in one file per card and Triton version, keyed by kernel,
element size, D, and the lengths rounded up to powers of two.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("forward", "forward_tq", "forward_jvp", "backward_queries", "backward_keys")  # tq: zero tk and tv


@dataclass(frozen=True)
class Tile:
    """block_m queries × block_n keys at a time, by `warps` × 32 threads, loads running `stages` - 1 tiles ahead."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.block_m}×{self.block_n}, {self.warps}, {self.stages}"

    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.warps, "num_stages": self.stages}


INTERPRETER = Tile(64, 32, 4, 1)

# By family of cards and kernel, for D up to 64, 128 and 256 in 16-bit types: chosen by what the compiler says of
# registers and shared memory (`python -m flash_jvp.compiled`), not yet by time.
FAMILIES = {80: "ampere", 87: "ampere", 90: "hopper", 100: "blackwell", 103: "blackwell"}  # any other: "small"
TILES_16 = {
    "hopper": {
        "forward": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        "forward_tq": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 16, 8, 2)),
        "forward_jvp": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 32, 8, 2)),
        "backward_queries": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        "backward_keys": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(16, 64, 8, 2)),
    },
    "blackwell": {
        "forward": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        "forward_tq": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
        "forward_jvp": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 32, 8, 2)),
        "backward_queries": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        "backward_keys": (Tile(64, 64, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "ampere": {
        "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
        "forward_tq": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 32, 8, 2)),
        "forward_jvp": (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
        "backward_queries": (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        "backward_keys": (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
    },
    "small": {  # 99 KiB of shared memory: 8.6, 8.9, 12.x and what is not known
        "forward": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 3), Tile(64, 32, 8, 2)),
        "forward_tq": (Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        "forward_jvp": (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 16, 8, 2)),
        "backward_queries": (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
        "backward_keys": (Tile(32, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
    },
}
# In float32 the products run on CUDA cores of any card, and whole rows are in registers: for all kernels.
TILES_32 = (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))

_forced: dict[str, Tile] = {}


def tile(kernel: str, q: Tensor, k: Tensor) -> Tile:
    """The tile of one of KERNELS for these primals on the current device: forced, measured or shipped."""
    import triton

    if kernel in _forced:
        return _forced[kernel]
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    arch = triton.runtime.driver.active.get_current_target().arch
    return _chosen(kernel, arch, q.device, q.element_size(), q.shape[3], _bucket(q.shape[2]), _bucket(k.shape[2]))


@contextlib.contextmanager
def forced(kernel: str, choice: Tile) -> Iterator[None]:
    """Within it, `kernel` runs with this tile."""
    before = _forced.get(kernel)
    _forced[kernel] = choice
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


def shipped(kernel: str, arch: int, element_size: int, d: int) -> Tile:
    """The tile of the tables above."""
    tiles = TILES_32 if element_size == 4 else TILES_16[FAMILIES.get(arch, "small")][kernel]
    return tiles[0 if d <= 64 else 1 if d <= 128 else 2]


@functools.cache
def _chosen(kernel: str, arch: int, device: torch.device, size: int, d: int, queries: int, keys: int) -> Tile:
    measured = _measured(cache_file(device)) if device.type == "cuda" else {}
    found = measured.get(_key(kernel, size, d, queries, keys))
    return found if isinstance(found, Tile) else shipped(kernel, arch, size, d)


def backward(q: Tensor, k: Tensor) -> str | None:
    """The backward of the primal that was measured to be the fastest here for such lengths, if any was."""
    return _fastest(q.device, _key("backward", q.element_size(), q.shape[3], q.shape[2], k.shape[2]))


@functools.cache
def _fastest(device: torch.device, key: str) -> str | None:
    name = _measured(cache_file(device)).get(key) if device.type == "cuda" else None
    return name if isinstance(name, str) else None


def _bucket(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _key(kernel: str, size: int, d: int, queries: int, keys: int) -> str:
    return f"{kernel} bytes={size} D={d} Sq={_bucket(queries)} Skv={_bucket(keys)}"


def cache_file(device: torch.device) -> Path:
    """Where the measured tiles of this card are."""
    import triton

    folder = os.environ.get("FLASH_JVP_CACHE") or Path.home() / ".cache" / "flash_jvp"
    name = f"{torch.cuda.get_device_name(device)} triton {triton.__version__}"
    return Path(folder) / (re.sub(r"[^A-Za-z0-9.]+", "-", name) + ".json")


@functools.cache
def _measured(path: Path) -> dict[str, Tile | str]:
    try:
        entries = json.loads(path.read_text()).items()
        return {key: entry if key.startswith("backward ") else Tile(*map(int, entry)) for key, entry in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is not a file of tiles and is not used ({error}): delete it", stacklevel=2)
        return {}


def save(path: Path, found: Mapping[str, Tile | str]) -> None:
    """Adds what was found to the file; a reader sees the old file or the new one, never half of one."""
    both = {**_measured(path), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({key: x if isinstance(x, str) else astuple(x) for key, x in sorted(both.items())}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)
    _measured.cache_clear()
    _chosen.cache_clear()
    _fastest.cache_clear()


# The sweep.


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


def candidates(kernel: str) -> list[Tile]:
    """What the sweep tries; a tile that does not fit a card is passed over."""
    sides = (16, 32, 64, 128)
    own = 1 if kernel == "backward_keys" else 0  # the side that a program keeps
    blocks = [x for x in itertools.product(sides, sides) if x[own] >= 32 and 1 << 11 <= x[0] * x[1] <= 1 << 14]
    return [Tile(m, n, warps, stages) for m, n in blocks for warps in (4, 8) for stages in (2, 3, 4)]


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
    from triton.runtime import errors

    found = {}
    for kernel, (run, error) in _runs(shape, dtype, device).items():
        times: dict[Tile | str, float] = {}
        tiles = candidates(kernel)
        for i, choice in enumerate(tiles):
            _progress(f"{shape} {kernel} {i + 1}/{len(tiles)}")
            with forced(kernel, choice), contextlib.suppress(errors.OutOfResources, errors.PTXASError):
                wrong = error()
                if not wrong < 0.02:  # also when it is not a number
                    print(f"\r{shape} {kernel} {choice}: error {wrong:.1e}, not used")
                    continue
                times[choice] = triton.testing.do_bench(run, return_mode="median")
        found[_key(kernel, dtype.itemsize, shape.d, shape.queries, shape.keys)] = times
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
    return {_key("backward", dtype.itemsize, shape.d, shape.queries, shape.keys): times}


def _progress(text: str) -> None:
    print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_jvp.tuning",
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
        print("flash_jvp.tuning: no CUDA device is visible; tiles can only be measured on one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    dtype, file = getattr(torch, options.dtype), cache_file(device)
    times: dict[str, dict[Tile | str, float]] = {}
    best: dict[str, Tile | str] = {}
    for shape in options.shape or map(Shape.parse, SHAPES):
        for find in (sweep, sweep_backwards):  # the second runs on the tiles that the first has found
            for key, measured in find(shape, dtype, device).items():
                known = times.setdefault(key, measured)
                if known is not measured:  # shapes of one bucket: the least time of both
                    times[key] = {choice: t + measured.get(choice, math.inf) for choice, t in known.items()}
            best = {key: min(found, key=found.__getitem__) for key, found in times.items() if found}
            save(file, best)
    _progress("")
    print(f"\n{torch.cuda.get_device_name(device)}")
    print(f"{'kernel':<52} {'M×N, warps, stages':<22} {'ms':>9} {'shipped ms':>11}")
    arch = 10 * torch.cuda.get_device_capability(device)[0] + torch.cuda.get_device_capability(device)[1]
    for key, choice in best.items():
        kernel, size, d = re.match(r"(\w+) bytes=(\d+) D=(\d+)", key).groups()  # type: ignore[union-attr]
        usual: Tile | str = "flash" if kernel == "backward" else shipped(kernel, arch, int(size), int(d))
        print(f"{key:<52} {choice!s:<22} {times[key][choice]:>9.3f} {times[key].get(usual, math.nan):>11.3f}")
    print(f"kept in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
