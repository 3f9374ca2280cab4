"""DCP folders (`torch.distributed.checkpoint`): the format in which checkpoints are sharded, by one process or many.

Beside DCP's own files a folder holds `manifest.json`: the hash of its tensors, which is its identity, and the hash of
each file, by which damage is found. DCP's `.metadata` is a pickle; it is read through an unpickler that knows DCP's own
classes and nothing else.

Whatever the number of ranks that wrote a folder, any other number reads it, each rank only the chunks that it needs.
"""

import hashlib
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from rcm.artefact import MANIFEST, UserError, atomic_folder, read_json, reason, sha256_file, write_json, writing
from rcm.checkpoints.flat import State, add_to_digest, check_fit, checked, some, state_sha256
from rcm.checkpoints.lazy import LazyState, lazy
from rcm.collective import everywhere


class Ranks(Protocol):
    """What is asked of a mesh of ranks here; `rcm.parallel.Mesh` has it."""

    rank: int
    world: int
    group: Any  # ProcessGroup of all ranks; None: alone


# --- DCP's own classes, restrained -----------------------------------------------------------------------------------

_METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
_ADMITTED = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),  # DCP notes the folder's name
    ("pathlib._local", "PosixPath"),  # the same in Python 3.13
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ADMITTED or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a DCP checkpoint")


class _Reader(FileSystemReader):
    """Reads the metadata once, however often it is used."""

    known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.known is None:
            self.known = self._read_metadata()
        return self.known

    def _read_metadata(self) -> Metadata:
        with (Path(self.path) / _METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__} instead of DCP's Metadata")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is not a tensor")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


@dataclass(frozen=True)
class _Hashed(WriteResult):
    sha256: str  # of the whole file that the item is part of


class _Writer(FileSystemWriter):
    """Every rank hashes what it wrote; rank 0 calls `complete(hashes by file name)` when all of it is on the disk."""

    def __init__(self, folder: Path, complete: Callable[[dict[str, str]], None]):
        super().__init__(folder)
        self.complete = complete

    def storage_meta(self) -> None:
        """Nothing, for DCP would note the temporary folder and a random identifier."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file for all items, as DCP's own, which would keep every tensor until the last is written."""
        written: Future[list[WriteResult]] = Future()
        if not plan.items:  # no empty file
            written.set_result([])
            return written
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        places: list[_StorageInfo] = []
        with writing(Path(self.path)), Path(self.path, name).open("wb") as file:
            for item in plan.items:
                start = file.tell()
                torch.save(_alone(planner.resolve_data(item)), file)
                places.append(_StorageInfo(name, start, file.tell() - start))
            file.flush()
            os.fsync(file.fileno())
        digest = sha256_file(Path(self.path, name))
        written.set_result(
            [_Hashed(item.index, at.length, at, digest) for item, at in zip(plan.items, places, strict=True)]
        )
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        hashes = {r.storage_data.relative_path: r.sha256 for of_rank in results for r in of_rank}  # type: ignore[attr-defined]
        self.complete(hashes | {_METADATA: sha256_file(Path(self.path, _METADATA))})


def _alone(value: Any) -> Tensor:
    """A tensor in host memory with a storage of its own: torch.save writes the whole of a storage."""
    value = value.detach().cpu()
    return value if value.untyped_storage().size() == value.nbytes else value.clone()


class _Planner(DefaultSavePlanner):
    """Gets each tensor where it is written, instead of all before: the state to save holds none."""

    def __init__(self, resolve: Callable[[str], Tensor]):
        super().__init__()
        self.resolve = resolve

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.resolve(index.fqn)


# --- Parts -----------------------------------------------------------------------------------------------------------


def write_parts(
    folder: Path,
    state: Mapping[str, Tensor],
    group: Any,
    complete: Callable[[dict[str, str]], None],
    planner: SavePlanner | None = None,
) -> None:
    """Write tensors and DTensors in host memory; collective over `group` (None: alone), whose use it must have alone.

    Rank 0 calls `complete` with the SHA-256 of every file by name; what fails on a rank, that included, fails on all.
    """
    _single_process_is_meant()
    try:
        save(
            dict(state),
            storage_writer=_Writer(folder, complete),
            planner=planner,
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise _cause(error) from error


def read_parts(folder: Path, state: Mapping[str, Tensor], reader: FileSystemReader | None = None) -> None:
    """Fill tensors and DTensors in place, each rank for itself; a chunk is in memory as a whole while it is read.

    A `reader` that is given again knows the folder's metadata already.
    """
    _single_process_is_meant()
    try:
        load(dict(state), storage_reader=reader or _Reader(folder), no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from error


def described(folder: Path, files: Mapping[str, str]) -> State:
    """Names, shapes and types of the tensors in a folder, as tensors without content.

    `files` are those that were verified; a ValueError where the folder rests on others.
    """
    metadata = _Reader(folder).read_metadata()
    needed = {_METADATA, *(item.relative_path for item in (metadata.storage_data or {}).values())}
    if unknown := sorted(needed - files.keys()):
        raise ValueError(f"{some(unknown)} not in {MANIFEST}")
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def damage(folder: Path, files: Mapping[str, str], mesh: Ranks | None = None) -> list[str]:
    """What is wrong with this rank's share of the `files` (SHA-256 by name) of a folder, a sentence each."""
    rank, world = (mesh.rank, mesh.world) if mesh is not None else (0, 1)
    faults = []
    for name in sorted(files)[rank::world]:
        if not (folder / name).is_file():
            faults.append(f"{folder / name} is missing")
        elif sha256_file(folder / name) != files[name]:
            faults.append(f"{folder / name} is damaged (its SHA-256 is not that of {MANIFEST})")
    return faults


def _cause(error: CheckpointException) -> BaseException:
    """What failed on the first rank that failed, out of DCP's own exception, which is not even an Exception."""
    return next(iter(error.failures.values()))[0]


def _single_process_is_meant() -> None:
    """Silence DCP's warning of that; a filter rather than a context, for the latter is not safe in a thread."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def save_dcp(folder: Path | str, state: Mapping[str, Tensor], mesh: Ranks | None = None) -> None:
    """Write a flat state as a DCP folder, replacing an older one.

    Alone it is written one tensor at a time, so that a lazy state may be larger than the memory. With a `mesh` all
    ranks call it, each with its DTensors; each writes its part. Equal states get the same content hash however they
    are sharded.
    """
    if mesh is not None and mesh.group is not None:
        _save_sharded(folder, state, mesh)
        return
    tensors, digest, order = lazy(state, "the state to save"), hashlib.sha256(), list[str]()

    def resolve(name: str) -> Tensor:
        value = tensors[name]
        add_to_digest(digest, name, value)
        order.append(name)
        return value

    with atomic_folder(folder) as temporary:

        def complete(files: dict[str, str]) -> None:
            if order != sorted(tensors):
                raise RuntimeError("DCP wrote the tensors in another order than the content hash needs")
            write_json(temporary / MANIFEST, _manifest_of(digest.hexdigest(), files))

        described = {name: tensors.described[name] for name in sorted(tensors)}
        write_parts(temporary, described, None, complete, _Planner(resolve))


def _save_sharded(folder: Path | str, state: Mapping[str, Tensor], mesh: Ranks) -> None:
    held = checked(state, "the state to save")
    parts = {name: held[name].clone(memory_format=torch.contiguous_format) for name in sorted(held)}
    content = state_sha256(state)
    with ExitStack() as stack:

        def begin() -> Path | None:
            return stack.enter_context(atomic_folder(folder)) if mesh.rank == 0 else None

        temporary = everywhere(begin, mesh.group)[0]
        assert temporary is not None

        def complete(files: dict[str, str]) -> None:
            write_json(temporary / MANIFEST, _manifest_of(content, files))

        write_parts(temporary, parts, mesh.group, complete)
        everywhere(stack.close, mesh.group)  # rank 0 renames


def _manifest_of(content: str, files: Mapping[str, str]) -> dict[str, Any]:
    return {"content_sha256": content, "files": dict(sorted(files.items()))}


def open_dcp(folder: Path | str) -> LazyState:
    """A DCP folder as a lazy state; its files are verified first, damage of any kind is a UserError."""
    folder = Path(folder)
    state, reader = _described(folder, _verified_manifest(folder)["files"]), _Reader(folder)
    return LazyState(state, lambda name, out: _read(folder, {name: out}, reader))


def load_dcp(folder: Path | str) -> State:
    """Read a whole DCP folder, on the CPU and with its data types; damage of any kind is a UserError."""
    folder = Path(folder)
    manifest = _verified_manifest(folder)
    state = {
        name: torch.empty_like(value, device="cpu") for name, value in _described(folder, manifest["files"]).items()
    }
    _read(folder, state)
    if state_sha256(state) != manifest["content_sha256"]:
        raise UserError(f"{folder} does not hold the tensors that its {MANIFEST} names; make it again")
    return state


def load_sharded(
    network: nn.Module, folder: Path | str, mesh: Ranks, *, without: str | None = None, verified: bool = False
) -> None:
    """Fill the parameters and persistent buffers of a built network, sharded or not, from a DCP folder.

    Names that begin with `without` are those of parts that the folder does not hold; they are left as they are.
    All ranks call it. Each reads its own chunks only and verifies its share of the files, unless they are `verified`
    already; no rank ever holds more than one whole chunk beside its part. Data types become those of the network.
    Raises UserError on all ranks where the folder is damaged or holds another network, which then is as it was;
    ValueError where the network is still on the meta device.
    """
    folder, state = Path(folder), {name: value.detach() for name, value in network.state_dict().items()}
    if any(value.is_meta for value in state.values()):
        raise ValueError("the network is on the meta device; call to_empty first")
    left = {name: state.pop(name) for name in list(state) if without and name.startswith(without)}

    def verify() -> None:
        manifest = _manifest(folder) if verified else _verified_manifest(folder, mesh)
        check_fit(network, {**left, **_described(folder, manifest["files"])}, str(folder))

    everywhere(verify, mesh.group)
    everywhere(lambda: _read(folder, state), mesh.group)


def _described(folder: Path, files: Mapping[str, str]) -> State:
    try:
        return described(folder, files)
    except Exception as error:  # a damaged pickle can fail in many ways
        raise _unreadable(folder, error) from error


def _read(folder: Path, state: Mapping[str, Tensor], reader: FileSystemReader | None = None) -> None:
    try:
        read_parts(folder, state, reader)
    except Exception as error:  # a damaged file can fail in many ways
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder} is not a readable DCP checkpoint ({reason(error)}); make it again")


def _verified_manifest(folder: Path, mesh: Ranks | None = None) -> dict[str, Any]:
    """Read the manifest and compare this rank's share of the files with it."""
    manifest = _manifest(folder)
    if faults := damage(folder, manifest["files"], mesh):
        raise UserError(f"{faults[0]}; make the checkpoint again")
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist; make it with `rcm convert` or `rcm distill`")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not a DCP checkpoint of this project: {MANIFEST} is missing; make it again")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not isinstance(manifest.get("content_sha256"), str):
        raise UserError(f"{folder / MANIFEST} is damaged; make the checkpoint again")
    return manifest
