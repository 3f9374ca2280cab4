"""The published data set of latents, read as the shards of this project.

Its tars (`worstcoder/Wan_datasets` on the Hugging Face Hub, 256 samples each) are those of the authors' public code,
`rcm/datasets/build_synthetic_dataset.py` of NVlabs/rcm, which writes for the sample KEY (nine digits)

    KEY.latent.pt    latents (C, T, H, W), bfloat16; 16 x 21 x 60 x 104 for 81 frames of 480p, 16:9
    KEY.embed.pt     text (512, 4096) of umT5-XXL, bfloat16, zeros behind the end of the prompt
    KEY.prompt.txt   the prompt, UTF-8

and draws the noise with the seed BASE + KEY. Where that program was killed it appended later, so members of a sample
may lie apart, come twice (the last one counts) or be missing (the sample is left out).
"""

import io
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from rcm.artefact import UserError, verified_sha256
from rcm.data.samples import Sample, naming
from rcm.data.shards import part_indices, write_shard

_MEMBER = re.compile(r"(?:\./)?(\d+)\.(latent\.pt|embed\.pt|prompt\.txt)")
_TYPES = (torch.bfloat16, torch.float16, torch.float32)

Place = tuple[int, int]  # first byte of a member's content, and how many they are


@dataclass(frozen=True)
class PublishedTar:
    """Where the members of the whole samples of one tar lie, by key; `torn` samples lack some."""

    path: Path
    places: dict[int, dict[str, Place]]
    torn: int


def scan(path: Path) -> PublishedTar:
    """Find the samples of a tar; nothing but headers is read."""
    found: dict[int, dict[str, Place]] = {}
    try:
        with naming(f"tar {path}"), tarfile.open(path, "r:") as tar:
            for member in tar:
                if match := _MEMBER.fullmatch(member.name):
                    if not member.isreg():
                        raise ValueError(f"{member.name} is not a file")
                    found.setdefault(int(match[1]), {})[match[2]] = member.offset_data, member.size
    except UserError as error:
        raise UserError(str(error).replace("make the shard again", "download it again")) from None
    whole = {key: places for key, places in sorted(found.items()) if len(places) == 3}
    if not whole:
        raise UserError(
            f"{path} holds no samples: expected members such as 000000000.latent.pt, .embed.pt, .prompt.txt"
        )
    return PublishedTar(path, whole, len(found) - len(whole))


def adopt(
    tars: Sequence[PublishedTar],
    folder: Path,
    *,
    name: str,
    seed: int,
    share: str = "1-of-1",
    advance: Callable[[int], None] = lambda count: None,
) -> dict[Path, str]:
    """Write the k-th of n tars as the shard k-of-n.tar of `folder`, with its manifest; returns the SHA-256 of each tar.

    Samples are numbered 0 ... N-1 in the order of their keys; where all tars of the data set are given, these are the
    keys. Tensors keep their type and bits. One sample is in memory at a time.

    Args:
        tars: those of the whole set to be, whatever the share.
        name: what the data set is called, for the manifests.
        seed: BASE of the seeds.
        share: "k-of-n", which of the tars to write.
        advance: called with the number of samples written since the last call.

    Raises UserError for a key that comes twice, and for a member that is not what it should be or would run code.
    """
    keys = sorted(key for tar in tars for key in tar.places)
    for one, other in pairwise(keys):
        if one == other:
            raise UserError(f"the sample {one:09d} is in more than one of the tars; give each tar once")
    index = {key: place for place, key in enumerate(keys)}
    hashes: dict[Path, str] = {}
    for number in part_indices(share, len(tars)):
        tar, part = tars[number], f"{number + 1}-of-{len(tars)}"
        out = folder / f"{part}.tar"
        if out.exists() and any(out.samefile(tar.path) for tar in tars):
            raise UserError(f"{out} would replace one of the tars that are read; choose another folder")

        def samples(tar: PublishedTar = tar) -> Iterator[Sample]:
            for key, latents, text, prompt in _read(tar):
                yield Sample(index[key], prompt, seed + key, latents, text)
                advance(1)

        hashes[tar.path] = verified_sha256(tar.path)
        source = {"file": tar.path.name, "sha256": hashes[tar.path]}
        write_shard(out, samples(), {"part": part, "adopted": name, "seed": seed, "source": source})
    return hashes


def _read(tar: PublishedTar) -> Iterator[tuple[int, Tensor, Tensor, str]]:
    """Key, latents, text and prompt of the samples."""
    with tar.path.open("rb") as file:
        for key, places in tar.places.items():

            def content(member: str, places: dict[str, Place] = places) -> bytes:
                start, size = places[member]
                file.seek(start)
                return file.read(size)

            where = f"{key:09d} of {tar.path}"
            try:
                prompt = content("prompt.txt").decode("utf-8")
            except UnicodeDecodeError:
                raise UserError(f"the prompt of sample {where} is not UTF-8 text") from None
            latents = _tensor(content("latent.pt"), 4, f"latent.pt of sample {where}")
            yield key, latents, _tensor(content("embed.pt"), 2, f"embed.pt of sample {where}"), prompt


def _tensor(content: bytes, dimensions: int, what: str) -> Tensor:
    """The one tensor that was saved; nothing else is unpickled."""
    try:
        if content.startswith(b"PK"):  # torch's test of an archive
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if sum(record.file_size for record in archive.infolist()) > len(content):
                    raise ValueError("records that are compressed, or one as several, may need more than the memory")
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever PyTorch makes of bytes that are no tensor
        raise UserError(
            f"{what} is refused: it is damaged, or holds more than a tensor ({type(error).__name__}); download it again"
        ) from None
    if type(value) is not Tensor or value.layout != torch.strided or value.is_quantized:
        raise UserError(f"{what} is refused: it holds {type(value).__name__}, where a dense tensor was expected")
    if value.ndim != dimensions or value.dtype not in _TYPES:
        raise UserError(f"{what} is {value.dtype} {tuple(value.shape)}, where {dimensions} dimensions were expected")
    if value.nbytes > len(content):  # a tensor that repeats few bytes over many
        raise UserError(f"{what} is refused: it claims {value.nbytes} bytes, and has {len(content)}")
    return value.clone(memory_format=torch.contiguous_format)
