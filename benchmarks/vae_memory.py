"""What decoding a video takes: the peak of live tensor bytes and seconds per frame, against the number of frames.

    OMP_NUM_THREADS=1 python benchmarks/vae_memory.py

The full-size autoencoder of Wan2.1 with random weights. "pieces" consumes `frames()`, as `rcm generate` does with a
video that it writes; "whole" is one pass over all frames, what the pieces are there to avoid. Live bytes are those of
the tensors that the decoder makes, neither its weights nor its input; a convolution's own workspace is not seen.
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


def measure(decode: Callable[[], object]) -> tuple[float, float]:
    """(MiB at the peak, seconds)."""
    with LiveBytes() as live, torch.no_grad():
        decode()
    start = time.perf_counter()
    with torch.no_grad():
        decode()
    return live.peak / 2**20, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[9, 17, 33, 65], help="lengths, each 1 + 4k")
    parser.add_argument("--size", type=int, nargs=2, default=[96, 160], metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    codec = rcm.codecs.build("wan2.1-vae").to(getattr(torch, arguments.precision))
    height, width = (side // codec.cell for side in arguments.size)
    print(f"decoding at {arguments.size[0]} x {arguments.size[1]}, {arguments.precision}")
    print("frames   pieces MiB   s/frame   whole MiB   s/frame")
    for frames in arguments.frames:
        latents = torch.randn(1, codec.channels, 1 + (frames - 1) // codec.stride, height, width)

        def pieces(latents: Tensor = latents) -> None:
            for _ in codec.frames(latents):
                pass

        def whole(latents: Tensor = latents) -> None:
            codec.decoder(latents.to(codec.conv2.weight), {})

        (bounded, seconds), (growing, whole_seconds) = measure(pieces), measure(whole)
        print(
            f"{frames:6} {bounded:12.1f} {seconds / frames:9.3f} {growing:11.1f} {whole_seconds / frames:9.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
