"""Codecs between video (B, 3, F, H, W) in [-1, 1] and latents (B, C, T, H / cell, W / cell), F = 1 + stride·(T - 1).

`encode(video) -> latents`, `decode(latents) -> video`, `frames(latents)`: the pieces of what `decode` gives, in turn.
"""

from collections.abc import Mapping
from typing import Any

from rcm.tree import settings_of

from .cells import CellCodec, from_pixels, to_pixels
from .wan import WanVAE

__all__ = ["CellCodec", "WanVAE", "build", "from_pixels", "to_pixels"]

_CLASSES = {"cells": CellCodec, "wan-vae": WanVAE}


def build(config: Mapping[str, Any] | str) -> Any:
    """Build a codec, a module without its trained weights, from `{"kind": "cells", ...}` or its name in config/codec/.

    It works under `torch.device("meta")`. Raises ValueError for an unknown name or kind, or sizes that do not fit.
    """
    settings = settings_of("codec", config)
    kind = settings.pop("kind")
    if kind not in _CLASSES:
        raise ValueError(f"unknown codec kind {kind!r}: expected one of {', '.join(_CLASSES)}")
    return _CLASSES[kind](**settings)
