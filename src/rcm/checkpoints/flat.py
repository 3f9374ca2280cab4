"""Flat states: a dict of tensors by name, which is what every checkpoint here holds."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rcm.artefact import UserError

State = dict[str, Tensor]

_LISTED = 5  # names in an error message


def checked(state: Any, where: str) -> State:
    """Return `state` as a dict of dense CPU tensors, or raise a UserError that says what `where` holds instead."""
    expected = "expected a flat dict of tensors by parameter name"
    if not isinstance(state, Mapping):
        raise UserError(f"{where} holds a {type(state).__name__}; {expected}")
    if not state:
        raise UserError(f"{where} holds no tensors; {expected}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise UserError(f"{where} holds {key!r} of type {type(value).__name__}; {expected}")
    return {key: value.detach().cpu() for key, value in state.items()}


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bits of all tensors: the identity of a checkpoint in any file format.

    Tensors sharded over ranks are gathered one at a time; all ranks call this, and get what one process would.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach()
        add_to_digest(digest, name, value.full_tensor() if isinstance(value, DTensor) else value)
    return digest.hexdigest()


def add_to_digest(digest: Any, name: str, value: Tensor) -> None:
    """One tensor's share of `state_sha256`, which takes them in the order of their names."""
    digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
    digest.update(raw(value.cpu().contiguous()))


def raw(value: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in its own memory."""
    return value.detach().reshape(-1).view(torch.uint8).numpy().data


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Why `given` does not fit in the place of `own`: names that are missing or unexpected, shapes that differ."""
    faults = []
    if missing := sorted(own.keys() - given.keys()):
        faults.append(f"missing {some(missing)}")
    if unexpected := sorted(given.keys() - own.keys()):
        faults.append(f"unexpected {some(unexpected)}")
    misshapen = [
        f"{key} is {tuple(given[key].shape)}, needs {tuple(own[key].shape)}"
        for key in sorted(own.keys() & given.keys())
        if own[key].shape != given[key].shape
    ]
    if misshapen:
        faults.append(f"shapes differ: {some(misshapen)}")
    return faults


def check_fit(module: nn.Module, given: Mapping[str, Tensor], where: str) -> None:
    """Raise a UserError that lists every missing, unexpected or misshapen tensor of a state for `module`."""
    if faults := misfits(module.state_dict(), given):
        raise UserError(f"{where} does not fit the {type(module).__name__} of this configuration: {'; '.join(faults)}")


def load_into(module: nn.Module, state: Mapping[str, Tensor], where: str = "the checkpoint") -> None:
    """Copy `state` into `module`; a missing, unexpected or misshapen tensor is a UserError that lists them."""
    check_fit(module, state, where)
    module.load_state_dict(dict(state))
