"""`.pth` files: a flat state as `torch.save` writes it, read and written one tensor at a time.

Such a file holds a pickle that says which tensor is which part of which record, and the records. The pickle is read by
an unpickler that knows tensors and nothing else, so nothing that a file brings along is run; the records are read when
they are asked for, into the place where they are wanted, and their checksums compared on the way (torch.load does not).
Neither the file nor a copy of it is ever in memory as a whole, nor mapped.
"""

import io
import math
import os
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
from rcm.checkpoints.flat import State, raw
from rcm.checkpoints.keys import OUTER, is_weight, official
from rcm.checkpoints.lazy import LazyState, lazy

_CHUNK = 2**24  # bytes read at once
_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before torch 1.6
_INDEX_LIMIT = 2**26  # bytes of the pickle; that of a network of 1000 tensors has a tenth of a MB
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


def _entry(storage: _Storage, offset: int, shape: Any, stride: Any, *more: Any) -> _Entry:
    dtype = storage.dtype if storage.dtype is not None else more[2]  # behind requires_grad and hooks
    sizes = tuple(map(int, shape)), tuple(map(int, stride))
    if len(sizes[0]) != len(sizes[1]) or min((offset, *sizes[0], *sizes[1])) < 0:
        raise pickle.UnpicklingError("a tensor with impossible sizes")
    return _Entry(storage.record, dtype, *sizes, offset)


_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _Known(lambda sizes=(): tuple(sizes)),
    ("torch._utils", "_rebuild_tensor"): _Known(_entry),
    ("torch._utils", "_rebuild_tensor_v2"): _Known(_entry),
    ("torch._utils", "_rebuild_tensor_v3"): _Known(_entry),
    ("torch._utils", "_rebuild_parameter"): _Known(lambda entry, *_: entry),
    ("torch._utils", "_rebuild_parameter_with_state"): _Known(lambda entry, *_: entry),
    ("torch.storage", "UntypedStorage"): None,
    ("_io", "BytesIO"): io.BytesIO,  # TransformerEngine's `_extra_state`
    ("_codecs", "encode"): _Known(lambda text, _: b""),  # how the above holds its bytes, which nobody reads
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, record, _, length, *view = identity
        if kind != "storage" or any(view):
            raise pickle.UnpicklingError(f"it holds a {kind} that is no storage of its own")
        return self.storages.setdefault(str(record), _Storage(str(record), dtype, int(length)))


def open_pth(path: Path | str) -> LazyState:
    """A `.pth` as a lazy state under official names (`rcm.checkpoints.keys`).

    A missing or damaged file, one that would run code, and one that is not a flat dict of tensors (but for one outer
    level such as {"model": ...}) are UserErrors: damage of the pickle at once, of a tensor when it is read. The format
    before torch 1.6 is no archive and has no checksums.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist or is not a file")
    try:
        content, records = _Archive.opened(path) if zipfile.is_zipfile(path) else _Sequence.opened(path)
        entries = _entries(_inner(content), str(path))
        for name, entry in entries.items():
            if (entry.offset + entry.span) * entry.dtype.itemsize > records.size(entry.record):
                raise ValueError(f"{name} is larger than its record")
    except UserError:
        raise
    except Exception as error:  # a damaged archive or pickle fails in many ways
        raise _unreadable(path, error) from error

    def fill(name: str, out: Tensor) -> None:
        entry = entries[name]
        try:
            if _is_contiguous(entry):
                records.read(entry.record, entry.offset * entry.dtype.itemsize, raw(out))
            else:
                span = torch.empty(entry.span, dtype=entry.dtype)
                records.read(entry.record, entry.offset * entry.dtype.itemsize, raw(span))
                out.copy_(span.as_strided(entry.shape, entry.stride))
        except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
            raise _unreadable(path, error) from error

    described = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    return LazyState(described, fill).renamed(official(described))


@dataclass(frozen=True)
class _Archive:
    """The format since torch 1.6: a zip archive of the pickle and the records."""

    archive: zipfile.ZipFile
    folder: str
    intact: set[str] = field(default_factory=set)  # records whose checksum was compared

    @classmethod
    def opened(cls, path: Path) -> tuple[Any, "_Archive"]:
        archive = zipfile.ZipFile(path)
        for info in archive.infolist():  # before any is read: a little that is compressed may be more than the memory
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
        index = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        if (size := archive.getinfo(index).file_size) > _INDEX_LIMIT:
            raise ValueError(f"its {index} has {size} bytes")
        folder = index.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        return _Unpickler(io.BytesIO(archive.read(index))).load(), cls(archive, folder)

    def size(self, record: str) -> int:
        return self.archive.getinfo(f"{self.folder}data/{record}").file_size

    def read(self, record: str, start: int, place: memoryview) -> None:
        """Fill `place` from a record; zipfile compares the checksum of what is read whole, as it is the first time."""
        with cast(zipfile.ZipExtFile, self.archive.open(f"{self.folder}data/{record}")) as file:
            if record in self.intact:
                file.seek(start)
                _read(file, place)
                return
            _skip(file, start)
            _read(file, place)
            _skip(file, self.size(record) - start - len(place) + 1)
            self.intact.add(record)


@dataclass(frozen=True)
class _Sequence:
    """The format before: four pickles, the third of them the state's, and the records one after the other."""

    path: Path
    places: Mapping[str, tuple[int, int]]  # where each record begins in the file, and its bytes

    @classmethod
    def opened(cls, path: Path) -> tuple[Any, "_Sequence"]:
        with path.open("rb") as file:
            magic, _, system = (_Unpickler(file).load() for _ in range(3))
            if magic != _MAGIC or not system["little_endian"]:
                raise ValueError("it does not begin as one with little-endian numbers")
            unpickler = _Unpickler(file)
            content = unpickler.load()
            places, end = {}, path.stat().st_size
            for record in _Unpickler(file).load():
                _, dtype, length = unpickler.storages[record]
                size = length * (1 if dtype is None else dtype.itemsize)
                if int.from_bytes(file.read(8), "little") != length or file.tell() + size > end:
                    raise EOFError(f"record {record} is cut short")
                places[record] = file.tell(), size
                file.seek(size, os.SEEK_CUR)
        return content, cls(path, places)

    def size(self, record: str) -> int:
        return self.places[record][1]

    def read(self, record: str, start: int, place: memoryview) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.places[record][0] + start)
            _read(file, place)


def _read(file: Any, place: memoryview) -> None:
    done = 0
    while done < len(place):
        if not (count := file.readinto(place[done : done + _CHUNK])):
            raise EOFError("a record ends early")
        done += count


def _skip(file: Any, count: int) -> None:
    while count > 0 and (chunk := file.read(min(count, _CHUNK))):
        count -= len(chunk)


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
