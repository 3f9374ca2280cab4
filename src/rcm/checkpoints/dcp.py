"""DCP folders (`torch.distributed.checkpoint`): the format in which checkpoints are sharded, of one process here.

Beside DCP's own files a folder holds `manifest.json`: the hash of its tensors, which is its identity, and the hash of
each file, by which damage is found. DCP's `.metadata` is a pickle; it is read through an unpickler that knows DCP's own
classes and nothing else.
"""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rcm.artefact import MANIFEST, UserError, atomic_folder, read_json, reason, sha256_file, write_json
from rcm.checkpoints.flat import State, checked, packed, state_sha256

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
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__} instead of DCP's Metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing, for DCP would note the temporary folder and a random identifier."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that it runs in a single process, which is what is wanted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def save_dcp(folder: Path | str, state: State) -> None:
    """Write a flat state as a DCP folder, replacing an older one."""
    state = packed(checked(state, "the state to save"))
    with atomic_folder(folder) as temporary:
        with _quiet():
            save(dict(state), storage_writer=_Writer(temporary), no_dist=True)
        files = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"content_sha256": state_sha256(state), "files": files})


def load_dcp(folder: Path | str) -> State:
    """Read a DCP folder, on the CPU and with its data types; damage of any kind is a UserError."""
    folder = Path(folder)
    manifest = _verified_manifest(folder)
    try:
        reader = _Reader(folder)
        state = {}
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is not a tensor")
            state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with _quiet():
            load(state, storage_reader=reader, no_dist=True)
    except Exception as error:  # a damaged file can fail in many ways
        raise UserError(f"{folder} is not a readable DCP checkpoint ({reason(error)}); make it again") from error
    if state_sha256(state) != manifest["content_sha256"]:
        raise UserError(f"{folder} does not hold the tensors that its {MANIFEST} names; make it again")
    return state


def _verified_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and compare every file with it."""
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist; make it with `rcm convert` or `rcm distill`")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not a DCP checkpoint of this project: {MANIFEST} is missing; make it again")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not isinstance(manifest.get("content_sha256"), str):
        raise UserError(f"{folder / MANIFEST} is damaged; make the checkpoint again")
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; make the checkpoint again")
        if sha256_file(folder / name) != digest:
            raise UserError(
                f"{folder / name} is damaged (its SHA-256 is not that of {MANIFEST}); make the checkpoint again"
            )
    return manifest
