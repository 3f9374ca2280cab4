"""Text encoders: `encode(prompts) -> (B, L, D)`, frozen."""

from collections.abc import Mapping
from typing import Any

from .words import WordEncoder

__all__ = ["WordEncoder", "build"]


def build(config: Mapping[str, Any]) -> WordEncoder:
    """Build an encoder from `{"kind": "words", ...}`. Raises ValueError for an unknown kind."""
    settings = dict(config)
    kind = settings.pop("kind")
    if kind != "words":
        raise ValueError(f"unknown text encoder kind {kind!r}: expected words")
    return WordEncoder(**settings)
