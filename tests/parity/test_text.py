"""Text encoders against a computation worked out in plain torch, float64, from tensors with official names."""

from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcm.text import tokenizer

from ..text.tiny import SIZES, tiny_encoder, write_tokenizer

PROMPT = "a red circle, " + "the quick brown fox jumps over " * 8  # 217 tokens: beyond the distance of all buckets
HEADS, HEAD_WIDTH = SIZES["heads"], SIZES["head_width"]


@cache
def bucket(offset: int, buckets: int = 32, distance: int = 128) -> int:
    """T5's bucket of `key - query`: exact for near ones, then geometric, in rational arithmetic."""
    half, near = buckets // 2, buckets // 4
    away, base = abs(offset), half if offset > 0 else 0
    if away < near:
        return base + away
    steps = (k for k in range(half - near) if Fraction(away, near) ** (half - near) >= Fraction(distance, near) ** k)
    return base + near + max(steps)


def bias_NQK(table: Tensor, length: int) -> Tensor:
    numbers = torch.tensor([[bucket(key - query) for key in range(length)] for query in range(length)])
    return table[numbers].permute(2, 0, 1)


def rms(x_LD: Tensor, weight: Tensor) -> Tensor:
    return x_LD / (x_LD.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attention(x_LD: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, bias: Tensor) -> Tensor:
    """Without the usual division by the root of the head's width."""
    heads = []
    for head in range(HEADS):
        rows = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        logits = (x_LD @ q[rows].T) @ (x_LD @ k[rows].T).T + bias[head]
        heads.append(logits.softmax(-1) @ (x_LD @ v[rows].T))
    return torch.cat(heads, dim=-1) @ o.T


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def umt5(state: Mapping[str, Tensor], ids: list[int]) -> Tensor:
    x = state["token_embedding.weight"][ids]
    for number in range(SIZES["layers"]):
        part = {name.removeprefix(f"blocks.{number}."): value for name, value in state.items()}
        bias = bias_NQK(part["pos_embedding.embedding.weight"], len(ids))
        y = rms(x, part["norm1.weight"])
        x = x + attention(y, *(part[f"attn.{name}.weight"] for name in "qkvo"), bias)
        y = rms(x, part["norm2.weight"])
        gate = gelu(y @ part["ffn.gate.0.weight"].T)
        x = x + (gate * (y @ part["ffn.fc1.weight"].T)) @ part["ffn.fc2.weight"].T
    return rms(x, state["norm.weight"])


def t5(state: Mapping[str, Tensor], ids: list[int]) -> Tensor:
    x = state["shared.weight"][ids]
    table = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = bias_NQK(table, len(ids))
    for number in range(SIZES["layers"]):
        part = {name.removeprefix(f"encoder.block.{number}.layer."): value for name, value in state.items()}
        y = rms(x, part["0.layer_norm.weight"])
        x = x + attention(y, *(part[f"0.SelfAttention.{name}.weight"] for name in "qkvo"), bias)
        y = rms(x, part["1.layer_norm.weight"])
        x = x + (y @ part["1.DenseReluDense.wi.weight"].T).relu() @ part["1.DenseReluDense.wo.weight"].T
    return rms(x, state["encoder.final_layer_norm.weight"])


@pytest.mark.parametrize(("kind", "worked_out"), [("umt5", umt5), ("t5", t5)])
def test_an_encoding_is_what_the_official_tensors_give(kind, worked_out, tmp_path: Path) -> None:
    encoder = tiny_encoder(kind, tokens=256)
    encoder.tokenizer = tokenizer(write_tokenizer(tmp_path))
    state = {name: value.double() for name, value in encoder.state_dict().items()}
    prompts = ["a red circle", PROMPT, ""]  # side by side: padding must not be seen
    encoded = encoder.encode(prompts)
    for row, ids in zip(encoded, encoder.token_ids(prompts), strict=True):
        expected = worked_out(state, ids)
        error = (row[: len(ids)] - expected).norm() / expected.norm()
        print(f"{kind}, {len(ids)} tokens: {error:.1e}")
        assert error < 1e-5
        assert not row[len(ids) :].any()


@pytest.mark.parametrize(("kind", "worked_out"), [("umt5", umt5), ("t5", t5)])
def test_every_official_tensor_counts(kind, worked_out, tmp_path: Path) -> None:
    """Each, changed a little, changes the encoding as it changes the one worked out: none is in another's place."""
    encoder = tiny_encoder(kind)
    encoder.tokenizer = tokenizer(write_tokenizer(tmp_path))
    (ids,) = encoder.token_ids(["a red fox"])
    before = encoder.encode(["a red fox"])[0, : len(ids)]
    for name, value in encoder.state_dict().items():  # shares its storage with the parameters
        kept = value.clone()
        value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
        after = encoder.encode(["a red fox"])[0, : len(ids)]
        expected = worked_out({key: tensor.double() for key, tensor in encoder.state_dict().items()}, ids)
        value.copy_(kept)
        assert (after - before).norm() > 1e-3 * before.norm(), name
        assert (after - expected).norm() < 1e-5 * expected.norm(), name
