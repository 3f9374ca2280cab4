"""Merging loses, repeats and mixes nothing unasked."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rcm.artefact import UserError, read_json
from rcm.data.merge import merge_shards
from rcm.data.samples import sample_sha256
from rcm.data.shards import Sample, part_indices, read_lines, read_shards, write_shard


def sample(index: int, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(1000 * seed + index)
    latents = torch.randn(2, 1, 2, 2, generator=generator)
    return Sample(index, f"number {index}", seed, latents, torch.randn(1 + index % 3, 4, generator=generator))


def write_set(folder: Path, parts: int = 2, total: int = 7, seed: int = 0) -> list[Path]:
    paths = [folder / f"{number}-of-{parts}.tar" for number in range(1, parts + 1)]
    for path in paths:
        samples = (sample(index, seed) for index in part_indices(path.stem, total))
        write_shard(path, samples, {"part": path.stem, "seed": seed})
    return paths


def same(one: Iterable[Sample], other: Iterable[Sample]) -> bool:
    keep = lambda sample: (sample.index, sample.seed, sample_sha256(sample))  # noqa: E731
    return [*map(keep, one)] == [*map(keep, other)]


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_a_set_is_cut_anew(tmp_path: Path, parts: int) -> None:
    paths, counts = write_set(tmp_path / "old"), []
    assert merge_shards(reversed(paths), tmp_path / "new", parts, advance=counts.append) == 7
    assert sum(counts) == 14
    new = [tmp_path / "new" / f"{k}-of-{parts}.tar" for k in range(1, parts + 1)]
    data = read_shards(new)
    assert data.manifest == {"seed": 0}
    assert same(data.samples, map(sample, range(7)))
    direct = write_set(tmp_path / "direct", parts)  # bytes and manifests too are those of a set made so
    assert [path.read_bytes() for path in new] == [path.read_bytes() for path in direct]
    assert [read_json(f"{path}.json") for path in new] == [read_json(f"{path}.json") for path in direct]


def test_different_origins_are_mixed_only_if_asked(tmp_path: Path) -> None:
    one, two = write_set(tmp_path / "one", total=3, seed=5), write_set(tmp_path / "two", total=2, seed=6)
    given = [one[0], two[0], one[1], two[1]]
    with pytest.raises(UserError, match=r"one/1-of-2\.tar and .*two/1-of-2\.tar are of different origin: seed differs"):
        merge_shards(given, tmp_path / "new", 1)
    assert not (tmp_path / "new").exists()
    assert merge_shards(given, tmp_path / "new", 2, mixed=True) == 5
    new = sorted((tmp_path / "new").glob("*.tar"))
    data = read_shards(new)
    assert data.manifest == {
        "mixed": [{"first": 0, "count": 3, "seed": 5}, {"first": 3, "count": 2, "seed": 6}],
    }
    wanted = [*(sample(i, 5) for i in range(3)), *(replace(sample(i, 6), index=3 + i) for i in range(2))]
    assert same(data.samples, wanted)
    assert [(line["index"], line["seed"]) for line in read_lines(new)] == [(0, 5), (2, 5), (4, 6), (1, 5), (3, 6)]


def test_gaps_are_closed_only_if_asked(tmp_path: Path) -> None:
    paths = write_set(tmp_path / "old", 3)
    with pytest.raises(UserError, match=r"sample 1 is in none of the shards.*--renumber"):
        merge_shards([paths[0], paths[2]], tmp_path / "new", 1)
    assert merge_shards([paths[0], paths[2]], tmp_path / "new", 1, renumber=True) == 5
    data = read_shards([tmp_path / "new" / "1-of-1.tar"])
    assert data.manifest == {"seed": 0, "renumbered": True}
    assert same(data.samples, (replace(sample(old), index=new) for new, old in enumerate((0, 2, 3, 5, 6))))


def test_what_is_refused(tmp_path: Path) -> None:
    paths = write_set(tmp_path / "old")
    other = write_set(tmp_path / "again", 1)  # of the same origin
    with pytest.raises(UserError, match=r"sample 0 is in .*old/1-of-2\.tar and in .*again/1-of-1\.tar"):
        merge_shards([*paths, *other], tmp_path / "new", 1, renumber=True)
    with pytest.raises(UserError, match="given twice"):
        merge_shards([*paths, paths[0]], tmp_path / "new", 1)
    with pytest.raises(UserError, match="old holds something already"):
        merge_shards(paths, tmp_path / "old", 1)
    wide = replace(sample(0), latents_CTHW=torch.zeros(2, 1, 2, 3))
    write_shard(tmp_path / "wide.tar", [wide], {"part": "1-of-1"})
    with pytest.raises(UserError, match="different shapes"):
        merge_shards([*paths, tmp_path / "wide.tar"], tmp_path / "new", 1, mixed=True)
    content = bytearray(paths[1].read_bytes())
    content[600] ^= 1
    paths[1].write_bytes(content)
    with pytest.raises(UserError, match=r"2-of-2\.tar is damaged"):
        merge_shards(paths, tmp_path / "new", 1)
    assert not (tmp_path / "new").exists()
