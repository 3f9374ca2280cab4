"""Tile configurations of the fused kernels: shipped ones, and those measured on a card by `python -m flash_jvp.sweep`.

Nothing is measured at a first call: a new length costs nothing, and the same call always takes the same tiles. Measured
tiles are kept in $FLASH_JVP_CACHE or ~/.cache/flash_jvp, in one file per card and Triton version, keyed by kernel,
element size, D, and the lengths rounded up to powers of two.
"""

import contextlib
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

DIMS = (16, 32, 64, 128, 256)
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
    found = measured.get(cache_key(kernel, size, d, queries, keys))
    return found if isinstance(found, Tile) else shipped(kernel, arch, size, d)


def backward(q: Tensor, k: Tensor) -> str | None:
    """The backward of the primal that was measured to be the fastest here for such lengths, if any was."""
    return _fastest(q.device, cache_key("backward", q.element_size(), q.shape[3], q.shape[2], k.shape[2]))


@functools.cache
def _fastest(device: torch.device, key: str) -> str | None:
    name = _measured(cache_file(device)).get(key) if device.type == "cuda" else None
    return name if isinstance(name, str) else None


def _bucket(length: int) -> int:
    return 1 << (length - 1).bit_length()


def cache_key(kernel: str, size: int, d: int, queries: int, keys: int) -> str:
    return f"{kernel} bytes={size} D={d} Sq={_bucket(queries)} Skv={_bucket(keys)}"


def cache_file(device: torch.device) -> Path:
    """Where the measured tiles of this card are."""
    import triton

    folder = os.environ.get("FLASH_JVP_CACHE") or os.path.expanduser("~/.cache/flash_jvp")  # noqa: PTH111 (no home: no file)
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
    Path(file.name).chmod(0o644)  # a folder may be shared
    Path(file.name).replace(path)
    _measured.cache_clear()
    _chosen.cache_clear()
    _fastest.cache_clear()
