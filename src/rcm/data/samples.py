"""A sample as three members of a tar, as webdataset has them, and as tensors.

`KEY.json` (prompt, index, seed), `KEY.latents.npy` (C, T, H, W) and `KEY.text.npy` (words, D), both float32, follow one
another, so that a sample can be read from the byte where it begins.
"""

import io
import json
import math
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rcm.artefact import UserError, reason

_SUFFIXES = ("json", "latents.npy", "text.npy")


@dataclass(frozen=True)
class Sample:
    """One latent of the teacher; `index` is global over all shards, `seed` that of its noise."""

    index: int
    prompt: str
    seed: int
    latents_CTHW: Tensor
    text_LD: Tensor

    @property
    def shapes(self) -> tuple[tuple[int, ...], int]:
        """Shape of the latents and width of a word."""
        return tuple(self.latents_CTHW.shape), self.text_LD.shape[1]


@dataclass(frozen=True)
class Entry:
    """What the headers say of a sample: its index, the byte at which it begins, and `Sample.shapes`."""

    index: int
    start: int
    shapes: tuple[tuple[int, ...], int]


def write_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    """Append a sample; zero rows at the end of its text are padding and not stored. Equal samples give equal bytes."""
    facts = {"prompt": sample.prompt, "index": sample.index, "seed": sample.seed}
    used = sample.text_LD.ne(0).any(dim=1).nonzero()
    text_LD = sample.text_LD[: int(used[-1]) + 1] if len(used) else sample.text_LD[:0]
    contents = json.dumps(facts, sort_keys=True).encode(), _npy(sample.latents_CTHW), _npy(text_LD)
    for suffix, content in zip(_SUFFIXES, contents, strict=True):
        member = tarfile.TarInfo(f"{sample.index:08d}.{suffix}")  # owner 0, time 0
        member.size = len(content)
        member.mode = 0o644
        tar.addfile(member, io.BytesIO(content))


def _npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(tensor.detach().cpu().float().numpy()), allow_pickle=False)
    return buffer.getvalue()


def read_sample(tar: tarfile.TarFile) -> Sample:
    """The next sample of a tar; an exception that `naming` knows if there is none."""
    members = _next_members(tar)
    if members is None:
        raise EOFError("the tar ends")
    facts, latents, text = members
    known = _facts(tar, facts)
    return Sample(known["index"], known["prompt"], known["seed"], _array(tar, latents, 4), _array(tar, text, 2))


def entries(tar: tarfile.TarFile) -> Iterator[Entry]:
    """All samples of a tar, of whose arrays only the headers are read."""
    while (members := _next_members(tar)) is not None:
        facts, latents, text = members
        shapes = _shape(_open(tar, latents), latents.size, 4), _shape(_open(tar, text), text.size, 2)[1]
        yield Entry(_facts(tar, facts)["index"], facts.offset, shapes)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn whatever unreadable bytes raise into a UserError that names them."""
    try:
        yield
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
        raise UserError(f"{what} cannot be read ({reason(error)}); make the shard again") from error


def _next_members(tar: tarfile.TarFile) -> list[tarfile.TarInfo] | None:
    members = [member for _ in _SUFFIXES if (member := tar.next()) is not None]
    if not members:
        return None
    names = [member.name for member in members]
    key = names[0].partition(".")[0]
    if names != [f"{key}.{suffix}" for suffix in _SUFFIXES]:
        raise ValueError(f"{', '.join(names)} are not the members of a sample")
    return members


def _open(tar: tarfile.TarFile, member: tarfile.TarInfo) -> io.BufferedReader:
    file = tar.extractfile(member) if member.isreg() else None
    if not isinstance(file, io.BufferedReader):
        raise ValueError(f"{member.name} is not a file")
    return file


def _facts(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    facts = json.loads(_open(tar, member).read())
    if not isinstance(facts["index"], int) or not 0 <= facts["index"] <= sys.maxsize:
        raise ValueError(f"{facts['index']!r} is not an index")
    return {"index": facts["index"], "prompt": facts["prompt"], "seed": facts["seed"]}


def _array(tar: tarfile.TarFile, member: tarfile.TarInfo, dimensions: int) -> Tensor:
    file = _open(tar, member)
    shape = _shape(file, member.size, dimensions)
    array = np.empty(shape, np.float32)
    if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:  # halves the time of `read` and a copy
        raise EOFError(f"{member.name} ends early")
    return torch.from_numpy(array)


def _shape(file: io.BufferedReader, size: int, dimensions: int) -> tuple[int, ...]:
    """Shape of a float32 array of so many dimensions, which must fill the `size` bytes; leaves the file at its data."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of .npy than 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.float32 or fortran_order or len(shape) != dimensions:
        raise ValueError(f"{dtype} {shape} is not an array of {dimensions} dimensions in float32")
    if size - file.tell() != 4 * math.prod(shape):
        raise ValueError(f"an array {shape} does not have {size - file.tell()} bytes")
    return shape
