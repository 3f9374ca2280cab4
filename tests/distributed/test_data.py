"""Ranks share the verification of shards out, all learn what one finds, and together they read every sample once."""

import os
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rcm.artefact import UserError
from rcm.data import shards
from rcm.data.stream import stream

TOTAL, BATCH = 10, 6


def read(folders, memory):
    """What this rank verified, of which progress it heard, and its share of three epochs; or the error it met."""
    rank, world = dist.get_rank(), dist.get_world_size()
    hashed, progress, plain = [], [], shards.sha256_file
    shards.sha256_file = lambda path: hashed.append(Path(path).name) or plain(path)
    try:
        paths = [Path(folders[rank]) / f"{number}.tar" for number in (1, 2, 3)]
        data = shards.read_shards(paths, group=dist.group.WORLD, memory=memory, advance=progress.append)
    except UserError as error:
        return str(error)
    finally:
        shards.sha256_file = plain
    positions = range(rank * BATCH // world, (rank + 1) * BATCH // world)
    with stream(data, batch=BATCH, positions=positions, seed=3, start=0, words=2, workers=rank) as batches:
        seen = [(batch.indices, batch.latents_BCTHW[:, 0, 0, 0, 0].tolist()) for batch in islice(batches, 5)]
    return hashed, progress, data.sha256, seen


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2, 3):
        part = f"{number}-of-3"
        samples = [
            shards.Sample(i, str(i), 0, torch.full((1, 1, 1, 1), i / 8), torch.ones(2, 4))
            for i in shards.part_indices(part, TOTAL)
        ]
        shards.write_shard(tmp_path / f"{number}.tar", samples, {"part": part})
    return tmp_path


@pytest.mark.parametrize("memory", [0, 2**20])
def test_verification_and_samples_are_shared_out(ranks, folder, memory):
    one, other = ranks(2, read, [str(folder)] * 2, memory)
    assert (one[0], other[0]) == (["1.tar", "3.tar"], ["2.tar"])
    assert one[1] == other[1] == [2, 1]
    assert one[2] == other[2] == tuple(shards.sha256_file(folder / f"{number}.tar") for number in (1, 2, 3))
    seen = [index for update in zip(one[3], other[3], strict=True) for indices, _ in update for index in indices]
    values = [value for update in zip(one[3], other[3], strict=True) for _, row in update for value in row]
    assert [sorted(seen[i : i + TOTAL]) for i in (0, TOTAL, 2 * TOTAL)] == [list(range(TOTAL))] * 3
    assert values == [index / 8 for index in seen]


@pytest.mark.parametrize("number", [2, 3])
def test_damage_that_one_rank_finds_is_an_error_on_all(ranks, folder, number):
    path = folder / f"{number}.tar"
    path.write_bytes(bytes(path.stat().st_size))
    one, other = ranks(2, read, [str(folder)] * 2, 0)
    assert one == other
    assert f"shard {path} is damaged" in one


def test_shard_that_one_rank_misses_is_an_error_on_all(ranks, folder, tmp_path):
    alone = tmp_path / "second machine"
    alone.mkdir()
    for path in folder.glob("*.tar*"):
        os.link(path, alone / path.name)
    (alone / "1.tar").unlink()  # which the first rank would verify
    one, other = ranks(2, read, [str(folder), str(alone)], 0)
    assert one == other
    assert f"shard {alone / '1.tar'} does not exist" in one


def fail_on_one(folder):
    """What each rank raises where rank 1 meets what is no mistake of the user."""
    plain, shards.verified = shards.verified, lambda *_: 1 / 0 if dist.get_rank() == 1 else []
    try:
        shards.read_shards([Path(folder) / f"{number}.tar" for number in (1, 2, 3)], group=dist.group.WORLD)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        shards.verified = plain


def test_any_failure_of_one_rank_is_one_of_all(ranks, folder):
    assert ranks(2, fail_on_one, str(folder)) == ["RuntimeError: rank 1: ZeroDivisionError: division by zero"] * 2
