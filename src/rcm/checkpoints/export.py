"""Exports: a student as `.safetensors` together with what is needed to sample from it, or in diffusers' layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rcm.artefact import UserError, atomic_file, atomic_folder, json_value, sha256_json, write_json
from rcm.checkpoints import diffusers
from rcm.checkpoints.flat import State, state_sha256
from rcm.checkpoints.lazy import LazyState, lazy
from rcm.checkpoints.safe import INDEX, open_safetensors, write_safetensors

_ENTRY = "rcm"  # one entry of the header holds all, with a checksum
_DIFFUSERS = "diffusion_pytorch_model"  # the name that diffusers looks for


def export_safetensors(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a flat state and `metadata` (JSON types: network, sampler, provenance) to a `.safetensors` file.

    One tensor at a time. The format has no checksums, so one over tensors and metadata is stored with them. Equal
    arguments give equal bytes.
    """
    state = lazy(state, "the state to export")
    entry = {"metadata": dict(metadata), "sha256": _sha256(state, metadata)}
    with atomic_file(path) as temporary:
        write_safetensors(temporary, state, {_ENTRY: json.dumps(entry, sort_keys=True, allow_nan=False)})


def read_export(path: Path | str) -> tuple[State, dict[str, Any]]:
    """Read `(state, metadata)` of an export; a file that is missing, damaged or of another origin is a UserError."""
    path = Path(path)
    state, header = _opened(path)
    held = dict(state)
    return held, _checked(path, held, header)


def read_settings(path: Path | str) -> dict[str, Any]:
    """The settings of an exported student, without its tensors, which `load_weights` reads and verifies."""
    path = Path(path)
    return _entry(path, _opened(path)[1])[0]


def check_export(path: Path, state: LazyState, header: Mapping[str, str]) -> None:
    """Compare the checksum in the header of an opened export; nothing for a file of another origin."""
    if _ENTRY in header:
        _checked(path, state, header)


def _opened(path: Path) -> tuple[LazyState, dict[str, str]]:
    if not path.is_file():
        raise UserError(f"export {path} does not exist; make it with `rcm export`")
    state, header = open_safetensors(path)
    if _ENTRY not in header:
        raise UserError(f"{path} holds tensors but not the settings of a student; expected a file made by `rcm export`")
    return state, header


def _entry(path: Path, header: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    try:
        entry = json_value(header[_ENTRY])
        return dict(entry["metadata"]), entry["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: its metadata cannot be read; make it again") from error


def _checked(path: Path, state: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, Any]:
    metadata, named = _entry(path, header)
    if _sha256(state, metadata) != named:
        raise UserError(f"{path} is damaged: its content does not match the checksum inside; make it again")
    return metadata


def _sha256(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    return sha256_json([state_sha256(state), dict(metadata)])


def export_diffusers(
    folder: Path | str, state: Mapping[str, Tensor], settings: Mapping[str, Any], *, shard_bytes: int = 5 * 10**9
) -> None:
    """Write a network's state as the folder that `from_pretrained` of diffusers' class reads.

    Args:
        folder: gets `config.json` and one or more `.safetensors`, several with an index.
        state: our names and tensors.
        settings: of the network, as in `config/network/`; a UserError where diffusers has no such network.
        shard_bytes: of tensors in a file, at most, but for one larger tensor.
    """
    state, config = lazy(state, "the state to export"), diffusers.config(settings)
    state = state.renamed({theirs: ours for ours, theirs in diffusers.to_diffusers(settings, state).items()})
    groups, size = list[list[str]](), 0
    for name in sorted(state):
        size += state.described[name].nbytes
        if not groups or size > shard_bytes:
            groups.append([])
            size = state.described[name].nbytes
        groups[-1].append(name)
    with atomic_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        files: dict[str, str] = {}
        for number, names in enumerate(groups, start=1):
            part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            file = f"{_DIFFUSERS}{part}.safetensors"
            write_safetensors(temporary / file, state.renamed({name: name for name in names}), {"format": "pt"})
            files |= dict.fromkeys(names, file)
        if len(groups) > 1:
            total = sum(value.nbytes for value in state.described.values())
            write_json(
                temporary / f"{_DIFFUSERS}{INDEX}",
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))},
            )
