"""The stream of batches: every sample exactly once an epoch, whoever reads it, and from whatever update on."""

import random
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch

from rcm.artefact import UserError
from rcm.data.shards import Batch, LatentDataset, Sample, batch_indices, part_indices, read_shards, write_shard
from rcm.data.stream import stream

TOTAL, BATCH, WIDTH = 10, 6, 4


def sample(index: int) -> Sample:
    generator = torch.Generator().manual_seed(index)
    text = torch.randn(1 + index % 3, WIDTH, generator=generator)
    return Sample(index, f"number {index}", 0, torch.randn(2, 1, 2, 2, generator=generator), text)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.tar" for number in (1, 2, 3)]
    for number, path in enumerate(paths, start=1):
        part = f"{number}-of-3"
        write_shard(path, map(sample, part_indices(part, TOTAL)), {"part": part})
    return paths


def batches(
    data: LatentDataset, updates: int, *, positions: Sequence[int] = range(BATCH), start: int = 0, workers: int = 0
) -> list[Batch]:
    options = {"batch": BATCH, "positions": positions, "seed": 7, "words": 3}
    with stream(data, start=start, workers=workers, **options) as endless:
        return list(islice(endless, updates))


def assert_same(ours: Sequence[Batch], others: Sequence[Batch]) -> None:
    for mine, other in zip(ours, others, strict=True):
        assert (mine.indices, mine.prompts) == (other.indices, other.prompts)
        assert torch.equal(mine.latents_BCTHW, other.latents_BCTHW)
        assert torch.equal(mine.text_BLD, other.text_BLD)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("memory", [0, 2**20])
def test_every_sample_exactly_once_an_epoch(shards: list[Path], ranks: int, workers: int, memory: int) -> None:
    """Five updates of 6 samples are three epochs of 10: batches cross two borders."""
    shares = [range(rank * BATCH // ranks, (rank + 1) * BATCH // ranks) for rank in range(ranks)]
    data = read_shards(shards, memory=memory)
    read = [batches(data, 5, positions=share, workers=workers) for share in shares]
    seen = [index for update in zip(*read, strict=True) for batch in update for index in batch.indices]
    for epoch in range(3):
        assert sorted(seen[epoch * TOTAL : (epoch + 1) * TOTAL]) == list(range(TOTAL))
    assert seen == [index for update in range(5) for index in batch_indices(TOTAL, BATCH, 7, update)]
    for batch in (batch for rank in read for batch in rank):
        for row, index in enumerate(batch.indices):
            wanted = sample(index)
            assert batch.prompts[row] == wanted.prompt
            assert torch.equal(batch.latents_BCTHW[row], wanted.latents_CTHW)
            assert torch.equal(batch.text_BLD[row, : len(wanted.text_LD)], wanted.text_LD)
            assert not batch.text_BLD[row, len(wanted.text_LD) :].any()


def test_order_is_that_of_earlier_releases() -> None:
    """Two epochs, as first published: tables made with this seed can be made again."""
    assert batch_indices(10, 10, 0, 0) + batch_indices(10, 10, 0, 1) == [
        *(8, 2, 3, 7, 1, 4, 5, 0, 9, 6),
        *(4, 0, 3, 8, 6, 2, 5, 1, 9, 7),
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 3, 4])
def test_resumed_stream_goes_on_exactly(shards: list[Path], start: int, workers: int) -> None:
    data = read_shards(shards, memory=0)
    assert_same(batches(data, 8 - start, start=start, workers=workers), batches(data, 8)[start:])


class Slow(Sequence[Sample]):
    """Samples that take 0 to 10 ms to read, and are counted."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return TOTAL

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        time.sleep(random.uniform(0, 0.01))
        self.read += 1
        return sample(index)


def test_workers_change_nothing() -> None:
    data = LatentDataset(Slow(), {})
    plain = batches(LatentDataset([sample(i) for i in range(TOTAL)], {}), 6)
    for workers in (1, 3):
        assert_same(batches(data, 6, workers=workers), plain)


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_no_more_than_a_batch_a_worker_is_read_ahead() -> None:
    samples = Slow()
    with stream(
        LatentDataset(samples, {}), batch=BATCH, positions=[0, 5], seed=0, start=0, words=3, workers=2
    ) as ahead:
        next(ahead)
        deadline = time.monotonic() + 5
        while samples.read < 2 * 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # for one more, if that were read
        assert samples.read == 2 * 3  # the batch in use and two more, two samples each


def test_threads_end_with_the_block() -> None:
    options = {"batch": BATCH, "positions": [0], "seed": 0, "start": 0, "words": 3, "workers": 3}
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), stream(LatentDataset(Slow(), {}), **options) as ahead:
            next(ahead)
            assert len(data_threads()) == 3
            raise error
        assert not data_threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_named_at_the_update_that_meets_it(shards: list[Path], workers: int) -> None:
    """The shard of sample 4 vanishes; its first place in the stream says how far one gets."""
    data = read_shards(shards, memory=0)
    shards[1].unlink()  # samples 1, 4, 7
    gone = next(update for update in range(9) if {1, 4, 7} & set(batch_indices(TOTAL, 2, 1, update)))
    with stream(data, batch=2, positions=range(2), seed=1, start=0, words=3, workers=workers) as endless:
        assert len(list(islice(endless, gone))) == gone
        with pytest.raises(UserError, match=rf"sample [147] of shard {shards[1]} cannot be read"):
            next(endless)
    assert not data_threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_text_too_long(shards: list[Path], workers: int) -> None:
    data = read_shards(shards)
    options = {"batch": TOTAL, "positions": range(TOTAL), "seed": 1, "start": 0, "words": 2, "workers": workers}
    with stream(data, **options) as endless, pytest.raises(UserError, match=r"has 3 words.*is 2"):
        next(endless)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_a_gpu_are_pinned(shards: list[Path], workers: int) -> None:
    options = {"batch": 2, "positions": range(2), "seed": 1, "start": 0, "words": 3, "workers": workers}
    with stream(read_shards(shards), device=torch.device("cuda"), **options) as endless:
        batch = next(endless)
        assert batch.latents_BCTHW.is_pinned() and batch.text_BLD.is_pinned()
