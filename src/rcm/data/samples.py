"""A sample as three members of a tar, as webdataset has them, and as tensors.

`KEY.json` (prompt, index, seed), the latents (C, T, H, W) and the text (words, D) follow one another, so that a sample
can be read from the byte where it begins. Tensors keep their bits: float32 and float16 as `.npy`, and bfloat16, which
that format does not have, as `.safetensors`.
"""

import hashlib
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
from safetensors.torch import save
from torch import Tensor

from rcm.artefact import UserError, reason

_NPY = {np.dtype("<f4"): torch.float32, np.dtype("<f2"): torch.float16}
_SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADER = 4096  # bytes at most of a .safetensors with one tensor


@dataclass(frozen=True)
class Sample:
    """One latent of the teacher; `index` is global over all shards, its noise follows from `seed` (and the index)."""

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


# --- Writing -------------------------------------------------------------------------------------------------------


def stored(sample: Sample) -> Sample:
    """A sample as it is stored: zero rows at the end of its text are padding, other types become float32."""
    used = sample.text_LD.ne(0).any(dim=1).nonzero()
    text_LD = sample.text_LD[: int(used[-1]) + 1] if len(used) else sample.text_LD[:0]
    return Sample(sample.index, sample.prompt, sample.seed, _plain(sample.latents_CTHW), _plain(text_LD))


def _plain(tensor: Tensor) -> Tensor:
    known = tensor.dtype in _SAFETENSORS.values()
    return tensor.detach().cpu().to(tensor.dtype if known else torch.float32).contiguous()


def write_sample(tar: tarfile.TarFile, sample: Sample) -> dict[str, Any]:
    """Append a sample, as `stored` has it; equal samples give equal bytes. Returns its line of the manifest."""
    sample = stored(sample)
    facts = {"prompt": sample.prompt, "index": sample.index, "seed": sample.seed}
    _write(tar, f"{sample.index:08d}.json", json.dumps(facts, sort_keys=True).encode())
    for name, tensor in (("latents", sample.latents_CTHW), ("text", sample.text_LD)):
        if tensor.dtype == torch.bfloat16:
            _write(tar, f"{sample.index:08d}.{name}.safetensors", save({name: tensor}))
        else:
            buffer = io.BytesIO()
            np.save(buffer, tensor.numpy(), allow_pickle=False)
            _write(tar, f"{sample.index:08d}.{name}.npy", buffer.getvalue())
    return {"index": sample.index, "seed": sample.seed, "sha256": sample_sha256(sample)}


def _write(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner 0, time 0
    member.size = len(content)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(content))


def sample_sha256(sample: Sample) -> str:
    """SHA-256 of what a stored sample shows: prompt, latents and text; not of its index or seed."""
    digest = hashlib.sha256(json.dumps(sample.prompt).encode())
    for tensor in (sample.latents_CTHW, sample.text_LD):
        digest.update(str((str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def fault(sample: Sample) -> str | None:
    """What no latents or texts are: numbers that are not finite, latents that are one number everywhere; or None."""
    for name, tensor in (("latents", sample.latents_CTHW), ("text", sample.text_LD)):
        if not tensor.isfinite().all():
            return f"its {name} hold NaN" if tensor.isnan().any() else f"its {name} are infinite"
    if sample.latents_CTHW.numel() > 1 and (sample.latents_CTHW == sample.latents_CTHW.flatten()[0]).all():
        return "its latents are the same number everywhere"
    return None


# --- Reading -------------------------------------------------------------------------------------------------------


def read_sample(tar: tarfile.TarFile) -> Sample:
    """The next sample of a tar; an exception that `naming` knows if there is none."""
    members = _next_members(tar)
    if members is None:
        raise EOFError("the tar ends")
    facts, latents, text = members
    known = _facts(tar, facts)
    return Sample(known["index"], known["prompt"], known["seed"], _tensor(tar, latents, 4), _tensor(tar, text, 2))


def entries(tar: tarfile.TarFile) -> Iterator[Entry]:
    """All samples of a tar, of whose tensors only the headers are read."""
    while (members := _next_members(tar)) is not None:
        facts, latents, text = members
        shapes = _header(_open(tar, latents), latents, 4)[0], _header(_open(tar, text), text, 2)[0][1]
        yield Entry(_facts(tar, facts)["index"], facts.offset, shapes)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn whatever unreadable bytes raise into a UserError that names them."""
    try:
        yield
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
        raise UserError(f"{what} cannot be read ({reason(error)}); make the shard again") from error


def _next_members(tar: tarfile.TarFile) -> list[tarfile.TarInfo] | None:
    members = [member for _ in range(3) if (member := tar.next()) is not None]
    if not members:
        return None
    names = [member.name for member in members]
    key = names[0].partition(".")[0] if names[0][:1].isdigit() else ""  # no path
    stems = [name.removesuffix(".npy").removesuffix(".safetensors") for name in names]
    if stems != [f"{key}.json", f"{key}.latents", f"{key}.text"]:
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


def _tensor(tar: tarfile.TarFile, member: tarfile.TarInfo, dimensions: int) -> Tensor:
    file = _open(tar, member)
    shape, dtype = _header(file, member, dimensions)
    tensor = torch.empty(shape, dtype=dtype)
    if file.readinto(_bytes(tensor)) != tensor.nbytes:  # halves the time of `read` and a copy
        raise EOFError(f"{member.name} ends early")
    return tensor


def _header(file: io.BufferedReader, member: tarfile.TarInfo, dimensions: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of a tensor of so many dimensions, which must fill its member; leaves the file at its data."""
    shape, dtype = _npy_header(file) if member.name.endswith(".npy") else _safetensors_header(file)
    if len(shape) != dimensions:
        raise ValueError(f"{shape} is not the shape of an array of {dimensions} dimensions")
    if member.size - file.tell() != dtype.itemsize * math.prod(shape):
        raise ValueError(f"an array {shape} of {dtype} does not have {member.size - file.tell()} bytes")
    return shape, dtype


def _npy_header(file: io.BufferedReader) -> tuple[tuple[int, ...], torch.dtype]:
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of .npy than 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype not in _NPY or fortran_order:
        raise ValueError(f"an array of {dtype}, where float32 or float16 in C order was expected")
    return shape, _NPY[dtype]


def _safetensors_header(file: io.BufferedReader) -> tuple[tuple[int, ...], torch.dtype]:
    length = int.from_bytes(file.read(8), "little")
    if length > _HEADER:
        raise ValueError(f"a header of {length} bytes is not that of one tensor")
    (facts,) = dict(json.loads(file.read(length))).values()
    shape = tuple(facts["shape"])
    if facts["dtype"] not in _SAFETENSORS or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"a tensor of {facts['dtype']} {shape}, where bfloat16, float16 or float32 was expected")
    return shape, _SAFETENSORS[facts["dtype"]]
