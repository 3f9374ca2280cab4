"""Exports: a student as one `.safetensors` file together with what is needed to sample from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

from rcm.artefact import UserError, atomic_file, sha256_json
from rcm.checkpoints.flat import State, checked, packed, state_sha256

_ENTRY = "rcm"  # one entry of the header holds all: safetensors writes several in random order


def export_safetensors(path: Path | str, state: State, metadata: Mapping[str, Any]) -> None:
    """Write a flat state and `metadata` (JSON types: network, sampler, provenance) to a `.safetensors` file.

    The format has no checksums, so one over tensors and metadata is stored with them. Equal arguments give equal bytes.
    """
    state = packed(checked(state, "the state to export"))
    entry = {"metadata": dict(metadata), "sha256": _sha256(state, metadata)}
    header = {_ENTRY: json.dumps(entry, sort_keys=True, allow_nan=False)}
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata=header)


def read_export(path: Path | str) -> tuple[State, dict[str, Any]]:
    """Read `(state, metadata)` of an export; a file that is missing, damaged or of another origin is a UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"export {path} does not exist; make it with `rcm export`")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); make it again") from error
    if _ENTRY not in header:
        raise UserError(f"{path} holds tensors but not the settings of a student; expected a file made by `rcm export`")
    try:
        entry = json.loads(header[_ENTRY])
        metadata, named = dict(entry["metadata"]), entry["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: its metadata cannot be read; make it again") from error
    if _sha256(state, metadata) != named:
        raise UserError(f"{path} is damaged: its content does not match the checksum inside; make it again")
    return state, metadata


def _sha256(state: State, metadata: Mapping[str, Any]) -> str:
    return sha256_json([state_sha256(state), dict(metadata)])
