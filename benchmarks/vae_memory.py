"""What decoding a video takes: the peak of live tensor bytes and seconds per frame, against the number of frames.

    OMP_NUM_THREADS=1 python benchmarks/vae_memory.py

The full-size autoencoder of Wan2.1 with random weights. "pieces" consumes `frames()` and keeps none of them, "whole"
is one pass over all frames, what the pieces are there to avoid. Live bytes are those of the tensors that the decoder
makes, without its weights, its input and a convolution's own workspace. They are counted exactly on the meta device,
whose tensors have a size but no memory; time is the CPU's, at a size that it can do.
"""

import argparse
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rcm.codecs


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are still alive; `peak` is the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # made outside, or seen before
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def _latents(codec: rcm.codecs.WanVAE, frames: int, rows: int, columns: int) -> Tensor:
    return torch.zeros(1, codec.channels, frames, rows, columns, device=codec.conv2.weight.device)


@torch.no_grad()
def decoding_peak(codec: rcm.codecs.WanVAE, frames: int, rows: int, columns: int) -> int:
    """Live bytes of decoding so many latent frames in pieces, of which none is kept."""
    latents = _latents(codec, frames, rows, columns)
    with LiveBytes() as live:
        for _ in codec.frames(latents):
            pass
    return live.peak


@torch.no_grad()
def whole_peak(codec: rcm.codecs.WanVAE, frames: int, rows: int, columns: int) -> int:
    """Live bytes of one pass over all latent frames."""
    latents = _latents(codec, frames, rows, columns).to(codec.conv2.weight.dtype)
    with LiveBytes() as live:
        codec.decoder(latents, {})
    return live.peak


def seconds(codec: rcm.codecs.WanVAE, frames: int, rows: int, columns: int) -> float:
    """Time of decoding so many latent frames in pieces."""
    latents = _latents(codec, frames, rows, columns)
    start = time.perf_counter()
    for _ in codec.frames(latents):
        pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 9, 17, 33, 81], help="lengths, each 1 + 4k")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 832], metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--timed", type=int, nargs=2, default=[64, 96], metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.precision)
    codec = rcm.codecs.build("wan2.1-vae").to(dtype)
    with torch.device("meta"):
        sizes_only = rcm.codecs.build("wan2.1-vae").to(dtype)
    (height, width), (timed_height, timed_width) = arguments.size, arguments.timed
    print(f"{arguments.precision}; memory at {height} x {width}, time at {timed_height} x {timed_width}")
    print("frames   pieces GiB   whole GiB   s/frame")
    for frames in arguments.frames:
        length = 1 + (frames - 1) // codec.stride
        shape = (length, height // codec.cell, width // codec.cell)
        pieces, whole = (measure(sizes_only, *shape) / 2**30 for measure in (decoding_peak, whole_peak))
        took = seconds(codec, length, timed_height // codec.cell, timed_width // codec.cell)
        print(f"{frames:6} {pieces:12.2f} {whole:11.2f} {took / frames:9.3f}", flush=True)


if __name__ == "__main__":
    main()
