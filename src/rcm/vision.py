"""The image encoder of Wan2.1 I2V: the visual half of open-clip's XLM-Roberta-Large ViT-Huge/14, up to its last block.

Shapes: B images, H, W pixels, S = 1 + (size / patch)² tokens, D width, N heads.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.tree import settings_of

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images in [0, 1], red, green and blue
STD = (0.26862954, 0.26130258, 0.27577711)


def build(config: Mapping[str, Any] | str) -> "ImageEncoder":
    """Build an image encoder with random weights from its sizes or its name in config/vision/.

    It works under `torch.device("meta")`. Raises ValueError for an unknown name or sizes that do not fit.
    """
    return ImageEncoder(**settings_of("vision", config))


class Attention(nn.Module):
    """Multi-head self-attention; one matrix makes queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x_BSD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention and an MLP, each behind a layer norm."""

    def __init__(self, width: int, mlp_width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attn(self.norm1(x_BSD))
        return x_BSD + self.mlp(self.norm2(x_BSD))


class VisionTransformer(nn.Module):
    """A class token and the patches of an image, through all blocks but the last.

    `post_norm`, `head` and the last block are in the checkpoint and not part of what Wan2.1 uses.
    """

    def __init__(self, *, size: int, patch: int, width: int, mlp_width: int, layers: int, heads: int, joint_width: int):
        super().__init__()
        self.cls_embedding = nn.Parameter(torch.randn(1, 1, width) / width**0.5)
        self.pos_embedding = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) / width**0.5)
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.pre_norm = nn.LayerNorm(width)
        self.transformer = nn.Sequential(*(Block(width, mlp_width, heads) for _ in range(layers)))
        self.post_norm = nn.LayerNorm(width)
        self.head = nn.Parameter(torch.randn(width, joint_width) / width**0.5)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        patches_BSD = self.patch_embedding(pixels_B3HW).flatten(2).transpose(1, 2)
        x_BSD = torch.cat([self.cls_embedding.expand(len(patches_BSD), -1, -1), patches_BSD], dim=1)
        return self.transformer[:-1](self.pre_norm(x_BSD + self.pos_embedding))


class ImageEncoder(nn.Module):
    """Encode images; `state_dict()` has the names of Wan2.1's file.

    That file holds CLIP's text half too: names that begin with `ignored_prefixes` are not part of this encoder.
    """

    ignored_prefixes = ("textual.", "log_scale")

    def __init__(self, *, size: int, patch: int, width: int, heads: int, **sizes: int):
        super().__init__()
        if size % patch:
            raise ValueError(f"size {size} does not divide into patches of {patch}")
        if width % heads:
            raise ValueError(f"width {width} does not split into {heads} heads")
        self.size = size
        self.visual = VisionTransformer(size=size, patch=patch, width=width, heads=heads, **sizes)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Tokens float32 (B, S, D) of images in [-1, 1] of any size, which are squeezed into a square.

        Computed in the type of the weights, the resizing (bicubic, without antialiasing, as Wan2.1 does it) in float32.
        Raises ValueError for another shape.
        """
        if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
            raise ValueError(f"expected images (B, 3, H, W), got {tuple(images_B3HW.shape)}")
        return self.visual(preprocessed(images_B3HW, self.size).to(self.visual.head.dtype)).float()


def preprocessed(images_B3HW: Tensor, size: int) -> Tensor:
    """Images in [-1, 1] as CLIP takes them: `size` x `size` pixels, normalised by its mean and deviation; float32."""
    resized = F.interpolate(images_B3HW.float(), (size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=resized.device)[:, None, None] for values in (MEAN, STD))
    return (resized * 0.5 + 0.5 - mean) / std
