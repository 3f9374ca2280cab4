"""The published data set becomes shards bit by bit; nothing of it is executed, and what is torn is left out."""

import io
import pickle
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcm.artefact import UserError, read_json, sha256_file
from rcm.data.published import adopt, scan
from rcm.data.shards import read_lines, read_shards

WORDS, WIDTH = 8, 6


def tensors(key: int) -> tuple[Tensor, Tensor]:
    """Latents and padded text in bfloat16, as views into a batch, which drag it into the file."""
    generator = torch.Generator().manual_seed(key)
    latents = torch.randn(2, 16, 3, 4, 5, generator=generator).bfloat16()
    text = torch.zeros(2, WORDS, WIDTH, dtype=torch.bfloat16)
    text[:, : 1 + key % WORDS] = torch.randn(2, 1 + key % WORDS, WIDTH, generator=generator)
    return latents[1], text[1]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def members(key: int) -> dict[str, bytes]:
    """As the builder writes them."""
    latents, text = tensors(key)
    name = f"{key:09d}"
    return {
        f"{name}.latent.pt": saved(latents),
        f"{name}.embed.pt": saved(text),
        f"{name}.prompt.txt": f"prompt {key} 猫".encode(),
    }


def write_tar(path: Path, *contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for content in contents:
            for name, value in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))
    return path


def adopted(tars: list[Path], folder: Path, **options: object) -> list[Path]:
    adopt([scan(path) for path in tars], folder, **{"name": "set", "seed": 0, **options})  # type: ignore[arg-type]
    return sorted(folder.glob("*.tar"))


def test_bits_prompts_and_seeds_survive(tmp_path: Path) -> None:
    tars = [
        write_tar(tmp_path / f"shard_{k:06d}.tar", *map(members, range(3 * k, min(3 * k + 3, 8)))) for k in range(3)
    ]
    counts: list[int] = []
    shards = adopted(tars, tmp_path / "new", seed=7, advance=counts.append)
    assert [path.name for path in shards] == ["1-of-3.tar", "2-of-3.tar", "3-of-3.tar"] and sum(counts) == 8
    data = read_shards(shards)
    assert data.manifest == {"adopted": "set", "seed": 7}
    for key, sample in enumerate(data.samples):
        latents, text = tensors(key)
        assert (sample.index, sample.prompt, sample.seed) == (key, f"prompt {key} 猫", 7 + key)
        for ours, theirs in ((sample.latents_CTHW, latents), (sample.text_LD, text[: 1 + key % WORDS])):
            assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    batch = data.batch([5], words=WORDS)
    assert batch.latents_BCTHW.dtype == torch.float32 and torch.equal(batch.latents_BCTHW[0], tensors(5)[0].float())
    manifest = read_json(f"{shards[1]}.json")
    assert manifest["source"] == {"file": "shard_000001.tar", "sha256": sha256_file(tars[1])}


def test_parts_of_the_work_and_of_the_data_set(tmp_path: Path) -> None:
    """Of the data set's tars only two: samples are numbered anew, seeds are their own."""
    tars = [write_tar(tmp_path / f"{k}.tar", members(10 * k), members(10 * k + 1)) for k in (3, 1)]
    for part in ("2-of-2", "1-of-2"):
        shards = adopted(tars, tmp_path / "new", share=part)
    assert [(line["index"], line["seed"]) for line in read_lines(shards)] == [(2, 30), (3, 31), (0, 10), (1, 11)]
    assert adopted(tars, tmp_path / "whole") and all(
        (tmp_path / "whole" / path.name).read_bytes() == path.read_bytes() for path in shards
    )


def test_what_a_killed_builder_leaves(tmp_path: Path) -> None:
    """Samples that lack members are left out, what was appended later counts, and other files are passed over."""
    first, second, third = (members(key) for key in (0, 1, 2))
    torn = dict(list(first.items())[:1]) | {"000000000.embed.pt": b"torn"}
    lacking = dict(list(third.items())[:2])
    path = write_tar(tmp_path / "x.tar", {"README.txt": b"about"}, torn, second, lacking, first)
    assert (list(scan(path).places), scan(path).torn) == ([0, 1], 1)
    data = read_shards(adopted([path], tmp_path / "new"))
    assert [sample.prompt for sample in data.samples] == ["prompt 0 猫", "prompt 1 猫"]
    assert torch.equal(data.samples[0].text_LD, tensors(0)[1][:1])


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def compressed(content: bytes) -> bytes:
    """The same archive, smaller."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def test_what_would_fill_the_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(
        tmp_path / "x.tar", members(0) | {"000000000.latent.pt": compressed(saved(torch.zeros(1, 1, 99, 99)))}
    )
    monkeypatch.setattr("torch.load", None)
    with pytest.raises(UserError, match=r"latent\.pt of sample 000000000 .* is refused: .*\(ValueError\)"):
        adopted([path], tmp_path / "new")


@pytest.mark.parametrize(
    ("member", "content", "said"),
    [
        ("latent.pt", lambda trap: saved(Trap(trap)), "refused: it is damaged, or holds more than a tensor"),
        (
            "latent.pt",
            lambda trap: pickle.dumps(Trap(trap), protocol=2),
            "refused: it is damaged, or holds more than a tensor",
        ),
        ("latent.pt", lambda _: saved(tensors(1)[0])[:-100], "refused: it is damaged"),
        ("latent.pt", lambda _: b"", "refused: it is damaged"),
        ("embed.pt", lambda _: saved({"embed": torch.zeros(2, 3)}), "holds dict, where a dense tensor"),
        ("embed.pt", lambda _: saved(torch.zeros(2, 3).to_sparse()), "holds Tensor, where a dense tensor"),
        ("embed.pt", lambda _: saved(torch.zeros(1, 2, 3)), r"torch.float32 \(1, 2, 3\), where 2 dimensions"),
        ("embed.pt", lambda _: saved(torch.zeros(2, 3, dtype=torch.int64)), "torch.int64"),
        ("latent.pt", lambda _: saved(torch.zeros(1).expand(16, 2**15, 2**15, 2**15)), "claims .* bytes, and has"),
        ("prompt.txt", lambda _: b"\xff", "the prompt of sample 000000001 of .* is not UTF-8"),
    ],
)
def test_members_that_are_refused(tmp_path: Path, member: str, content, said: str) -> None:  # type: ignore[no-untyped-def]
    trap = tmp_path / "sprung"
    path = write_tar(tmp_path / "x.tar", members(0), members(1) | {f"000000001.{member}": content(trap)})
    with pytest.raises(UserError, match=said) as caught:
        adopted([path], tmp_path / "new")
    assert str(path) in str(caught.value) and "000000001" in str(caught.value)
    assert not trap.exists() and not list((tmp_path / "new").glob("*"))


def test_tars_that_are_refused(tmp_path: Path) -> None:
    one, two = (write_tar(tmp_path / f"{name}.tar", members(4)) for name in ("one", "two"))
    with pytest.raises(UserError, match="sample 000000004 is in more than one of the tars"):
        adopted([one, two], tmp_path / "new")
    with pytest.raises(UserError, match=r"empty\.tar holds no samples: expected members such as 000000000\.latent\.pt"):
        scan(write_tar(tmp_path / "empty.tar", {"x.txt": b""}))
    one.write_bytes(one.read_bytes()[:700])
    with pytest.raises(UserError, match=r"one\.tar cannot be read .* download it again"):
        scan(one)
    with tarfile.open(one, "w") as tar:
        link = tarfile.TarInfo("000000000.latent.pt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"000000000\.latent\.pt is not a file"):
        scan(one)
    shard = write_tar(tmp_path / "1-of-1.tar", members(0))
    with pytest.raises(UserError, match="would replace one of the tars"):
        adopted([shard], tmp_path)


def test_one_sample_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Of 16 samples of 1 MiB each."""
    contents = [members(key) | {f"{key:09d}.latent.pt": saved(torch.zeros(4, 1, 256, 256))} for key in range(16)]
    path = write_tar(tmp_path / "x.tar", *contents)
    del contents
    tracemalloc.start()
    try:
        adopted([path], tmp_path / "new")
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
    finally:
        tracemalloc.stop()
