"""The fake score of DMD2: a diffusion transformer with a branch that tells data from samples by its features.

The branch is that of APT (arXiv 2501.08316) in small: one learned query reads the tokens behind some blocks and becomes
one logit a sample. Transformer and branch are sub-modules that are called as such, so each can be sharded by itself.
Shapes: B batch, S image tokens, D width; C channels, T frames, H × W latents.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from rcm.networks.wan import Attention, start_linear_layers


class Discriminator(nn.Module):
    """A learned query attends to the features (B, S, D) of `layers` blocks in turn; a linear layer gives the logit."""

    def __init__(self, width: int, heads: int, layers: int, eps: float = 1e-6):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not split into {heads} heads")
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.query_norms = nn.ModuleList(nn.LayerNorm(width, eps) for _ in range(layers))
        self.feature_norms = nn.ModuleList(nn.LayerNorm(width, eps) for _ in range(layers))
        self.readers = nn.ModuleList(Attention(width, heads, eps) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps)
        self.logit = nn.Linear(width, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A small query, Xavier matrices, zero biases and a zero last layer: every logit is 0 at the start."""
        start_linear_layers(self)
        nn.init.normal_(self.query, std=self.query.shape[-1] ** -0.5)
        nn.init.zeros_(self.logit.weight)

    def forward(self, *features_BSD: Tensor) -> Tensor:
        """Logits (B,), positive for data."""
        token = self.query.expand(len(features_BSD[0]), -1, -1)
        layers = zip(self.query_norms, self.feature_norms, self.readers, features_BSD, strict=True)
        for query_norm, feature_norm, reader, x_BSD in layers:
            token = token + reader(query_norm(token), feature_norm(x_BSD.to(token.dtype)))
        return self.logit(self.norm(token)).flatten()


class FakeScore(nn.Module):
    """A transformer `score` and its `branch` on the tokens behind the blocks `layers`; a call is one of the score.

    Weights have the transformer's own names under `score.`, and those of the branch under `branch.`.
    """

    def __init__(self, score: nn.Module, *, width: int, layers: Sequence[int], heads: int):
        super().__init__()
        count = len(cast(nn.ModuleList, score.blocks))
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < count:
            raise ValueError(f"layers of the discriminator are {list(layers)}, must rise from 0 to {count - 1} at most")
        self.score, self.layers = score, tuple(layers)
        self.branch = Discriminator(width, heads, len(layers))

    @property
    def time_scale(self) -> float:
        return cast(float, self.score.time_scale)

    def forward(self, latents_BCTHW: Tensor, time_BP: Tensor, text_BLD: Tensor) -> Tensor:
        """The score's velocity (B, C, T, H, W)."""
        return self.score(latents_BCTHW, time_BP, text_BLD)

    @contextmanager
    def features(self, shape: Sequence[int]) -> Iterator[list[Tensor]]:
        """A list that a call inside, of latents (B, C, T, H, W) of that shape, fills with features (B, S, D)."""
        score: Any = self.score
        tokens = math.prod(n // p for n, p in zip(shape[2:], score.patch, strict=True))
        caught: list[Tensor] = []

        def catch(block: nn.Module, inputs: object, out_BSD: Tensor) -> None:
            caught.append(score.gather(out_BSD, tokens))

        hooks = [score.blocks[i].register_forward_hook(catch) for i in self.layers]
        try:
            yield caught
        finally:
            for hook in hooks:
                hook.remove()
