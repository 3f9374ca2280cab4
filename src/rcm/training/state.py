"""The state of an unfinished run: the last complete states in a folder, each whole or absent."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rcm.artefact import UserError, atomic_folder, read_json, sha256_file, write_json

KEPT = 2  # complete states in the folder: the second is for the day on which the first is damaged


def save_state(folder: Path, step: int, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the state after `step` into `folder/STEP/`, whole or not at all, and drop the oldest.

    `tensors` is a tree of dicts, lists, tensors and numbers; `config` a tree that JSON can hold.
    """
    with atomic_folder(folder / f"{step:09d}") as path:
        torch.save(dict(tensors), path / "state.pt")
        header = {"step": step, "sha256": sha256_file(path / "state.pt"), "config": config}
        write_json(path / "state.json", header)
    for old in _states(folder)[KEPT:]:
        shutil.rmtree(old)


def load_state(folder: Path, config: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """The newest whole state as (step, tensors), or None where there is none.

    A damaged state is left out with a line on stderr. Raises UserError where a state belongs to another `config`.
    """
    for path in _states(folder):
        try:
            header = read_json(path / "state.json")
            whole = header["step"] == int(path.name) and header["sha256"] == sha256_file(path / "state.pt")
        except (OSError, UserError, KeyError, TypeError):
            whole = False
        if not whole:
            print(f"warning: {path} is damaged, going back to the state before it", file=sys.stderr, flush=True)
            continue
        changed = differences(header["config"], json.loads(json.dumps(config)))
        if changed:
            raise UserError(
                f"{folder} holds an unfinished run of another configuration ({'; '.join(changed)}): "
                "set these values again to continue it, or delete the folder to start anew"
            )
        return header["step"], torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return None


def remove_states(folder: Path) -> None:
    """Remove the state of a run that is finished and whose results are safe."""
    shutil.rmtree(folder, ignore_errors=True)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, as `key was A, is B`."""
    a, b = _flat(before), _flat(now)
    absent = "absent"
    return [
        f"{key} was {a.get(key, absent)}, is {b.get(key, absent)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, absent) != b.get(key, absent)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _states(folder: Path) -> list[Path]:
    """The folders of states, newest first."""
    return sorted((p for p in folder.glob("*") if p.is_dir() and p.name.isdecimal()), reverse=True)
