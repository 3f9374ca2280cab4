"""Text encoders, frozen: `encode(prompts)` is float32 (B, tokens, width), zero behind the end of each prompt.

Each has `tokens`, `width`, and `cut(prompts)`: the numbers of the prompts that are longer than `tokens`.
"""

from collections.abc import Mapping
from typing import Any

from rcm.tree import settings_of

from .embeddings import Embeddings
from .t5 import T5Encoder, clean, tokenizer
from .words import WordEncoder

__all__ = ["Embeddings", "T5Encoder", "WordEncoder", "build", "clean", "tokenizer"]


def build(config: Mapping[str, Any] | str) -> WordEncoder | T5Encoder:
    """Build an encoder from `{"kind": "words" | "umt5" | "t5", ...its sizes}` or its name in config/text/.

    A `T5Encoder` has random weights (or none, under `torch.device("meta")`) and needs a `tokenizer`. Raises ValueError
    for an unknown name or kind.
    """
    settings = settings_of("text", config)
    if settings["kind"] in T5Encoder.KINDS:
        return T5Encoder(**settings)
    kind = settings.pop("kind")
    if kind != "words":
        raise ValueError(f"unknown text encoder kind {kind!r}: expected one of words, {', '.join(T5Encoder.KINDS)}")
    return WordEncoder(**settings)
