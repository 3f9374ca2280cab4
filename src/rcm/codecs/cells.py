"""The codec of the tiny scale: one latent token a cell, and one latent frame for 1 + 4k frames of video.

In space it is a linear autoencoder: the principal components of a cell's pixels, each divided by the root of its
standard deviation, so that what is seen most still weighs most, and unit variance over all. In time
it keeps every fourth frame and fills the three between as a video coder does: a cell whose picture turns up in a
neighbouring cell of the next kept frame slides there, everything else fades over.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

_NEIGHBOURS = ((0, 1), (0, -1), (1, 0), (-1, 0))


class CellCodec(nn.Module):
    """Between video (B, 3, F, H, W) in [-1, 1], F = 1 + stride·(T - 1), and latents (B, C, T, H / cell, W / cell)."""

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, *, channels: int, cell: int, stride: int):
        super().__init__()
        self.channels, self.cell, self.stride = channels, cell, stride
        pixels = 3 * cell * cell
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("basis", torch.zeros(channels, pixels))
        self.register_buffer("scale", torch.ones(channels))

    def fit(self, images_BCHW: Tensor) -> None:
        """Set the principal components from pictures in [-1, 1]."""
        cells = self._cells(images_BCHW[:, :, None]).flatten(0, -2).double()
        mean = cells.mean(0)
        variance, vectors = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
        count = len(self.scale)
        basis = vectors.T.flip(0)[:count]
        basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        deviation = variance.flip(0)[:count].sqrt()
        scale = deviation.sqrt() * deviation.mean().sqrt()
        for buffer, value in ((self.mean, mean), (self.basis, basis), (self.scale, scale)):
            buffer.copy_(value)

    def _cells(self, video_BCTHW: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, T, rows, columns, pixels of a cell)."""
        b, c, t, h, w = video_BCTHW.shape
        n = self.cell
        return video_BCTHW.reshape(b, c, t, h // n, n, w // n, n).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Latents (B, C, T, rows, columns) of a video. Raises ValueError for a size that does not divide."""
        check_size(video_BCTHW, self.cell, self.stride)
        cells = self._cells(video_BCTHW[:, :, :: self.stride]).to(self.mean)
        latents = (cells - self.mean) @ self.basis.T / self.scale
        return latents.permute(0, 4, 1, 2, 3)

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Video (B, 3, F, H, W) in [-1, 1] of latents."""
        return torch.cat(list(self.frames(latents_BCTHW)), dim=2)

    def frames(self, latents_BCTHW: Tensor) -> Iterator[Tensor]:
        """The video of latents piece by piece: its first frame, then `stride` frames for each further latent frame."""
        latents = latents_BCTHW.permute(0, 2, 3, 4, 1).to(self.basis.dtype)
        cells = ((latents * self.scale) @ self.basis + self.mean).clamp(-1, 1)
        b, t, rows, columns, _ = cells.shape
        n = self.cell
        kept = cells.unflatten(4, (3, n, n)).permute(0, 1, 4, 2, 5, 3, 6).reshape(b, t, 3, rows * n, columns * n)
        yield kept[:, 0, :, None]
        for first, last in pairwise(kept.unbind(1)):
            between = [self._between(first, last, s / self.stride) for s in range(1, self.stride)]
            yield torch.stack([*between, last], dim=2)

    def _between(self, first_BCHW: Tensor, last_BCHW: Tensor, fraction: float) -> Tensor:
        """The frame at `fraction` of the way between two kept frames: moving cells slide, the rest fades."""
        n = self.cell
        (_, _, height, width) = first_BCHW.shape
        grey_first, grey_last = (x.flatten(2).median(dim=2).values[..., None, None] for x in (first_BCHW, last_BCHW))
        faded = (1 - fraction) * first_BCHW + fraction * last_BCHW
        result = faded.clone()
        grey = (1 - fraction) * grey_first + fraction * grey_last
        for y in range(0, height, n):
            for x in range(0, width, n):
                for dy, dx in _NEIGHBOURS:
                    v, u = y + dy * n, x + dx * n
                    if not (0 <= v < height and 0 <= u < width):
                        continue
                    here = (..., slice(y, y + n), slice(x, x + n))
                    there = (..., slice(v, v + n), slice(u, u + n))
                    a0, b0, a1, b1 = first_BCHW[here], first_BCHW[there], last_BCHW[here], last_BCHW[there]
                    if_moved = _energy(b1 - a0, b0 - grey_first, a1 - grey_last)
                    if_stayed = _energy(a1 - a0, b1 - b0)
                    moved = (if_moved < 0.25 * if_stayed)[:, None, None, None].to(faded.dtype)
                    picture = (1 - fraction) * (a0 - grey_first) + fraction * (b1 - grey_last)
                    for place in (here, there):
                        result[place] += moved * (grey - faded[place])
                    top, left = y + round(dy * n * fraction), x + round(dx * n * fraction)
                    result[..., top : top + n, left : left + n] += moved * picture
        return result.clamp(-1, 1)


def _energy(*differences: Tensor) -> Tensor:
    return sum((d.square().sum((1, 2, 3)) for d in differences), start=torch.zeros(()))


def check_size(video_BCTHW: Tensor, cell: int, stride: int) -> None:
    """Raise ValueError for a video whose frames or sides a codec cannot divide."""
    frames, height, width = video_BCTHW.shape[2:]
    if (frames - 1) % stride or height % cell or width % cell:
        raise ValueError(f"video of {frames} x {height} x {width}: need 1 + {stride}k frames, sides of {cell}k")


def to_pixels(video_BCTHW: Tensor) -> np.ndarray:
    """Video in [-1, 1] -> uint8 (B, T, H, W, 3)."""
    return ((video_BCTHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


def from_pixels(frames_BTHWC: np.ndarray) -> Tensor:
    """uint8 (B, T, H, W, 3) -> float32 video (B, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames_BTHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
