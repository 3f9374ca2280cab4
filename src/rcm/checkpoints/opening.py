"""Opening a checkpoint, whatever its format, and filling a built network from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rcm.networks
from rcm.artefact import MANIFEST, UserError
from rcm.checkpoints.dcp import open_dcp
from rcm.checkpoints.diffusers import from_diffusers
from rcm.checkpoints.download import verify
from rcm.checkpoints.export import check_export
from rcm.checkpoints.flat import misfits
from rcm.checkpoints.keys import official, unflattened
from rcm.checkpoints.lazy import LazyState
from rcm.checkpoints.pth import open_pth
from rcm.checkpoints.safe import open_folder, open_safetensors
from rcm.tree import options


def open_state(path: Path | str, *, verified: bool = False) -> LazyState:
    """A checkpoint as a lazy mapping of tensors by official name (`rcm.checkpoints.keys`).

    Args:
        path: a `.pth` or `.pt`, a `.safetensors`, a folder of these with a `*.safetensors.index.json` (or with one
            file), or a DCP folder.
        verified: its SHA-256 was compared already.

    DCP folders, exports of this project and what was downloaded are verified first, which reads them once more. The
    checksums that a `.pth` brings along (since torch 1.6) are compared as its tensors are read, `verified` or not. A
    missing or damaged file is a UserError.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist; download or make it first")
    flat, header = path.is_file() and path.suffix != ".safetensors", dict[str, str]()
    if not verified and not (path / MANIFEST).exists():
        verify(path, whole=False)
    if (path / MANIFEST).exists():
        state = open_dcp(path)
    elif flat:
        state = open_pth(path)
    elif path.is_dir():
        state = open_folder(path)
    else:
        state, header = open_safetensors(path)
    if not verified:
        check_export(path, state, header)
    return state.renamed(official(state))


def fitted(
    state: LazyState,
    own: Mapping[str, Tensor],
    where: str,
    kind: str,
    *,
    settings: Mapping[str, Any] | None = None,
    ignored: tuple[str, ...] = (),
) -> LazyState:
    """The tensors of a checkpoint that a network with the tensors `own` takes, under its names and in its shapes.

    Args:
        state: the checkpoint, opened.
        own: names and shapes of the network, as tensors (also on the meta device).
        where: the checkpoint's name, for messages.
        kind: the network's.
        settings: of the network; with them the names may also be those of diffusers.
        ignored: beginnings of names that are of other networks.

    Missing, unexpected and misshapen tensors are a UserError that lists them and says which network they look like.
    """
    names = {name: name for name in state if not any(map(name.startswith, ignored))}
    if settings is not None and own.keys() != names.keys():
        names = _translated(settings, names)
    state = state.renamed(names)
    state = state.reshaped(unflattened(own, state.described))
    if faults := misfits(own, state.described):
        known = _looks_like(state)
        hint = f"; it has the names and shapes of {known}: choose that network, or another checkpoint" if known else ""
        raise UserError(f"{where} does not fit the {kind} of this configuration: {'; '.join(faults)}{hint}")
    return state


def _translated(settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    try:
        return {ours: theirs for theirs, ours in from_diffusers(settings, names).items()}
    except UserError:  # not diffusers' either
        return dict(names)


def _looks_like(state: LazyState) -> str | None:
    """The configuration whose network has these names and shapes."""
    for name in options("network"):
        try:
            with torch.device("meta"):
                own = rcm.networks.build(name).state_dict()
        except (TypeError, ValueError):  # a size of it is that of an experiment's codec or text
            continue
        if not misfits(own, state.reshaped(unflattened(own, state.described)).described):
            return name
    return None


def load_weights(
    network: nn.Module, path: Path | str, *, device: torch.device | str = "cpu", verified: bool = False
) -> None:
    """Fill a built network from a checkpoint, tensor by tensor and in the network's data types.

    Args:
        network: any module; one on the meta device gets its memory first, on `device`. The names that begin with one of
            its `ignored_prefixes` (a tuple) may be in the checkpoint and are not read.
        path: as for `open_state`, as is `verified`.

    Beside the network there is never more than one tensor in memory, and none where data type and device agree. A
    checkpoint that does not fit is a UserError that lists why, and leaves the network as it was; one that turns out to
    be damaged while it is read leaves it half filled. ValueError for a network on the meta device with buffers that no
    checkpoint holds.
    """
    own = network.state_dict()
    state = fitted(
        open_state(path, verified=verified),
        own,
        str(path),
        type(network).__name__,
        ignored=tuple(getattr(network, "ignored_prefixes", ())),
    )
    if any(value.is_meta for value in own.values()):
        if lost := sorted(name for name, _ in network.named_buffers() if name not in own):
            raise ValueError(
                f"a {type(network).__name__} on the meta device loses its buffers {lost}; build it on {device}"
            )
        network.to_empty(device=device)
        own = network.state_dict()
    with torch.no_grad():
        for name in sorted(own):
            state.copy_to(name, own[name])
