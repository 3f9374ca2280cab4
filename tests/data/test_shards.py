"""Shards hold what was written, the same bytes each time; what is damaged, missing or mixed up is refused by name."""

import io
import json
import re
import tarfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from rcm.artefact import UserError, read_json, sha256_file, write_json
from rcm.data.shards import Sample, batch_indices, part_indices, read_shards, write_shard

TOTAL, WIDTH = 7, 4


def sample(index: int) -> Sample:
    """Two to four words, padded with zeros to six; the second word is zero and yet no padding."""
    generator = torch.Generator().manual_seed(index)
    text = torch.zeros(6, WIDTH)
    text[: 2 + index % 3] = torch.randn(2 + index % 3, WIDTH, generator=generator)
    text[0] = 0
    return Sample(
        index, f"a photo of {index} “things”", 100 + index, torch.randn(3, 2, 2, 2, generator=generator), text
    )


def write_set(folder: Path, parts: int = 2, total: int = TOTAL, **facts: str) -> list[Path]:
    paths = [folder / f"{number}-of-{parts}.tar" for number in range(1, parts + 1)]
    for path in paths:
        part = path.stem
        manifest = {"part": part, "teacher_sha256": "t", "sampler": {"steps": 20}} | facts
        write_shard(path, map(sample, part_indices(part, total)), manifest)
    return paths


@pytest.mark.parametrize("parts", [1, 2, 4, 9])
def test_round_trip(tmp_path: Path, parts: int) -> None:
    dataset = read_shards(reversed(write_set(tmp_path, parts)))
    assert len(dataset) == TOTAL
    assert dataset.manifest == {"teacher_sha256": "t", "sampler": {"steps": 20}}
    batch = dataset.batch([5, 0, 5], words=6)
    assert batch.indices == (5, 0, 5)
    for row, index in enumerate(batch.indices):
        assert batch.prompts[row] == sample(index).prompt
        assert torch.equal(batch.latents_BCTHW[row], sample(index).latents_CTHW)
        assert torch.equal(batch.text_BLD[row], sample(index).text_LD)
    assert dataset.batch([0], words=9).text_BLD.shape == (1, 9, WIDTH)
    with pytest.raises(UserError, match=r"sample 5 has 4 words.*is 3"):
        dataset.batch([0, 5], words=3)


def test_empty_text(tmp_path: Path) -> None:
    null = Sample(0, "", 0, torch.zeros(1, 1, 1, 1), torch.zeros(6, WIDTH))
    write_shard(tmp_path / "x.tar", [null], {"part": "1-of-1"})
    assert torch.equal(read_shards([tmp_path / "x.tar"]).batch([0], words=6).text_BLD, torch.zeros(1, 6, WIDTH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_keep_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """All 2^16 patterns of the half types, NaN with their payloads among them; batches are float32."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    latents = (patterns.view(dtype) if dtype.itemsize == 2 else patterns.int().view(dtype)).view(1, 1, 256, 256)
    text = torch.tensor([[1.0, 0.1], [0.0, 0.0]], dtype=dtype)
    path = tmp_path / "x.tar"
    write_shard(path, [Sample(0, "", 0, latents, text)], {"part": "1-of-1"})
    for memory in (0, 2**28):
        data = read_shards([path], memory=memory)
        read = data.samples[0]
        integers = torch.int16 if dtype.itemsize == 2 else torch.int32
        assert read.latents_CTHW.dtype == read.text_LD.dtype == dtype
        assert torch.equal(read.latents_CTHW.view(integers), latents.view(integers))
        assert torch.equal(read.text_LD, text[:1])
        batch = data.batch([0, 0], words=3)
        assert batch.latents_BCTHW.dtype == batch.text_BLD.dtype == torch.float32
        assert torch.equal(batch.latents_BCTHW[1].nan_to_num(), latents.float().nan_to_num())
    with tarfile.open(path) as tar:
        assert ("00000000.latents.safetensors" in tar.getnames()) == (dtype == torch.bfloat16)


def test_other_types_become_float32(tmp_path: Path) -> None:
    double = replace(sample(0), latents_CTHW=torch.full((1, 1, 1, 2), 1 / 3, dtype=torch.float64).mT)
    write_shard(tmp_path / "x.tar", [double], {"part": "1-of-1"})
    read = read_shards([tmp_path / "x.tar"]).samples[0].latents_CTHW
    assert read.dtype == torch.float32 and torch.equal(read, double.latents_CTHW.float())


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"[]",
        b"3",
        b"{",
        b'{"latents":{"dtype":"F64","shape":[3,2,2,2],"data_offsets":[0,48]}}',
        b'{"latents":{"dtype":"BF16","shape":[3,2,2],"data_offsets":[0,48]}}',
        b'{"latents":{"dtype":"BF16","shape":[3,2,2,3],"data_offsets":[0,48]}}',
        b'{"latents":{"dtype":"BF16","shape":[-3,-2,2,2],"data_offsets":[0,48]}}',
        b'{"latents":{"dtype":"BF16","shape":3}}',
        b'{"latents":7}',
        b'{"latents":{"dtype":"BF16","shape":[3,2,2,2]},"more":{}}',
        b" " * 5000,
    ],
)
def test_safetensors_of_another_kind_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.tar"
    samples = [replace(sample(index), latents_CTHW=sample(index).latents_CTHW.bfloat16()) for index in range(2)]
    write_shard(path, samples, {"part": "1-of-1"})
    content = len(header).to_bytes(8, "little") + header + bytes(48)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_shards([rewritten(path, "00000001.latents.safetensors", content)])


def test_manifest_tells_of_each_sample(tmp_path: Path) -> None:
    """The hash is of what a sample shows: another number or seed has the same, another prompt, text or latent not."""
    changed = [
        sample(0),
        replace(sample(0), index=1, seed=7),
        replace(sample(0), index=2, prompt="another"),
        replace(sample(0), index=3, text_LD=sample(1).text_LD),
        replace(sample(0), index=4, latents_CTHW=-sample(0).latents_CTHW),
        replace(sample(0), index=5, latents_CTHW=sample(0).latents_CTHW.half().float()),
        replace(sample(0), index=6, latents_CTHW=sample(0).latents_CTHW.half()),
    ]
    write_shard(tmp_path / "x.tar", changed, {"part": "1-of-1"})
    lines = read_json(tmp_path / "x.tar.json")["samples"]
    assert [(line["index"], line["seed"]) for line in lines] == [(0, 100), (1, 7), *((k, 100) for k in range(2, 7))]
    assert lines[0]["sha256"] == lines[1]["sha256"] and len({line["sha256"] for line in lines}) == 6


def test_webdataset_reads_it(tmp_path: Path) -> None:
    paths = write_set(tmp_path, 1)
    read = list(webdataset.WebDataset(str(paths[0]), shardshuffle=False).decode())
    assert [item["__key__"] for item in read] == [f"{index:08d}" for index in range(TOTAL)]
    for index, item in enumerate(read):
        assert item["json"] == {"prompt": sample(index).prompt, "index": index, "seed": 100 + index}
        assert np.array_equal(item["latents.npy"], sample(index).latents_CTHW.numpy())
        assert item["text.npy"].shape == (2 + index % 3, WIDTH)  # without the padding


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    one, two = write_set(tmp_path / "one"), write_set(tmp_path / "two")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert sha256_file(one[0]) == read_json(f"{one[0]}.json")["sha256"]


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_bit(path, 700),
        lambda path: flip_bit(path, -600),
        lambda path: path.write_bytes(path.read_bytes()[:-1024]),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(b""),
        Path.unlink,
    ],
    ids=["flipped", "flipped late", "truncated", "zeroed", "empty", "missing"],
)
def test_damaged_shard_is_named(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    paths = write_set(tmp_path)
    damage(paths[1])
    with pytest.raises(UserError, match=re.escape(str(paths[1]))):
        read_shards(paths)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"count": 3, "part": "2-of-2", "sha256": "0"}'])
def test_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    paths = write_set(tmp_path)
    Path(f"{paths[1]}.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(paths[1]))):
        read_shards(paths)


def test_wrong_sets_are_refused(tmp_path: Path) -> None:
    paths = write_set(tmp_path / "a", 3)
    with pytest.raises(UserError, match="1-of-3, 2-of-3"):
        read_shards(paths[:2])
    with pytest.raises(UserError, match="given twice"):
        read_shards([*paths, paths[0]])
    copy = tmp_path / "copy.tar"
    copy.write_bytes(paths[0].read_bytes())
    Path(f"{copy}.json").write_bytes(Path(f"{paths[0]}.json").read_bytes())
    with pytest.raises(UserError, match="exactly once"):
        read_shards([*paths, copy])
    other = write_set(tmp_path / "b", 3, teacher_sha256="another")
    with pytest.raises(UserError, match="teacher_sha256 differs"):
        read_shards([paths[0], other[1], paths[2]])
    with pytest.raises(UserError, match="no shards"):
        read_shards([])


@pytest.mark.parametrize(
    ("indices", "message"),
    [([[0, 1], [1, 2]], "sample 1 is in"), ([[0, 1], [3]], "sample 2 is in none"), ([[], []], "no")],
)
def test_indices_must_be_each_once(tmp_path: Path, indices: list[list[int]], message: str) -> None:
    paths = [tmp_path / f"{number}.tar" for number in (1, 2)]
    for number, (path, chosen) in enumerate(zip(paths, indices, strict=True), start=1):
        write_shard(path, map(sample, chosen), {"part": f"{number}-of-2"})
    with pytest.raises(UserError, match=message):
        read_shards(paths)


def rewritten(path: Path, name: str, content: bytes) -> Path:
    """A tar in which one member is replaced, with a manifest that vouches for it."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for member, old in members:
            new = content if member.name == name else old
            member.size = len(new)
            tar.addfile(member, io.BytesIO(new))
    write_json(f"{path}.json", read_json(f"{path}.json") | {"sha256": sha256_file(path)})
    return path


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_large_set_stays_on_disk(tmp_path: Path) -> None:
    """Of 32 MiB, reading one sample after the other never holds more than a few."""
    shape = (4, 1, 256, 256)  # 1 MiB
    samples = (Sample(i, "", 0, torch.full(shape, float(i)), torch.ones(1, WIDTH)) for i in range(32))
    write_shard(tmp_path / "x.tar", samples, {"part": "1-of-1"})
    tracemalloc.start()
    try:
        dataset = read_shards([tmp_path / "x.tar"], memory=0)
        assert [float(dataset.batch([i], words=1).latents_BCTHW[0, 3, 0, 255, 255]) for i in range(32)] == list(
            range(32)
        )
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("parts", [1, 3])
def test_samples_on_disk_are_those_in_memory(tmp_path: Path, parts: int) -> None:
    paths = write_set(tmp_path, parts)
    on_disk, in_memory = read_shards(paths, memory=0), read_shards(paths)
    assert isinstance(in_memory.samples, list) and not isinstance(on_disk.samples, list)
    assert len(on_disk) == TOTAL and len(list(on_disk.samples)) == TOTAL
    for index in [*range(TOTAL), -1]:
        assert on_disk.samples[index].index == index % TOTAL
        assert torch.equal(on_disk.samples[index].latents_CTHW, in_memory.samples[index].latents_CTHW)
        assert torch.equal(on_disk.samples[index].text_LD, in_memory.samples[index].text_LD)
    assert on_disk.sha256 == in_memory.sha256 == tuple(sha256_file(path) for path in paths)


def test_shard_that_changes_after_verification_is_named(tmp_path: Path) -> None:
    """Sample 3 is the second of shard 2; its neighbours can still be read."""
    paths = write_set(tmp_path)
    dataset = read_shards(paths, memory=0)
    with tarfile.open(paths[1]) as tar:
        offsets = {member.name: member.offset_data for member in tar}
    flip_bit(paths[1], offsets["00000003.latents.npy"] - 300)  # in the header of the member
    for _ in range(2):
        with pytest.raises(UserError, match=f"sample 3 of shard {re.escape(str(paths[1]))} cannot be read"):
            dataset.batch([2, 3], words=6)
    assert dataset.batch([2, 5, 4], words=6).prompts[1] == sample(5).prompt
    paths[1].unlink()
    with pytest.raises(UserError, match=f"sample 5 of shard {re.escape(str(paths[1]))} cannot be read"):
        dataset.batch([5], words=6)
    paths[1].write_bytes(paths[0].read_bytes())  # the same shapes, other samples
    with pytest.raises(UserError, match="changed since it was verified"):
        dataset.batch([3], words=6)


def test_shapes_must_be_equal(tmp_path: Path) -> None:
    other = replace(sample(1), latents_CTHW=torch.zeros(3, 2, 4, 1))  # as many bytes
    write_shard(tmp_path / "x.tar", [sample(0), other], {"part": "1-of-1"})
    with pytest.raises(UserError, match=re.escape("different shapes: [((3, 2, 2, 2), 4), ((3, 2, 4, 1), 4)]")):
        read_shards([tmp_path / "x.tar"])


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        npy(np.zeros((3, 2, 2, 2))),
        npy(np.zeros((3, 2, 2, 2), ">f4")),
        npy(np.asfortranarray(np.random.rand(3, 2, 2, 2).astype("f4"))),
        npy(np.zeros((3, 2, 4), "f4")),
        npy(np.zeros((3, 2, 2, 2), "f4"))[:-4],
        npy(np.zeros((3, 2, 2, 2), "f4")) + bytes(4),
        b"",
    ],
    ids=["float64", "big endian", "fortran", "three dimensions", "short", "long", "empty"],
)
def test_array_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    paths = write_set(tmp_path, 1)
    with pytest.raises(UserError, match=re.escape(str(paths[0]))):
        read_shards([rewritten(paths[0], "00000002.latents.npy", content)])


def test_progress_counts_shards(tmp_path: Path) -> None:
    counts: list[int] = []
    read_shards(write_set(tmp_path, 4), advance=counts.append)
    assert counts == [1, 1, 1, 1]


def test_member_that_would_run_code_is_refused(tmp_path: Path) -> None:
    paths = write_set(tmp_path, 1)
    trap, buffer = tmp_path / "sprung", io.BytesIO()
    np.save(buffer, np.array([Trap(trap)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=re.escape(str(paths[0]))):
        read_shards([rewritten(paths[0], "00000002.latents.npy", buffer.getvalue())])
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"[" * 100000, json.dumps({"index": 2}).encode()),
        *(json.dumps({"index": index, "prompt": "", "seed": 0}).encode() for index in (-1, 2.0, "2", 2**64)),
    ],
)
def test_member_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    paths = write_set(tmp_path, 1)
    with pytest.raises(UserError, match=re.escape(str(paths[0]))):
        read_shards([rewritten(paths[0], "00000002.json", content)])


def test_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    def samples():  # type: ignore[no-untyped-def]
        yield sample(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.tar", samples(), {"part": "1-of-1"})
    assert not list(tmp_path.iterdir())


# --- Parts and order


@pytest.mark.parametrize(("parts", "total"), [(1, 5), (3, 10), (4, 4), (5, 3)])
def test_parts_share_out_everything(parts: int, total: int) -> None:
    shares = [part_indices(f"{number}-of-{parts}", total) for number in range(1, parts + 1)]
    assert sorted(index for share in shares for index in share) == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("part", ["0-of-2", "3-of-2", "1of2", "", "1-of-2 ", "a-of-b", "-1-of-2"])
def test_wrong_part(part: str) -> None:
    with pytest.raises(UserError, match="1-of-4"):
        part_indices(part, 10)


@pytest.mark.parametrize(("n", "batch"), [(10, 10), (10, 3), (7, 5), (5, 12), (1, 4), (97, 16)])
def test_stream_of_batches_is_a_permutation_per_epoch(n: int, batch: int) -> None:
    epochs = 3
    steps = -(-n * epochs // batch)
    stream = [index for step in range(steps) for index in batch_indices(n, batch, 0, step)]
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert len(stream) == steps * batch


def test_order_is_a_function_of_seed_and_step() -> None:
    forwards = [batch_indices(1000, 7, 3, step) for step in range(300)]
    backwards = [batch_indices(1000, 7, 3, step) for step in reversed(range(300))]
    assert forwards == backwards[::-1]
    assert forwards[0] != batch_indices(1000, 7, 4, 0)
    assert batch_indices(1000, 1000, 3, 0) != batch_indices(1000, 1000, 3, 1)


def test_order_does_not_depend_on_the_batch_size() -> None:
    small = [index for step in range(60) for index in batch_indices(50, 4, 0, step)]
    large = [index for step in range(10) for index in batch_indices(50, 24, 0, step)]
    assert small == large


def test_order_is_uniform() -> None:
    """The 6 orders of three samples come up about equally often: chi-squared, 5 degrees of freedom, p = 0.001."""
    orders = Counter(tuple(batch_indices(3, 3, 0, step)) for step in range(1200))
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 20.5
    assert len(orders) == 6
