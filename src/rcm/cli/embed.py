"""The stage `embed`: prompts through the text encoder once, so that no other stage has that in memory."""

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm.artefact import UserError, recording, verified_sha256
from rcm.checkpoints import verify
from rcm.cli.config import compose
from rcm.cli.models import bare_text_encoder, filled, placed
from rcm.cli.progress import Progress
from rcm.data.prompt_files import read_prompt_file
from rcm.data.shards import part_indices
from rcm.text import Embeddings, T5Encoder, WordEncoder

_SHOWN = 5  # prompts that are cut; the others are counted


def embed(arguments: Namespace) -> None:
    """Encode the prompts of a file, or of one part of it, and those that guidance needs."""
    config = compose(arguments.overrides)
    settings = config["text"]
    precision = "float32" if settings["kind"] == "words" else config["inference"]["precision"]
    given = (arguments.prompts, arguments.encoder, arguments.tokenizer)
    hashes = {path: verified_sha256(path, verify(path)) for path in given if path is not None}
    identity = {
        "text": settings,
        "precision": precision,
        "weights_sha256": hashes.get(arguments.encoder),
        "tokenizer_sha256": hashes.get(arguments.tokenizer),
    }
    numbers = {"text": settings, "precision": precision, "part": arguments.part}
    with recording(arguments.out, stage="embed", inputs=hashes, config=numbers) as facts:
        prompts = _prompts(arguments.prompts, arguments.part, config)
        facts["prompts"] = len(prompts)
        if _is_there(arguments.out, prompts, identity):
            print(f"embed: {arguments.out} holds these prompts by this encoder already", file=sys.stderr)
            return
        encoder = _built(settings, arguments.encoder, arguments.tokenizer)
        cut = encoder.cut(prompts)
        _say_cut([prompts[number] for number in cut], encoder.tokens)
        if isinstance(encoder, T5Encoder):
            filled(encoder, arguments.encoder, placed(config), verified=True)
        rows = _encoded(encoder, prompts, getattr(torch, precision))
        Embeddings.write(arguments.out, prompts, rows, tokens=encoder.tokens, encoder=identity, cut=cut)


def _prompts(path: Path, part: str | None, config: Mapping[str, Any]) -> list[str]:
    """Different prompts of a file or a part of it, the empty one, and the negative ones of the configuration."""
    all_of_them = [item["prompt"] for item in read_prompt_file(path)]
    chosen = all_of_them if part is None else [all_of_them[index] for index in part_indices(part, len(all_of_them))]
    negative = [config[section]["negative_prompt"] for section in ("teacher", "synthesis")]
    return list(dict.fromkeys([*chosen, "", *negative]))


def _is_there(path: Path, prompts: Sequence[str], identity: Mapping[str, Any]) -> bool:
    """Whether a file holds just these embeddings, and whole."""
    try:
        found = Embeddings(path)
        found.verify()
    except UserError:
        return False
    return found.prompts == prompts and found.encoder == identity


def _built(settings: Mapping[str, Any], weights: Path | None, tokenizer: Path | None) -> WordEncoder | T5Encoder:
    """The encoder of a configuration, with its tokenizer and without its weights."""
    needed = settings["kind"] != "words"
    for option, path in (("--encoder", weights), ("--tokenizer", tokenizer)):
        if (path is not None) != needed:
            what = "needs its weights and its tokenizer: add" if needed else "has neither weights nor tokenizer: omit"
            raise UserError(f"the text encoder {settings['kind']} {what} {option}")
    return bare_text_encoder(settings, tokenizer)


def _say_cut(prompts: Sequence[str], tokens: int) -> None:
    for prompt in prompts[:_SHOWN]:
        print(f"embed: longer than {tokens} tokens and cut: the prompt {prompt[:80]!r} ...", file=sys.stderr)
    if len(prompts) > _SHOWN:
        print(f"embed: {len(prompts) - _SHOWN} more prompts are cut", file=sys.stderr)


def _encoded(encoder: WordEncoder | T5Encoder, prompts: Sequence[str], dtype: torch.dtype) -> Iterator[Tensor]:
    """Encode one prompt after another: no padding is computed, and nothing depends on what stands beside a prompt."""
    with Progress("embed", len(prompts), "prompts") as progress:
        for prompt in prompts:
            yield encoder.encode([prompt])[0].to(dtype)
            progress.advance()
