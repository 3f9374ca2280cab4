"""The batches of a training run, one update after the other, read ahead by threads.

Reading latents is waiting for a file system: nothing is decoded, and reads let other threads run. So threads do what
processes would, without forks beside CUDA, shared memory, or anything that outlives the trainer.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import torch

from rcm.data.shards import Batch, LatentDataset, batch_indices


@contextmanager
def stream(
    data: LatentDataset,
    *,
    batch: int,
    positions: Sequence[int],
    seed: int,
    start: int,
    words: int,
    workers: int = 0,
    device: torch.device | None = None,
) -> Iterator[Iterator[Batch]]:
    """`with stream(...) as batches:` gives the batches of updates start, start + 1, ... without end.

    What they hold follows from the data, `batch`, `positions`, `seed` and the update alone (`batch_indices`). A sample
    that cannot be read, or whose text is too long, is a UserError at the update that needs it.

    Args:
        batch: size of the global batch.
        positions: the places in it that are read; ranks whose positions make up range(batch) share each batch out.
        start: first update, from 0.
        words: length to which texts are padded.
        workers: threads, each of which reads one batch ahead; 0: batches are read when asked for. They end with the
            `with` block.
        device: where the batches will go; for a GPU they lie in pinned memory.
    """

    def load(update: int) -> Batch:
        order = batch_indices(len(data), batch, seed, update)
        loaded = data.batch([order[position] for position in positions], words)
        if device is None or device.type != "cuda":
            return loaded
        with torch.cuda.device(device):  # of this thread
            return replace(
                loaded, latents_BCTHW=loaded.latents_BCTHW.pin_memory(), text_BLD=loaded.text_BLD.pin_memory()
            )

    if not workers:
        yield (load(update) for update in count(start))
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    ahead = deque(pool.submit(load, update) for update in range(start, start + workers))

    def batches() -> Iterator[Batch]:
        for update in count(start + workers):
            loaded = ahead.popleft().result()
            ahead.append(pool.submit(load, update))
            yield loaded

    try:
        yield batches()
    finally:
        pool.shutdown(cancel_futures=True)
