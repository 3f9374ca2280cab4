"""Flat states: a dict of tensors by name, which is what every checkpoint here holds."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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


def packed(state: Mapping[str, Tensor]) -> State:
    """Copies of the tensors, each contiguous in a storage of its own, in the order of their names."""
    return {key: state[key].clone(memory_format=torch.contiguous_format) for key in sorted(state)}


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bits of all tensors: the identity of a checkpoint in any file format."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def load_into(module: nn.Module, state: Mapping[str, Tensor], where: str = "the checkpoint") -> None:
    """Copy `state` into `module`; a missing, unexpected or misshapen tensor is a UserError that lists them."""
    own = module.state_dict()
    faults = []
    if missing := sorted(own.keys() - state.keys()):
        faults.append(f"missing {_some(missing)}")
    if unexpected := sorted(state.keys() - own.keys()):
        faults.append(f"unexpected {_some(unexpected)}")
    misshapen = [
        f"{key} is {tuple(state[key].shape)}, needs {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    if misshapen:
        faults.append(f"shapes differ: {_some(misshapen)}")
    if faults:
        raise UserError(f"{where} does not fit the {type(module).__name__} of this configuration: {'; '.join(faults)}")
    module.load_state_dict(dict(state))
