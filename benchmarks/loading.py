"""What loading costs: the time that a step waits for its batch, as a share of the step.

    OMP_NUM_THREADS=1 python benchmarks/loading.py

"tiny" is the tiny configuration with the cheapest of its updates, forward and backward of one network. "480p" are
latents of 81 frames at 480 x 832 (8 MiB), two a rank, beside small operations of about one second that stand for an
update and keep the interpreter busy; an update of a real network takes longer, so the shares are upper bounds.
Shards come from the page cache; "100 MB/s" sleeps as long as a file system of that speed would take. `step` compares
with the same step on a batch that is there already, in turns: it contains what reading ahead takes from the step.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from rcm.data.shards import Batch, LatentDataset, Sample, part_indices, read_shards, write_shard
from rcm.data.stream import stream
from rcm.networks import build

WORDS, WIDTH = 12, 256
Step = Callable[[Batch], object]


class Slow(Sequence[Sample]):
    """Samples from a file system that gives `rate` bytes a second."""

    def __init__(self, samples: Sequence[Sample], rate: float) -> None:
        self.samples, self.rate = samples, rate

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        sample = self.samples[index]
        time.sleep(sample.latents_CTHW.nbytes / self.rate)
        return sample


def shards(folder: Path, total: int, shape: tuple[int, ...], parts: int) -> list[Path]:
    latents, text = torch.randn(shape), torch.randn(WORDS, WIDTH)
    paths = [folder / f"{number}-of-{parts}.tar" for number in range(1, parts + 1)]
    for path in paths:
        samples = (Sample(i, "a photo of a star", i, latents, text) for i in part_indices(path.stem, total))
        write_shard(path, samples, {"part": path.stem})
    return paths


def tiny_step() -> Step:
    sizes = {"width": 128, "mlp_width": 512, "layers": 4, "heads": 4, "in_channels": 24, "out_channels": 24}
    sizes |= {"text_width": WIDTH, "time_width": 64, "patch": (1, 1, 1), "time_scale": 10.0}
    network = build({"kind": "wan", **sizes})
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step(batch: Batch) -> None:
        network(batch.latents_BCTHW, torch.ones(len(batch.indices), 1), batch.text_BLD).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def busy_step(operations: int = 250_000) -> Step:
    x = torch.randn(64)

    def step(batch: Batch) -> None:
        for _ in range(operations):
            x.cos()

    return step


def measure(data: LatentDataset, step: Step, *, batch: int, workers: int, steps: int) -> tuple[float, float, float]:
    """Medians of the time of a step without loading, waiting for a batch, and of the step with loading; seconds."""
    options = {"batch": batch, "positions": range(batch), "seed": 0, "start": 0, "words": WORDS}
    with stream(data, workers=0, **options) as batches:
        present = next(batches)
    plain, waits, whole = [], [], []
    for _ in range(3):  # in turns, for the machine is not always equally fast
        for _ in range(steps):
            began = time.perf_counter()
            step(present)
            plain.append(time.perf_counter() - began)
        with stream(data, workers=workers, **options) as batches:
            step(next(batches))  # nothing could be read ahead of the first
            for _ in range(steps):
                began = time.perf_counter()
                loaded = next(batches)
                waits.append(time.perf_counter() - began)
                step(loaded)
                whole.append(time.perf_counter() - began)
    return median(plain), median(waits), median(whole)


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); medians")
    print(f"{'samples':18} {'workers':>7} {'step alone':>11} {'waiting':>10} {'share':>7} {'step':>7}")
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        small = shards(Path(one), 3000, (24, 1, 3, 3), 2)
        large = read_shards(shards(Path(other), 32, (16, 21, 60, 104), 4), memory=0)
        tiny, busy = (tiny_step(), 48, 15), (busy_step(), 2, 3)
        cases = (
            ("tiny, in memory", read_shards(small), tiny, (0, 1)),
            ("480p", large, busy, (0, 2)),
            ("480p, 100 MB/s", LatentDataset(Slow(large.samples, 1e8), {}), busy, (0, 2)),
        )
        for name, data, (step, batch, steps), choices in cases:
            for workers in choices:
                alone, waiting, whole = measure(data, step, batch=batch, workers=workers, steps=steps)
                print(
                    f"{name:18} {workers:7} {1e3 * alone:8.1f} ms {1e3 * waiting:7.2f} ms"
                    f" {waiting / whole:7.2%} {whole / alone:6.3f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
