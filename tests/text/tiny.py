"""A tokenizer of letters and encoders of a few thousand weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from rcm.text import T5Encoder, build

END = 1
PIECES = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁red", "▁circle", "é", ",", "&", "▁a"]
SIZES = {
    "tokens": 12,
    "width": 16,
    "mlp_width": 24,
    "layers": 2,
    "heads": 2,
    "head_width": 4,
    "vocabulary": 48,
    "buckets": 32,
    "distance": 128,
}


def write_tokenizer(folder: Path) -> Path:
    """Write a `tokenizer.json` of T5's kind: pieces of words, an end token behind each prompt."""
    model = models.Unigram(
        [(piece, -float(number > 2) * 9 / len(piece) ** 2) for number, piece in enumerate(PIECES)], 2
    )
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    made.enable_truncation(3)  # what a file may ask for does not count
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def tiny_encoder(kind: str, seed: int = 0, **sizes: int) -> T5Encoder:
    """An encoder with random weights of a size at which every part of it shows in the output."""
    built = build({"kind": kind, **SIZES, **sizes})
    assert isinstance(built, T5Encoder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            norm, fan_in = name.endswith("norm.weight"), parameter.shape[-1]
            bias = "relative_attention_bias" in name
            parameter.normal_(std=0.3 if norm else 1.0 if bias or "embed" in name else fan_in**-0.5).add_(float(norm))
    return built
