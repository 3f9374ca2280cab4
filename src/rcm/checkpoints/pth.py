"""`.pth` files: a flat state as `torch.save` writes it, read and written one tensor at a time.

Such a file is a zip archive: a pickle that says which tensor is which part of which record, and the records. The pickle
is read by an unpickler that knows tensors and nothing else, so nothing that a file brings along is run; the records are
read when they are asked for, into the place where they are wanted, and their checksums compared on the way (torch.load
does not). Neither the file nor a copy of it is ever in memory as a whole, nor mapped.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rcm.artefact import UserError, atomic_file, reason
from rcm.checkpoints.flat import State, checked, raw
from rcm.checkpoints.keys import OUTER, is_weight, official
from rcm.checkpoints.lazy import LazyState, lazy

_CHUNK = 2**24  # bytes read at once
_ALIGNMENT = 64  # bytes; of the records, as torch.save aligns them
_STORAGES = {  # data types younger than these have no class of storage
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


# --- Reading ---------------------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    record: str
    dtype: torch.dtype | None  # None: bytes, typed by the tensor
    length: int  # in elements


@dataclass(frozen=True)
class _Entry:
    """A tensor of the pickle: a view of a record."""

    record: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # in elements

    @property
    def span(self) -> int:
        """Elements of the record from the first to the last that it uses."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return last + 1 if math.prod(self.shape) else 0


class _Known:
    """A function that a pickle may call; without attributes, so that a pickle cannot change it."""

    __slots__ = ("call",)
    call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it sets attributes")

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


def _entry(storage: _Storage, offset: int, shape: Any, stride: Any, _grad: bool, _hooks: Any, *more: Any) -> _Entry:
    dtype = storage.dtype if storage.dtype is not None else more[0]
    sizes = tuple(map(int, shape)), tuple(map(int, stride))
    if len(sizes[0]) != len(sizes[1]) or min((offset, *sizes[0], *sizes[1])) < 0:
        raise pickle.UnpicklingError("a tensor with impossible sizes")
    return _Entry(storage.record, dtype, *sizes, offset)


_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _Known(lambda sizes=(): tuple(sizes)),
    ("torch._utils", "_rebuild_tensor_v2"): _Known(_entry),
    ("torch._utils", "_rebuild_tensor_v3"): _Known(_entry),
    ("torch._utils", "_rebuild_parameter"): _Known(lambda entry, *_: entry),
    ("torch._utils", "_rebuild_parameter_with_state"): _Known(lambda entry, *_: entry),
    ("torch.storage", "UntypedStorage"): None,
    ("_io", "BytesIO"): io.BytesIO,  # TransformerEngine's `_extra_state`
    ("_codecs", "encode"): _Known(lambda text, _: text.encode("latin1")),  # how the above holds its bytes
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, record, _, length = identity
        if kind != "storage":
            raise pickle.UnpicklingError(f"it holds a {kind}")
        return _Storage(str(record), dtype, int(length))


def open_pth(path: Path | str) -> LazyState:
    """A `.pth` as a lazy state under official names (`rcm.checkpoints.keys`).

    A missing or damaged file, one that would run code, and one that is not a flat dict of tensors (but for one outer
    level such as {"model": ...}) are UserErrors: damage of the pickle at once, of a tensor when it is read. The format
    before torch 1.6 has no records and is read as a whole.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist or is not a file")
    try:
        if not zipfile.is_zipfile(path):
            return _renamed(lazy(checked(_inner(torch.load(path, "cpu", weights_only=True)), str(path)), str(path)))
        archive = zipfile.ZipFile(path)
        index = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        folder = index.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        content = _inner(_Unpickler(io.BytesIO(archive.read(index))).load())
        entries = _entries(content, str(path))
        records = {entry.record: archive.getinfo(f"{folder}data/{entry.record}") for entry in entries.values()}
        _check_bounds(path, entries, records)
    except UserError:
        raise
    except Exception as error:  # a damaged archive or pickle fails in many ways
        raise _unreadable(path, error) from error
    return _renamed(_Records(path, archive, entries, records).state())


def _renamed(state: LazyState) -> LazyState:
    return state.renamed(official(state))


def _inner(content: Any) -> Any:
    """The dict of tensors in a dict of nothing else."""
    if isinstance(content, Mapping) and len(content) == 1 and next(iter(content)) in OUTER:
        inner = next(iter(content.values()))
        return inner if isinstance(inner, Mapping) else content
    return content


def _entries(content: Any, where: str) -> dict[str, _Entry]:
    expected = "expected a flat dict of tensors by parameter name"
    if not isinstance(content, Mapping):
        kind = "Tensor" if isinstance(content, _Entry) else type(content).__name__
        raise UserError(f"{where} holds a {kind}; {expected}")
    weights = {name: value for name, value in content.items() if not isinstance(name, str) or is_weight(name)}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, _Entry):
            kind = "Tensor" if isinstance(value, _Entry) else type(value).__name__
            raise UserError(f"{where} holds {name!r} of type {kind}; {expected}")
    if not weights:
        raise UserError(f"{where} holds no tensors; {expected}")
    return weights


def _check_bounds(path: Path, entries: Mapping[str, _Entry], records: Mapping[str, zipfile.ZipInfo]) -> None:
    length = path.stat().st_size
    for record in records.values():
        if record.compress_type != zipfile.ZIP_STORED or record.header_offset + record.file_size > length:
            raise ValueError(f"record {record.filename} is compressed or cut short")
    for name, entry in entries.items():
        if (entry.offset + entry.span) * entry.dtype.itemsize > records[entry.record].file_size:
            raise ValueError(f"{name} is larger than its record")


@dataclass(frozen=True)
class _Records:
    """The records of an open archive."""

    path: Path
    archive: zipfile.ZipFile
    entries: Mapping[str, _Entry]
    records: Mapping[str, zipfile.ZipInfo]
    intact: set[str] = field(default_factory=set)  # records whose checksum was compared

    def state(self) -> LazyState:
        described = {
            name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in self.entries.items()
        }
        return LazyState(described, self._fill)

    def _fill(self, name: str, out: Tensor) -> None:
        entry = self.entries[name]
        try:
            if _is_contiguous(entry):
                self._read(entry, raw(out))
            else:
                span = torch.empty(entry.span, dtype=entry.dtype)
                self._read(entry, raw(span))
                out.copy_(span.as_strided(entry.shape, entry.stride))
        except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
            raise _unreadable(self.path, error) from error

    def _read(self, entry: _Entry, place: memoryview) -> None:
        """Fill `place` with the entry's part of its record; zipfile compares the checksum where all of it is read."""
        record, start, done = self.records[entry.record], entry.offset * entry.dtype.itemsize, 0
        with cast(zipfile.ZipExtFile, self.archive.open(record)) as file:
            if entry.record in self.intact:
                file.seek(start)
            else:
                _skip(file, start)
            while done < len(place):
                if not (count := file.readinto(place[done : done + _CHUNK])):
                    raise EOFError(f"{record.filename} ends early")
                done += count
            if entry.record not in self.intact:
                _skip(file, record.file_size - start - done + 1)
                self.intact.add(entry.record)


def _skip(file: Any, count: int) -> None:
    while count > 0 and (chunk := file.read(min(count, _CHUNK))):
        count -= len(chunk)


def _is_contiguous(entry: _Entry) -> bool:
    expected = 1
    for size, step in zip(reversed(entry.shape), reversed(entry.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, pickle.UnpicklingError):  # torch's advice about its options goes on for a paragraph
        return UserError(
            f"{path} is damaged, or holds Python objects other than tensors, which are not loaded (they can run code)"
        )
    return UserError(f"{path} is damaged or is not a PyTorch checkpoint ({reason(error)}); download or make it again")


def load_pth(path: Path | str) -> State:
    """Read a whole `.pth`, on the CPU and with its data types, as `open_pth` does."""
    return dict(open_pth(path))


# --- Writing ---------------------------------------------------------------------------------------------------------

_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}


class _Pickler(pickle.Pickler):
    """Writes `_Entry` as torch.save writes a tensor."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = torch.UntypedStorage if value.dtype is None else getattr(torch, _STORAGE_OF[value.dtype])
        return "storage", kind, value.record, "cpu", value.length

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Entry):
            return NotImplemented
        count = math.prod(value.shape)
        hooks: OrderedDict[str, Any] = OrderedDict()
        sizes = value.shape, value.stride, False, hooks
        if value.dtype in _STORAGE_OF:
            return torch._utils._rebuild_tensor_v2, (_Storage(value.record, value.dtype, count), 0, *sizes)
        storage = _Storage(value.record, None, count * value.dtype.itemsize)
        return torch._utils._rebuild_tensor_v3, (storage, 0, *sizes, value.dtype)


def save_pth(path: Path | str, state: Mapping[str, Tensor]) -> None:
    """Write a flat state to a `.pth`, one tensor at a time; equal states give equal bytes, whatever the file's name."""
    state = lazy(state, "the state to save")
    names = sorted(state)
    entries = {
        name: _Entry(str(number), value.dtype, tuple(value.shape), torch.empty_like(value).contiguous().stride(), 0)
        for number, (name, value) in enumerate((name, state.described[name]) for name in names)
    }
    index = io.BytesIO()
    _Pickler(index, protocol=2).dump(entries)
    with atomic_file(path) as temporary, closing(zipfile.ZipFile(temporary, "w")) as archive:
        _put(archive, "data.pkl", index.getbuffer())
        for name, content in ((".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little")):
            _put(archive, name, memoryview(content))
        for number, name in enumerate(names):
            _put(archive, f"data/{number}", raw(state[name]))
        _put(archive, "version", memoryview(b"3\n"))


def _put(archive: zipfile.ZipFile, name: str, content: memoryview) -> None:
    """Add a record whose content begins at a multiple of the alignment, so that it can be mapped."""
    info = zipfile.ZipInfo(f"archive/{name}")  # of 1980, the first year of zip
    info.file_size = len(content)
    header = 30 + len(info.filename) + (20 if info.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0) + 4
    padding = -(archive.start_dir + header) % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(info, "w") as file:
        for start in range(0, len(content), _CHUNK):
            file.write(content[start : start + _CHUNK])
