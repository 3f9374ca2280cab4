"""`.pth` files: a flat state written by `torch.save`, read without running anything that the file brings along."""

import pickle
import zipfile
from pathlib import Path

import torch

from rcm.artefact import UserError, atomic_file, reason
from rcm.checkpoints.flat import State, checked, packed
from rcm.checkpoints.keys import unwrap


def load_pth(path: Path | str) -> State:
    """Read a `.pth`, on the CPU and with its data types; wrapper prefixes of the keys are taken off.

    `torch.load` does not compare the checksums of the archive, so they are compared here. A missing or damaged file,
    one that would run code, and one that is not a flat dict of tensors are UserErrors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist or is not a file")
    try:
        if zipfile.is_zipfile(path):  # the format before torch 1.6 is no archive and has no checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle fails in many ways
        raise UserError(_unreadable(path, error)) from error
    return unwrap(checked(state, str(path)))


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's advice about its options goes on for a paragraph
        return (
            f"{path} is damaged, or holds Python objects other than tensors, which are not loaded (they can run code)"
        )
    return f"{path} is damaged or is not a PyTorch checkpoint ({reason(error)}); download or make it again"


def save_pth(path: Path | str, state: State) -> None:
    """Write a flat state to a `.pth`; equal states give equal bytes, whatever the file is called."""
    state = packed(checked(state, "the state to save"))
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)  # given a name, torch would put it into the archive
