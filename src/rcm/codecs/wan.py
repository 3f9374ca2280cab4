"""The video autoencoder of Wan2.1, which Cosmos-Predict2 uses too: a latent stands for 8 x 8 pixels of 4 frames.

All layers are causal in time, so a video goes through in pieces: its first frame, then 4 frames (one latent frame) at
a time. A layer keeps in `past` the frames of its input that it needs for the next piece; one that finds nothing there
is at the start of the video. So memory does not depend on the length, and a whole video at once gives the same.

Source: Wan-Video/Wan2.1, wan/modules/vae.py. Names of parameters are those of its checkpoint, hence the numbers.
Shape suffixes: B batch, C channels, T frames, H and W height and width at the layer, N = B T, S = H W.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cells import check_size

Past = dict[nn.Module, Tensor]


class _Last(Past):
    """The past that the last piece finds; it keeps nothing, as nothing comes after it."""

    def __setitem__(self, layer: nn.Module, frames: Tensor) -> None:
        pass


def _frame_by_frame(function: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
    """`function` of pictures (N, C, H, W), applied to each frame."""
    frames_NCHW = function(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return frames_NCHW.unflatten(0, (len(x_BCTHW), -1)).transpose(1, 2)


class Norm(nn.Module):
    """gamma √C x / |x|, the length being that over the C channels."""

    def __init__(self, width: int, *, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        return (x / length).mul_(self.gamma * x.shape[1] ** 0.5)


class CausalConv(nn.Conv3d):
    """A convolution over a frame and the two before it, which are zero at the start."""

    def __init__(self, width_in: int, width_out: int, *, side: int = 3) -> None:
        super().__init__(width_in, width_out, (3, side, side), padding=(0, side // 2, side // 2))

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:  # type: ignore[override]
        known_BCTHW = torch.cat([past[self], x_BCTHW], dim=2) if self in past else x_BCTHW
        past[self] = known_BCTHW[:, :, -2:].clone()  # not a view, which would keep the whole piece
        if known_BCTHW.shape[2] == 1:  # a third of the work, and all there is for an image
            return F.conv2d(x_BCTHW[:, :, 0], self.weight[:, :, 2], self.bias, padding=self.padding[1:])[:, :, None]
        if zeros := 2 + x_BCTHW.shape[2] - known_BCTHW.shape[2]:
            known_BCTHW = F.pad(known_BCTHW, (0, 0, 0, 0, zeros, 0))
        return super().forward(known_BCTHW)


class Head(nn.ModuleDict):
    """Norm, SiLU, convolution."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__({"0": Norm(width_in, dims=3), "2": CausalConv(width_in, width_out)})

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        return self["2"](F.silu(self["0"](x_BCTHW), inplace=True), past)


class Residual(nn.Module):
    """Twice norm, SiLU and convolution, beside the input or a product of it."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": Norm(width_in, dims=3),
                "2": CausalConv(width_in, width_out),
                "3": Norm(width_out, dims=3),
                "6": CausalConv(width_out, width_out),
            }
        )
        self.shortcut = nn.Conv3d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        y_BCTHW = x_BCTHW
        for norm, convolution in (("0", "2"), ("3", "6")):
            y_BCTHW = F.silu(self.residual[norm](y_BCTHW), inplace=True)
            y_BCTHW = self.residual[convolution](y_BCTHW, past)
        return y_BCTHW.add_(self.shortcut(x_BCTHW))


class Attention(nn.Module):
    """Attention of one head among the pixels of a frame, beside the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width, dims=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        return x_BCTHW + _frame_by_frame(self._attend, x_BCTHW)

    def _attend(self, x_NCHW: Tensor) -> Tensor:
        qkv_N1SC = self.to_qkv(self.norm(x_NCHW)).flatten(2).transpose(1, 2)[:, None].contiguous()
        y_N1SC = F.scaled_dot_product_attention(*qkv_N1SC.chunk(3, dim=-1))
        return self.proj(y_N1SC[:, 0].transpose(1, 2).reshape(x_NCHW.shape))


class Down(nn.Module):
    """Half the height and width; with `in_time` half the frames too, of which the first stays as it is."""

    def __init__(self, width: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, width, 3, stride=2)})
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        x_BCTHW = _frame_by_frame(lambda frames: self.resample["1"](F.pad(frames, (0, 1, 0, 1))), x_BCTHW)
        if self.time_conv is None:
            return x_BCTHW
        kept = [] if self in past else [x_BCTHW[:, :, :1]]
        window_BCTHW = torch.cat([past[self], x_BCTHW], dim=2) if self in past else x_BCTHW
        past[self] = x_BCTHW[:, :, -1:].clone()
        if window_BCTHW.shape[2] > 1:
            kept.append(self.time_conv(window_BCTHW))
        return torch.cat(kept, dim=2)


class Up(nn.Module):
    """Twice the height and width, half the features; with `in_time` twice the frames, but for the first."""

    def __init__(self, width: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, width // 2, 3, padding=1)})
        self.time_conv = CausalConv(width, 2 * width, side=1) if in_time else None

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        if self.time_conv is not None:
            x_BCTHW = self._double(self.time_conv, x_BCTHW, past)
        return _frame_by_frame(lambda frames: self.resample["1"](F.interpolate(frames, scale_factor=2.0)), x_BCTHW)

    def _double(self, time_conv: CausalConv, x_BCTHW: Tensor, past: Past) -> Tensor:
        if time_conv in past:
            return time_conv(x_BCTHW, past).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
        first, rest = x_BCTHW[:, :, :1], x_BCTHW[:, :, 1:]
        past[time_conv] = first[:, :, :0].clone()  # no frames: later ones do not see the first
        return torch.cat([first, self._double(time_conv, rest, past)], dim=2) if rest.shape[2] else first


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([Residual(width, width), Attention(width), Residual(width, width)])


class Encoder(nn.Module):
    """Video -> (B, 2 C, T, H, W): mean and log-variance of the latents, before the last product."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: int, in_time: Sequence[bool]) -> None:
        super().__init__()
        self.conv1 = CausalConv(3, widths[0])
        self.downsamples = nn.ModuleList()
        width = widths[0]
        for level, wanted in enumerate(widths):
            if level > 0:
                self.downsamples.append(Down(width, in_time=in_time[level - 1]))
            for _ in range(blocks):
                self.downsamples.append(Residual(width, wanted))
                width = wanted
        self.middle = _middle(width)
        self.head = Head(width, 2 * channels)

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        for layer in (self.conv1, *self.downsamples, *self.middle, self.head):
            x_BCTHW = layer(x_BCTHW, past)
        return x_BCTHW


class Decoder(nn.Module):
    """Latents after their first product -> video, not yet clamped."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: int, in_time: Sequence[bool]) -> None:
        super().__init__()
        width = widths[-1]
        self.conv1 = CausalConv(channels, width)
        self.middle = _middle(width)
        self.upsamples = nn.ModuleList()
        for level, wanted in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.upsamples.append(Residual(width, wanted))
                width = wanted
            if level > 0:
                self.upsamples.append(Up(width, in_time=in_time[level - 1]))
                width //= 2
        self.head = Head(width, 3)

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        for layer in (self.conv1, *self.middle, *self.upsamples, self.head):
            x_BCTHW = layer(x_BCTHW, past)
        return x_BCTHW


class WanVAE(nn.Module):
    """Between video (B, 3, F, H, W) in [-1, 1], F = 1 + stride·(T - 1), and latents (B, C, T, H / cell, W / cell).

    It computes on the device and in the type of its parameters, without a graph, and returns float32 (float64 for
    parameters in float64). Latents have `mean` and `std`, given per channel, taken off.
    """

    def __init__(
        self,
        *,
        channels: int,
        cell: int,
        stride: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        halvings = len(multipliers) - 1
        if cell != 2**halvings or stride not in [2**k for k in range(halvings + 1)]:
            raise ValueError(
                f"{len(multipliers)} multipliers make cells of {2**halvings} pixels and a stride of at most as many "
                f"frames, a power of two: not {cell} and {stride}"
            )
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"{channels} channels need as many means and deviations, not {len(mean)} and {len(std)}")
        self.channels, self.cell, self.stride = channels, cell, stride
        self.mean, self.std = list(mean), list(std)  # numbers, as the meta device forgets a buffer's
        widths = [width * multiplier for multiplier in multipliers]
        in_time = [2 ** (halvings - level) <= stride for level in range(halvings)]
        self.encoder = Encoder(channels, widths, blocks, in_time)
        self.conv1 = nn.Conv3d(2 * channels, 2 * channels, 1)
        self.conv2 = nn.Conv3d(channels, channels, 1)
        self.decoder = Decoder(channels, widths, blocks, in_time)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (C, 1, 1, 1), in float32 or better."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        mean, std = torch.tensor([self.mean, self.std], dtype=dtype, device=like.device)[..., None, None, None]
        return mean, std

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Latents of a video: the mean of the posterior. Raises ValueError for a size that does not divide."""
        check_size(video_BCTHW, self.cell, self.stride)
        past: Past = {}
        pieces, count = [], video_BCTHW.shape[2]
        for start, end in pairwise([0, *range(1, count + 1, self.stride)]):
            piece = video_BCTHW[:, :, start:end].to(self.conv1.weight)
            features = self.encoder(piece, past if end < count else _Last(past))
            pieces.append(self.conv1(features)[:, : self.channels])
        posterior = torch.cat(pieces, dim=2)
        mean, std = self._statistics(posterior)
        return (posterior - mean) / std

    @torch.no_grad()
    def frames(self, latents_BCTHW: Tensor) -> Iterator[Tensor]:
        """The video of latents piece by piece: its first frame, then `stride` frames for each further latent frame.

        Memory does not depend on the number of frames. Raises ValueError for latents of other channels.
        """
        if latents_BCTHW.ndim != 5 or latents_BCTHW.shape[1] != self.channels:
            raise ValueError(f"latents of {tuple(latents_BCTHW.shape)}: need (B, {self.channels}, T, H, W)")
        past: Past = {}
        mean, std = self._statistics(latents_BCTHW)
        for following, latents in enumerate(latents_BCTHW.split(1, dim=2), start=1):
            piece = self.conv2((latents * std + mean).to(self.conv2.weight))
            video = self.decoder(piece, past if following < latents_BCTHW.shape[2] else _Last(past))
            yield video.to(torch.promote_types(video.dtype, torch.float32)).clamp_(-1, 1)

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Video (B, 3, F, H, W) in [-1, 1] of latents."""
        return torch.cat(list(self.frames(latents_BCTHW)), dim=2)
