"""What image-to-video networks need beside text: the first frame, and the expert whose turn it is.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width, F frames of video.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn


def first_frame_condition(codec: Any, image_B3HW: Tensor, frames: int) -> Tensor:
    """The condition (B, stride + C, T, H, W) of a video of `frames` frames that begins with an image in [-1, 1].

    As Wan2.1 and Wan2.2 have it: a mask with a channel for each of the `codec.stride` frames of a latent frame, one
    where the frame is given (a single first frame counts for all of them) and zero elsewhere; then the latents of the
    image followed by frames of grey. Raises ValueError where frames or sides do not fit the codec.
    """
    b, _, height, width = image_B3HW.shape
    video = image_B3HW.new_zeros(b, 3, frames, height, width)
    video[:, :, 0] = image_B3HW
    latents = codec.encode(video)
    mask = latents.new_zeros(b, codec.stride, *latents.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


class Experts(nn.Module):
    """Two networks as one: `high` at rectified-flow times from `boundary` on, `low` below (Wan2.2 A14B).

    Samples of one call share a side of the boundary, for each step of a sampler belongs to one expert; otherwise a
    ValueError. One of them may wait on the CPU, where there is no room for both: they change places when its turn is.
    """

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float):
        super().__init__()
        self.high, self.low, self.boundary = high, low, boundary
        self.time_scale = cast(float, high.time_scale)

    def forward(self, latents_BCTHW: Tensor, time_BP: Tensor, *inputs: Any, **conditions: Any) -> Tensor:
        noisy = time_BP >= self.boundary * self.time_scale
        if noisy.any() != noisy.all():
            raise ValueError(f"times on both sides of the boundary {self.boundary} in one call")
        wanted, other = (self.high, self.low) if noisy.all() else (self.low, self.high)
        if next(wanted.parameters()).device != latents_BCTHW.device:
            other.to("cpu")
            wanted.to(latents_BCTHW.device)
        return wanted(latents_BCTHW, time_BP, *inputs, **conditions)
