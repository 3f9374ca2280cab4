"""Randomness by counter: what a sample draws depends on (seed, purpose, step, index) and on nothing else.

No generator lives on between calls. The batch a sample sits in, its place there, the number of ranks and an
interruption of the run therefore change nothing. The bits come from Philox4x64 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011): the key is a hash of (seed, purpose), two words of the 256-bit counter are
(index, step), and the other two are left to count within the row.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def _rows(
    fill: Callable[[np.random.Philox, int], np.ndarray],
    shape: Sequence[int],
    seed: int,
    purpose: str,
    step: int,
    indices: Sequence[int] | Tensor,
) -> np.ndarray:
    """One row per index, (len(indices), *shape) in float64; `fill(philox, size)` draws a row from its own stream."""
    digest = hashlib.blake2b(f"{int(seed)}:{purpose}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    size = math.prod(shape)
    rows = np.empty((len(indices), size))
    for row, index in zip(rows, indices, strict=True):
        counter = np.array([0, 0, int(index), int(step)], dtype=np.uint64)
        row[:] = fill(np.random.Philox(key=key, counter=counter), size)
    return rows.reshape(len(indices), *shape)


def normal(shape: Sequence[int], *, seed: int, purpose: str, step: int = 0, indices: Sequence[int] | Tensor) -> Tensor:
    """Standard normal noise, float32, (len(indices), *shape).

    Args:
        shape: shape of one sample.
        seed: seed of the run.
        purpose: what the noise is for, e.g. "rollout"; each purpose is a stream of its own.
        step: training step, or 0.
        indices: global (not rank-local) index of each sample, non-negative.
    """
    rows = _rows(
        lambda bits, size: np.random.Generator(bits).standard_normal(size), shape, seed, purpose, step, indices
    )
    return torch.from_numpy(rows.astype(np.float32))


def uniform(shape: Sequence[int], *, seed: int, purpose: str, step: int = 0, indices: Sequence[int] | Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), float64, (len(indices), *shape); arguments as in `normal`.

    They are (k + 1/2) / 2^52, so neither 0 nor 1, where quantile functions diverge.
    """
    rows = _rows(lambda bits, size: (bits.random_raw(size) >> 12) + 0.5, shape, seed, purpose, step, indices)
    return torch.from_numpy(rows * 2.0**-52)
