"""Models of transformers with their weights in a folder, as the measures of photographs and films take them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from rcm.artefact import UserError, reason


def needed() -> ModuleType:
    """The package transformers, imported when something is measured; UserError where it is lacking."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "the models that measure samples need the package transformers: install it with `pip install -e .[scoring]`"
        ) from error
    return transformers


def opened(kind: str, folder: Path | str, device: torch.device | str = "cpu", **options: Any) -> Any:
    """A model of transformers' class `kind` from a folder with config.json and weights, in float32, not to be trained.

    Raises UserError where the folder lacks something or any weight of the model: transformers would make up the rest.
    """
    transformers, folder = needed(), Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; expected a folder with the weights of a {kind}")
    try:
        with _quiet():
            model, found = getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32, **options
            )
    except Exception as error:  # of many kinds, by the file that is damaged
        raise UserError(f"cannot read a {kind} from {folder} ({reason(error)}); download it again") from error
    lacking = sorted(set(found["missing_keys"]) & {name for name, _ in model.named_parameters()})
    unlike = [names[0] for names in found["mismatched_keys"]]
    if lacking or unlike:
        raise UserError(
            f"the weights in {folder} are not those of a {kind}: {(lacking + unlike)[0]} is missing or of another size "
            f"(and {len(lacking + unlike) - 1} more); download them again"
        )
    assert isinstance(model, nn.Module)
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, and its reports on weights that a model leaves out; what lacks is an error here."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
