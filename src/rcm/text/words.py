"""The text encoder of the tiny scale: frozen, without weights, and open to any word of any language.

A word has a random code that its spelling seeds. A token is the sum of the codes of its word and of its neighbours,
each turned by a random rotation that belongs to the offset: "circle" then says that "left of" follows it, which is
what a network needs to tell the two shapes of a caption apart (a pretrained encoder does the same with attention).
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_WORD = re.compile(r"\w+|[^\w\s]")
_SKIPPED = frozenset({"a", "an", "the", "of", "photo", "video", ","})  # in every caption, or no part of what is shown


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")))


@lru_cache(maxsize=4096)
def _code(word: str, width: int) -> np.ndarray:
    return _generator(f"word {word}").standard_normal(width)


@lru_cache(maxsize=64)
def _rotation(offset: int, width: int) -> np.ndarray:
    return np.linalg.qr(_generator(f"offset {offset}").standard_normal((width, width)))[0]


def _all_words(prompt: str) -> list[str]:
    return [w for w in _WORD.findall(prompt.lower()) if w not in _SKIPPED]


class WordEncoder:
    """Encode prompts to (B, tokens, width); words beyond `tokens` are cut, shorter prompts end in zeros."""

    def __init__(self, *, tokens: int, width: int, window: int, decay: float):
        self.tokens, self.width, self.window, self.decay = tokens, width, window, decay

    def words(self, prompt: str) -> list[str]:
        """The words of a prompt that are encoded: lower case, without filler words."""
        return _all_words(prompt)[: self.tokens]

    def cut(self, prompts: Sequence[str]) -> list[int]:
        """Numbers of the prompts that have more than `tokens` words and lose those behind."""
        return [number for number, prompt in enumerate(prompts) if len(_all_words(prompt)) > self.tokens]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts: float32 (B, tokens, width)."""
        out = np.zeros((len(prompts), self.tokens, self.width), dtype=np.float32)
        for row, prompt in zip(out, prompts, strict=True):
            words = self.words(prompt)
            codes = np.array([_code(w, self.width) for w in words]).reshape(len(words), self.width)
            for i in range(len(words)):
                for j in range(max(0, i - self.window), min(len(words), i + self.window + 1)):
                    row[i] += self.decay ** abs(i - j) * (codes[j] @ _rotation(j - i, self.width))
        return torch.from_numpy(out)
