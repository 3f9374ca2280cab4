"""The Cosmos-Predict2 text-to-image transformer, at any size; `state_dict()` has the official names.

The architecture is `MiniTrainDIT` of nvidia-cosmos/cosmos-predict2. Its files prefix every name with `net.`, and may
hold `_extra_state` entries and the ranges of the rotary embedding, none of which is a weight. What differs from Wan: no
biases; queries and keys are normalised head by head; the rotary embedding turns channel i with i + head size / 2 and is
stretched along h and w; the text is used as it is; every branch, cross-attention too, has shift, scale and gate, from a
low-rank map of its own plus one that all share; the time is not multiplied by 1000.

Shapes: B batch, C channels, T frames, H, W latent height and width, S = T·H·W / patch volume image tokens, L text
tokens, D width, N heads, P time steps per sample (1, or T for a time per frame; 1 or S from the blocks on).

Dual tensors, and the attributes that `rcm.parallel` replaces: as in `rcm.networks.wan`.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_jvp import attention
from rcm.networks.wan import RMSNorm, rotary_angles, sinusoid, whole


def stretched_angles(
    frames: int, height: int, width: int, head_size: int, scale: Sequence[float], device: torch.device
) -> Tensor:
    """Rotary angles (S, head_size / 2), the slowest frequency of each axis divided by its scale, the fastest kept.

    In between the exponent is linear, which is what a base of 10000 · scale^(n / (n - 1)) gives with n frequencies
    ("NTK-aware" stretching of a rotary embedding).
    """
    pairs = head_size // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    exponents = [torch.linspace(0, 1, n, dtype=torch.float64, device=device) for n in shares]
    slower = torch.cat([s**-exponent for s, exponent in zip(scale, exponents, strict=True)])
    return rotary_angles(frames, height, width, head_size, device) * slower


def rotate_halves(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Turn channels i and i + D / 2 by their angle; `cos`, `sin` hold every angle twice."""
    first, second = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys; to itself with rotary angles, or to a text."""

    attend: Callable[..., Tensor] = staticmethod(attention)

    def __init__(self, width: int, context_width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q_proj, self.output_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(context_width, width, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = RMSNorm(width // heads, eps), RMSNorm(width // heads, eps)

    def forward(self, x_BSD: Tensor, context_BLD: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.q_proj(x_BSD), self.k_proj(context_BLD), self.v_proj(context_BLD))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate_halves(q, *rotary), rotate_halves(k, *rotary)
        return self.output_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.layer1 = nn.Linear(width, mlp_width, bias=False)
        self.layer2 = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.layer2(F.gelu(self.layer1(x_BSD)))


class WideLinear(nn.Linear):
    """A linear layer that computes in the data type of its input, which may be wider than that of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def modulation(width: int, rank: int, vectors: int) -> nn.Sequential:
    """Low-rank map from the time embedding to modulation vectors, (B, P, D) -> (B, P, vectors, D)."""
    down, up = WideLinear(width, rank, bias=False), WideLinear(rank, vectors * width, bias=False)
    return nn.Sequential(nn.SiLU(), down, up, nn.Unflatten(-1, (vectors, width)))


class Block(nn.Module):
    """Self-attention, cross-attention to the text and an MLP; each with shift, scale and gate from the time."""

    def __init__(self, width: int, mlp_width: int, heads: int, text_width: int, adaln_width: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.self_attn = Attention(width, width, heads, eps)
        self.cross_attn = Attention(width, text_width, heads, eps)
        self.mlp = MLP(width, mlp_width)
        self.adaln_modulation_self_attn = modulation(width, adaln_width, 3)
        self.adaln_modulation_cross_attn = modulation(width, adaln_width, 3)
        self.adaln_modulation_mlp = modulation(width, adaln_width, 3)

    def forward(
        self, x_BSD: Tensor, time_BPD: Tensor, shared_BP3D: Tensor, text_BLD: Tensor, cos_SD: Tensor, sin_SD: Tensor
    ) -> Tensor:
        dtype = x_BSD.dtype
        shift, scale, gate = (self.adaln_modulation_self_attn(time_BPD) + shared_BP3D).unbind(2)
        y = (self.norm(x_BSD) * (1 + scale) + shift).to(dtype)
        x_BSD = (x_BSD + self.self_attn(y, y, (cos_SD, sin_SD)) * gate).to(dtype)
        shift, scale, gate = (self.adaln_modulation_cross_attn(time_BPD) + shared_BP3D).unbind(2)
        y = (self.norm(x_BSD) * (1 + scale) + shift).to(dtype)
        x_BSD = (x_BSD + self.cross_attn(y, text_BLD) * gate).to(dtype)
        shift, scale, gate = (self.adaln_modulation_mlp(time_BPD) + shared_BP3D).unbind(2)
        y = (self.norm(x_BSD) * (1 + scale) + shift).to(dtype)
        return (x_BSD + self.mlp(y) * gate).to(dtype)


class Head(nn.Module):
    """Adaptive layer norm and projection of every token to its patch."""

    def __init__(self, width: int, patch_elements: int, adaln_width: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.linear = nn.Linear(width, patch_elements, bias=False)
        self.adaln_modulation = modulation(width, adaln_width, 2)

    def forward(self, x_BSD: Tensor, time_BPD: Tensor, shared_BP3D: Tensor) -> Tensor:
        shift, scale = (self.adaln_modulation(time_BPD) + shared_BP3D[:, :, :2]).unbind(2)
        return self.linear((self.norm(x_BSD) * (1 + scale) + shift).to(x_BSD.dtype))


class TimeEmbedding(nn.Module):
    """Shift, scale and gate that all branches share, from the sinusoid of the time: (B, P, D) -> (B, P, 3, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, wave_BPD: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(wave_BPD))).unflatten(-1, (3, -1))


class PatchEmbedding(nn.Module):
    """Linear map of every patch of the latents and of the padding mask, which is their last channel."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]):
        super().__init__()
        self.patch = patch
        # index 0 is the cutting into patches in the official network, which has no weights
        self.proj = nn.Sequential(nn.Identity(), nn.Linear((channels + 1) * math.prod(patch), width, bias=False))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x = F.pad(x_BCTHW, (0, 0, 0, 0, 0, 0, 0, 1))  # no pixel is padding: the mask is zero
        (b, c, *size), (p, q, r) = x.shape, self.patch
        t, h, w = size[0] // p, size[1] // q, size[2] // r
        patches = x.reshape(b, c, t, p, h, q, w, r).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return self.proj(patches.reshape(b, t * h * w, -1))


class CosmosTransformer(nn.Module):
    """Predict the rectified-flow velocity (noise - data) of latents.

    Cosmos-Predict2 calls its network through x_σ = x0 + σ ε: with r = σ / (1 + σ), it is given (1 - r) x_σ and the time
    r, and x0 is (1 - r) x_σ - r · output. As (1 - r) x_σ = (1 - r) x0 + r ε = x_r is the rectified-flow state and
    x0 = x_r - r v, the output is v itself and the wrapping of `rcm.flow` is exact, with `time_scale` 1 (data of unit
    standard deviation in both). `rope_scale` stretches the rotary embedding along t, h and w; there is no frame rate in
    it, for the text-to-image networks do not use one.
    """

    precise = ("t_embedder", "t_embedding_norm")  # modules that stay in float32 where the others are rounded
    split: Callable[[Tensor, int], Tensor] = staticmethod(whole)  # (tokens, their axis) -> the tokens of this process
    gather: Callable[[Tensor, int], Tensor] = staticmethod(whole)  # (B, tokens here, D), their number -> all of them

    def __init__(
        self,
        *,
        width: int,
        mlp_width: int,
        layers: int,
        heads: int,
        in_channels: int = 16,
        out_channels: int = 16,
        text_width: int = 1024,
        adaln_width: int = 256,
        patch: Sequence[int] = (1, 2, 2),
        rope_scale: Sequence[float] = (1.0, 4.0, 4.0),
        time_scale: float = 1.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} does not split into {heads} heads of even size")
        self.heads, self.out_channels, self.time_scale = heads, out_channels, time_scale
        self.rope_scale = tuple(rope_scale)
        p, q, r = patch
        self.patch = (p, q, r)
        self.x_embedder = PatchEmbedding(in_channels, width, self.patch)
        # index 0 is the sinusoid in the official network, which has no weights
        self.t_embedder = nn.Sequential(nn.Identity(), TimeEmbedding(width))
        self.t_embedding_norm = RMSNorm(width, eps)
        self.blocks = nn.ModuleList(Block(width, mlp_width, heads, text_width, adaln_width, eps) for _ in range(layers))
        self.final_layer = Head(width, math.prod(self.patch) * out_channels, adaln_width, eps)
        self.reset_parameters()

    @property
    def head(self) -> nn.Module:
        """The last layer, by its name in `WanTransformer`."""
        return self.final_layer

    def reset_parameters(self) -> None:
        """Matrices N(0, 1 / inputs), second low-rank ones zero, as the official start, which cuts tails at 3 σ."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if "adaln_modulation" in name and name.endswith(".2"):
                    nn.init.zeros_(module.weight)

    def forward(self, latents_BCTHW: Tensor, time_BP: Tensor, text_BLD: Tensor) -> Tensor:
        """Velocity (B, C, T, H, W) of latents at `time_BP` = rectified-flow time · `time_scale`, given a text.

        Raises ValueError where the latents do not divide into patches, or there are neither one nor T times.
        """
        size = latents_BCTHW.shape[2:]
        if any(n % p for n, p in zip(size, self.patch, strict=True)):
            raise ValueError(f"latents of size {tuple(size)} do not divide into patches of {self.patch}")
        if time_BP.ndim != 2 or time_BP.shape[1] not in (1, size[0]):
            raise ValueError(f"time must be (B, 1) or (B, {size[0]}), got {tuple(time_BP.shape)}")
        t, h, w = (n // p for n, p in zip(size, self.patch, strict=True))
        dtype = next(self.x_embedder.parameters()).dtype

        x = self.x_embedder(latents_BCTHW.to(dtype))
        wave = sinusoid(time_BP, x.shape[-1]).to(self.t_embedding_norm.weight.dtype)
        time_BPD, shared_BP3D = self.t_embedding_norm(wave), self.t_embedder(wave)
        if time_BP.shape[1] > 1:  # of every token, for a process may have only some of a frame
            frame = x.shape[1] // time_BP.shape[1]
            time_BPD, shared_BP3D = (self.split(y.repeat_interleave(frame, dim=1), 1) for y in (time_BPD, shared_BP3D))
        text = text_BLD.to(dtype)
        angles = stretched_angles(t, h, w, x.shape[-1] // self.heads, self.rope_scale, x.device).repeat(1, 2)
        rotary = [self.split(part.to(dtype), 0) for part in (angles.cos(), angles.sin())]
        x = self.split(x, 1)
        for block in self.blocks:
            x = block(x, time_BPD, shared_BP3D, text, *rotary)
        x = self.gather(self.final_layer(x, time_BPD, shared_BP3D), t * h * w)
        p, q, r = self.patch
        # the official network cuts patches as (c, t, h, w) and joins them as (h, w, t, c)
        patches = x.unflatten(-1, (q, r, p, -1)).unflatten(1, (t, h, w))
        return patches.permute(0, 7, 1, 6, 2, 4, 3, 5).reshape(-1, self.out_channels, *size)
