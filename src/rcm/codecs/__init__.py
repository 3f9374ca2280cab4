"""Codecs between video in [-1, 1] and latents."""

from collections.abc import Mapping
from typing import Any

from .cells import CellCodec, from_pixels, to_pixels

__all__ = ["CellCodec", "build", "from_pixels", "to_pixels"]


def build(config: Mapping[str, Any]) -> CellCodec:
    """Build a codec from `{"kind": "cells", ...}`. Raises ValueError for an unknown kind."""
    settings = dict(config)
    kind = settings.pop("kind")
    if kind != "cells":
        raise ValueError(f"unknown codec kind {kind!r}: expected cells")
    return CellCodec(**settings)
