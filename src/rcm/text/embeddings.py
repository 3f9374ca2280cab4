"""Prompts encoded before, so that no text encoder needs to be in memory: one `.safetensors` file.

Every prompt has a tensor (tokens, width) of its own, without padding, so that thousands need not be read to get at
one. The header holds one entry, `rcm`: the prompts, what encoded them, and for each tensor what it must be, since the
format has no checksums.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rcm.artefact import UserError, atomic_file, json_value, reason, sha256_json

_ENTRY = "rcm"


class Embeddings:
    """The embeddings in a file, to be used in the place of an encoder; UserError where it is missing or damaged.

    tokens, width    of an encoding, as the encoder has them
    prompts          what was encoded
    encoder          what encoded it, as given to `write`
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"embeddings {path} do not exist; make them with `rcm embed`")
        try:
            self._file = safe_open(path, framework="pt")
            entry = json_value((self._file.metadata() or {})[_ENTRY])
            self._facts = facts = entry["facts"]
            if entry["sha256"] != sha256_json(facts):
                raise ValueError("its header does not match the checksum inside")
            self.tokens, self.width, self.encoder = facts["tokens"], facts["width"], facts["encoder"]
            self.prompts: list[str] = facts["prompts"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(reason(error)) from error
        self._numbers = {prompt: number for number, prompt in enumerate(self.prompts)}

    def cut(self, prompts: Sequence[str]) -> list[int]:
        """Numbers of the prompts that were longer than `tokens` when they were encoded."""
        return [place for place, prompt in enumerate(prompts) if self._number(prompt) in self._facts["cut"]]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The embeddings of prompts: float32 (B, tokens, width); UserError for a prompt that is not in the file."""
        out = torch.zeros(len(prompts), self.tokens, self.width, dtype=torch.float32)
        for row, prompt in zip(out, prompts, strict=True):
            embedding_LD = self._read(self._number(prompt))
            row[: len(embedding_LD)] = embedding_LD
        return out

    def verify(self) -> None:
        """Read everything once; damage is a UserError."""
        for number in range(len(self.prompts)):
            self._read(number)

    def _number(self, prompt: str) -> int:
        if prompt not in self._numbers:
            raise UserError(
                f"{self.path} has no embedding of the prompt {prompt!r}; make it with `rcm embed` from a file of"
                " prompts that holds this one"
            )
        return self._numbers[prompt]

    def _read(self, number: int) -> Tensor:
        try:
            embedding_LD = self._file.get_tensor(_name(number))
        except SafetensorError as error:
            raise self._damaged(reason(error)) from error
        if _identity(embedding_LD) != self._facts["embeddings"][number]:
            raise self._damaged(f"the embedding of {self.prompts[number]!r} does not match its checksum")
        return embedding_LD

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.path} is damaged or holds no embeddings ({why}); make it again with `rcm embed`")

    @staticmethod
    def write(
        path: Path | str,
        prompts: Sequence[str],
        embeddings: Iterable[Tensor],
        *,
        tokens: int,
        encoder: Mapping[str, Any],
        cut: Collection[int] = (),
    ) -> None:
        """Write the embeddings of prompts, each once; equal arguments give equal bytes.

        Args:
            embeddings: one (up to `tokens`, width) a prompt, in the type to store; zero rows at its end are padding
                and not stored.
            tokens: length to which `encode` pads.
            encoder: what identifies the encoder (settings, hash of the weights; JSON types).
            cut: numbers of the prompts that were too long.
        """
        if len(set(prompts)) < len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but only {len(set(prompts))} different ones: give each once")
        state = {
            _name(number): _unpadded(embedding_LD).cpu().contiguous()
            for number, (_, embedding_LD) in enumerate(zip(prompts, embeddings, strict=True))
        }
        facts = {
            "prompts": list(prompts),
            "prompts_sha256": sha256_json(list(prompts)),
            "embeddings": [_identity(embedding_LD) for embedding_LD in state.values()],
            "cut": sorted(cut),
            "tokens": tokens,
            "width": next(iter(state.values())).shape[1],
            "encoder": dict(encoder),
        }
        header = {_ENTRY: json.dumps({"facts": facts, "sha256": sha256_json(facts)}, sort_keys=True, allow_nan=False)}
        with atomic_file(path) as temporary:
            safetensors.torch.save_file(state, temporary, metadata=header)


def _name(number: int) -> str:
    return f"{number:08d}"


def _unpadded(embedding_LD: Tensor) -> Tensor:
    used = embedding_LD.ne(0).any(dim=1).nonzero()
    return embedding_LD[: int(used[-1]) + 1 if len(used) else 0].clone()  # a view would keep the padding in memory


def _identity(embedding_LD: Tensor) -> list[Any]:
    """Length, data type and SHA-256 of a tensor."""
    content = embedding_LD.reshape(-1).view(torch.uint8).numpy().data
    return [len(embedding_LD), str(embedding_LD.dtype).removeprefix("torch."), hashlib.sha256(content).hexdigest()]
