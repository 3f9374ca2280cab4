"""The Wan transformers (arXiv 2503.20314), text- and image-to-video, at any size; `state_dict()` has official names.

Shapes: B batch, C channels, T frames, H, W latent height and width, S = T·H·W / patch volume image tokens, L text
tokens (or tokens of a conditioning image, `image_BLD`), D width, N heads, P time steps per sample (1, or T for a time
per frame).

Tangents need no second class: `forward` takes `torch.autograd.forward_ad` dual tensors as well (see `rcm.dual`).
Sharding, recomputation and the sharing of tokens come from outside too (`rcm.parallel`): blocks and head take tensors
by position; `split`, `gather` and `attend` are attributes that it replaces. The tokens are computed in the data type of
the blocks' weights, the time in that of its own (`precise`).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_jvp import attention


def sinusoid(position: Tensor, size: int) -> Tensor:
    """Embed positions as [cos, sin] of geometrically spaced frequencies from 1 to 1/10000: (...,) -> (..., size)."""
    exponent = torch.arange(size // 2, dtype=torch.float64, device=position.device) / (size // 2)
    angle = position.to(torch.float64)[..., None] * 10000.0**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotary_angles(frames: int, height: int, width: int, head_size: int, device: torch.device) -> Tensor:
    """Angles (S, head_size / 2) of the 3D rotary embedding: the head is split over the axes t, h and w."""
    pairs = head_size // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    axes = []
    for length, share in zip((frames, height, width), shares, strict=True):
        frequency = 10000.0 ** -(torch.arange(share, dtype=torch.float64, device=device) / share)
        axes.append(torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency)
    t, h, w = axes
    grid = (frames, height, width, -1)
    return torch.cat(
        [t[:, None, None].expand(grid), h[None, :, None].expand(grid), w[None, None].expand(grid)], dim=-1
    ).flatten(0, 2)


def rotate(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its angle; `cos`, `sin` hold every angle twice."""
    even, odd = x_BNSD.unflatten(-1, (-1, 2)).unbind(-1)
    return x_BNSD * cos_SD + torch.stack([-odd, even], dim=-1).flatten(-2) * sin_SD


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys; to itself with rotary angles, or to a text."""

    attend: Callable[..., Tensor] = staticmethod(attention)

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(self, x_BSD: Tensor, context_BLD: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = self.norm_q(self.q(x_BSD)), self.norm_k(self.k(context_BLD)), self.v(context_BLD)
        return self.o(self.by_head(q, k, v, rotary))

    def by_head(
        self, q_BSD: Tensor, k_BLD: Tensor, v_BLD: Tensor, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Attention of each head to its part of the width, (B, S, D)."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q_BSD, k_BLD, v_BLD))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class ImageAttention(Attention):
    """Attention to a text and, by keys and values of its own, to an image: the sum of both is projected."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__(width, heads, eps)
        self.k_img, self.v_img = (nn.Linear(width, width) for _ in range(2))
        self.norm_k_img = RMSNorm(width, eps)

    def forward(self, x_BSD: Tensor, text_BLD: Tensor, image_BLD: Tensor) -> Tensor:  # type: ignore[override]
        q = self.norm_q(self.q(x_BSD))
        to_text = self.by_head(q, self.norm_k(self.k(text_BLD)), self.v(text_BLD))
        return self.o(to_text + self.by_head(q, self.norm_k_img(self.k_img(image_BLD)), self.v_img(image_BLD)))


class ImageEmbedding(nn.Module):
    """Features of an image's tokens, (B, L, image_width) -> (B, L, D)."""

    def __init__(self, image_width: int, width: int):
        super().__init__()
        first, second = nn.Linear(image_width, image_width), nn.Linear(image_width, width)
        self.proj = nn.Sequential(nn.LayerNorm(image_width), first, nn.GELU(), second, nn.LayerNorm(width))

    def forward(self, image_BLD: Tensor) -> Tensor:
        return self.proj(image_BLD)


class Block(nn.Module):
    """Self-attention, cross-attention to the text (with `image`: to both) and an MLP; shift, scale and gate from the
    time (six-way)."""

    def __init__(self, width: int, mlp_width: int, heads: int, eps: float, image: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.self_attn = Attention(width, heads, eps)
        self.norm3 = nn.LayerNorm(width, eps)
        self.cross_attn = (ImageAttention if image else Attention)(width, heads, eps)
        self.norm2 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU("tanh"), nn.Linear(mlp_width, width))
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(
        self, x_BSD: Tensor, time_BP6D: Tensor, text_BLD: Tensor, cos_SD: Tensor, sin_SD: Tensor, *image_BLD: Tensor
    ) -> Tensor:
        dtype = x_BSD.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = per_token(self.modulation + time_BP6D, x_BSD.shape[1])
        y = (self.norm1(x_BSD) * (1 + scale1) + shift1).to(dtype)
        x_BSD = (x_BSD + self.self_attn(y, y, (cos_SD, sin_SD)) * gate1).to(dtype)
        x_BSD = x_BSD + self.cross_attn(self.norm3(x_BSD), text_BLD, *image_BLD)
        y = (self.norm2(x_BSD) * (1 + scale2) + shift2).to(dtype)
        return (x_BSD + self.ffn(y) * gate2).to(dtype)


class Head(nn.Module):
    """Adaptive layer norm and projection of every token to its patch."""

    def __init__(self, width: int, patch_elements: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.head = nn.Linear(width, patch_elements)
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width**0.5)

    def forward(self, x_BSD: Tensor, time_BPD: Tensor) -> Tensor:
        shift, scale = per_token(self.modulation + time_BPD[:, :, None], x_BSD.shape[1])
        return self.head((self.norm(x_BSD) * (1 + scale) + shift).to(x_BSD.dtype))


def per_token(modulation_BPKD: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """Split K modulation vectors, each (B, 1, D), or (B, S, D) where every frame or token has its own time."""
    steps = modulation_BPKD.shape[1]
    if steps not in (1, tokens):
        modulation_BPKD = modulation_BPKD.repeat_interleave(tokens // steps, dim=1)
    return modulation_BPKD.unbind(2)


def start_linear_layers(network: nn.Module) -> None:
    """Xavier matrices and zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def whole(x: Tensor, *_: int) -> Tensor:
    """All tokens: what `split` and `gather` do where one process has them."""
    return x


class PatchEmbedding(nn.Conv3d):
    """The official strided convolution, computed as a product of matrices (which forward mode differentiates)."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        (b, c, *size), (p, q, r) = x_BCTHW.shape, self.kernel_size
        t, h, w = size[0] // p, size[1] // q, size[2] // r
        patches = x_BCTHW.reshape(b, c, t, p, h, q, w, r).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t * h * w, -1)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class WanTransformer(nn.Module):
    """Predict the rectified-flow velocity (noise - data) of latents.

    `time_scale` multiplies the rectified-flow time before `forward` (1000 for Wan2.1). `positions`, the largest
    (T, H, W) in tokens, adds learned absolute positions to the rotary ones: Wan2.1 has none, but in a grid of 3 x 3
    tokens relative positions cannot tell left from right before anything is visible. `second_time` embeds a second
    time, which is added to the first (MeanFlow); it starts without effect.

    Image-to-video: `in_channels` counts the channels of a condition behind those of the latents (Wan: which frames are
    given, as 4 mask channels, and the latents of these frames); `image_width`, the width of CLIP's features of the
    first frame, adds an attention to them to every block (Wan2.1, not Wan2.2).
    """

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
        text_width: int = 4096,
        time_width: int = 256,
        patch: Sequence[int] = (1, 2, 2),
        time_scale: float = 1000.0,
        positions: Sequence[int] | None = None,
        second_time: bool = False,
        image_width: int | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} does not split into {heads} heads of even size")
        self.heads, self.out_channels, self.time_width, self.time_scale = heads, out_channels, time_width, time_scale
        p, q, r = patch
        self.patch = (p, q, r)
        self.patch_embedding = PatchEmbedding(in_channels, width, self.patch, self.patch)
        self.text_embedding = nn.Sequential(nn.Linear(text_width, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.time_embedding = nn.Sequential(nn.Linear(time_width, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.precise = ["time_embedding", "time_projection"]  # modules that stay in float32 where others are rounded
        if second_time:
            self.second_time_embedding = nn.Sequential(nn.Linear(time_width, width), nn.SiLU(), nn.Linear(width, width))
            self.precise.append("second_time_embedding")
        self.blocks = nn.ModuleList(Block(width, mlp_width, heads, eps, bool(image_width)) for _ in range(layers))
        self.head = Head(width, math.prod(self.patch) * out_channels, eps)
        self.img_emb = ImageEmbedding(image_width, width) if image_width else None
        # at the scale of the tokens: started small they were hardly used, for they help only together with the text
        self.positions = nn.ParameterList(torch.randn(n, width) for n in positions) if positions else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier matrices, zero biases, and a zero last layer, as Wan2.1 starts its training."""
        start_linear_layers(self)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        if "second_time_embedding" in self.precise:
            nn.init.zeros_(self.get_parameter("second_time_embedding.2.weight"))

    def forward(
        self,
        latents_BCTHW: Tensor,
        time_BP: Tensor,
        text_BLD: Tensor,
        second_time_BP: Tensor | None = None,
        condition_BCTHW: Tensor | None = None,  # by position too: a unit of `rcm.parallel` takes nothing else
        image_BLD: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, C, T, H, W) of latents at `time_BP` = rectified-flow time · `time_scale`, given a text.

        `second_time_BP` is in the same unit, zero where it is not given. Of image-to-video networks, `condition_BCTHW`
        are the channels behind the latents, unless these have them already; `image_BLD` are CLIP's features of the
        first frame (B, 257, 1280).

        Raises ValueError where the latents do not divide into patches, there are neither one nor T times, or the
        channels or the image are not what the network takes.
        """
        if condition_BCTHW is not None:
            latents_BCTHW = torch.cat([latents_BCTHW, condition_BCTHW.to(latents_BCTHW.dtype)], dim=1)
        channels = latents_BCTHW.shape[1]
        if channels != self.patch_embedding.in_channels:
            raise ValueError(
                f"latents and condition have {channels} channels, the network takes {self.patch_embedding.in_channels}"
            )
        if (image_BLD is None) != (self.img_emb is None):
            raise ValueError(f"the network takes {'no' if self.img_emb is None else 'the'} features of an image")
        size = latents_BCTHW.shape[2:]
        if any(n % p for n, p in zip(size, self.patch, strict=True)):
            raise ValueError(f"latents of size {tuple(size)} do not divide into patches of {self.patch}")
        if time_BP.ndim != 2 or time_BP.shape[1] not in (1, size[0]):
            raise ValueError(f"time must be (B, 1) or (B, {size[0]}), got {tuple(time_BP.shape)}")
        t, h, w = (n // p for n, p in zip(size, self.patch, strict=True))
        dtype = self.patch_embedding.weight.dtype
        time_dtype = next(self.time_embedding.parameters()).dtype

        x = self.patch_embedding(latents_BCTHW.to(dtype))
        if self.positions is not None:
            pt, ph, pw = self.positions
            x = x + (pt[:t, None, None] + ph[None, :h, None] + pw[None, None, :w]).flatten(0, 2)
        time_BPD = self.time_embedding(sinusoid(time_BP, self.time_width).to(time_dtype))
        if "second_time_embedding" in self.precise:
            second = torch.zeros_like(time_BP) if second_time_BP is None else second_time_BP
            time_BPD = time_BPD + self.second_time_embedding(sinusoid(second, self.time_width).to(time_dtype))
        time_BP6D = self.time_projection(time_BPD).unflatten(-1, (6, -1))
        text = self.text_embedding(text_BLD.to(dtype))
        image = [self.img_emb(image_BLD.to(dtype))] if self.img_emb and image_BLD is not None else []
        angles = rotary_angles(t, h, w, x.shape[-1] // self.heads, x.device).repeat_interleave(2, dim=-1)
        rotary = [self.split(part.to(dtype), 0) for part in (angles.cos(), angles.sin())]
        if self.split is not whole and time_BP.shape[1] > 1:  # frames are cut: a time for every token
            time_BPD, time_BP6D = (
                self.split(y.repeat_interleave(x.shape[1] // y.shape[1], dim=1), 1) for y in (time_BPD, time_BP6D)
            )
        x = self.split(x, 1)
        for block in self.blocks:
            x = block(x, time_BP6D, text, *rotary, *image)
        x = self.gather(self.head(x, time_BPD), t * h * w)
        patches = x.unflatten(-1, (*self.patch, self.out_channels)).unflatten(1, (t, h, w))
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1, self.out_channels, *size)
