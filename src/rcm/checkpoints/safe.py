"""`.safetensors` files, read and written one tensor at a time: a header of JSON, then the tensors' bytes.

The format has no checksums; what vouches for a file is the manifest of its download, or in an export of this project an
entry of the header.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rcm.artefact import UserError, json_value
from rcm.checkpoints.flat import raw, some
from rcm.checkpoints.lazy import LazyState

INDEX = ".safetensors.index.json"
_DTYPES = {  # in the order in which the format's own library writes them
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: (rank, name) for rank, (name, dtype) in enumerate(_DTYPES.items())}


def open_safetensors(path: Path) -> tuple[LazyState, dict[str, str]]:
    """A file's tensors under the names there, and the entries of its header; a UserError where it is damaged."""
    try:
        with safe_open(path, framework="pt"):  # checks the header, and the file's length against it
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json_value(file.read(length).decode())
        metadata = header.pop("__metadata__", None) or {}
        described = {
            name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
            for name, entry in header.items()
        }
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); download or make it again") from error
    places = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
    return LazyState(described, _Tensors(path, places).fill), metadata


@dataclass(frozen=True)
class _Tensors:
    path: Path
    places: Mapping[str, int]  # where each begins in the file

    def fill(self, name: str, out: Tensor) -> None:
        place, done = raw(out), 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.places[name])
            while done < len(place):
                if not (count := file.readinto(place[done:])):
                    raise UserError(f"{self.path} is damaged: it ends within {name}; download or make it again")
                done += count


def write_safetensors(path: Path, state: LazyState, metadata: Mapping[str, str]) -> None:
    """Write a lazy state, byte for byte as the format's own library would; not atomically."""
    names = sorted(state, key=lambda name: (_name(name, state.described[name])[0], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        value = state.described[name]
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _name(name, value)[1], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(raw(state[name]))


def _name(name: str, value: Tensor) -> tuple[int, str]:
    if value.dtype not in _NAMES:
        raise UserError(f"{name} is {value.dtype}, which safetensors does not have; expected {', '.join(_DTYPES)}")
    return _NAMES[value.dtype]


def open_folder(folder: Path) -> LazyState:
    """The tensors of a folder of `.safetensors` files with its index, or with one such file."""
    indices, files = sorted(folder.glob(f"*{INDEX}")), sorted(folder.glob("*.safetensors"))
    if len(indices) > 1 or (not indices and len(files) != 1):
        raise UserError(
            f"{folder} has {len(indices)} files *{INDEX} and {len(files)} files *.safetensors; expected one index, or "
            "one file of tensors"
        )
    if not indices:
        return open_safetensors(files[0])[0]
    index = read_index(indices[0])
    states = {file: open_safetensors(folder / file)[0] for file in sorted(set(index.values()))}
    if lost := sorted(name for name, file in index.items() if name not in states[file]):
        raise UserError(f"{folder} lacks {some(lost)}, which {indices[0].name} names; download it again")
    described = {name: states[file].described[name] for name, file in index.items()}
    return LazyState(described, lambda name, out: states[index[name]].copy_to(name, out))


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by an index; a UserError where it is damaged or not all files are beside it."""
    try:
        index = dict(json_value(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from error
    parts = sorted({str(file) for file in index.values()})
    if outside := [file for file in parts if Path(file).name != file]:
        raise UserError(f"{path} names {some(outside)}, outside of its folder; expected names of files beside it")
    if missing := [file for file in parts if not (path.parent / file).is_file()]:
        raise UserError(f"{path.parent} lacks {some(missing)}, which {path.name} names; download it again")
    return index
