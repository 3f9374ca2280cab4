"""Diversity of samples over the seeds of one prompt by features of pretrained networks; higher is more diverse.

    clip_distance   1 - mean cosine over the pairs of the first 8 samples, by the image features of CLIP ViT-L/14
    dino_distance   the same by DINOv2 ViT-L/14 (DP-DMD and DFD, arXiv 2606.18478, measure these two)
    vbench2         VBench-2.0's Diversity, by VGG-19, over the pairs of all samples

Of a clip the distances take 16 frames, the first and the last among them: every frame's feature is brought to length
1, and their mean again. VBench-2.0 compares every frame with the one at the same time in the other clip. Bad samples
differ too, and all samples count here: a diversity says nothing without the quality beside it.

Shapes: N images or samples, T frames, H, W pixels, C channels, D features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rcm.artefact import UserError, reason
from rcm.checkpoints.flat import checked, load_into
from rcm.evaluation import pretrained
from rcm.evaluation.clip import Clip
from rcm.evaluation.measured import Measured
from rcm.evaluation.samples import PromptSamples, read_frames

MEASURES = ("clip_distance", "dino_distance", "vbench2")
SAMPLES = 8  # whose pairs the distances are means of
FRAMES = 16
MAXIMUM = 17.712  # VBench-2.0's empirical largest difference
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images in [0, 1], red, green and blue
_SIDE = 512  # pixels; VBench-2.0 squeezes every frame to a square
_BATCH = 8  # images at a time
_TAPS = (0, 5, 10, 19, 28, 30)  # layers of VGG-19: the first convolutions of the five stages, for style; content


def measure(
    items: Sequence[PromptSamples],
    models: Mapping[str, Any],
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda count: None,
    *,
    frames: int | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each prompt: {"prompt", "samples", "values": {measure: number, or None of too few samples}}.

    Args:
        models: `clip_large` (a folder, or a `Clip`), `dinov2` (a folder, or a `Dino`), `vgg` (torchvision's
            vgg19-dcbb9e9d.pth, or a `Vgg`).
        advance: told how many samples are done.
        frames: how many every sample must have, where that is known.

    Samples of one prompt that differ in their number of frames are a UserError.
    """
    kinds: dict[str, Callable[..., Any]] = {"clip_large": Clip, "dinov2": Dino, "vgg": opened_vgg}
    clip, dino, vgg = (
        kind(models[name], device) if isinstance(models[name], str | Path) else models[name]
        for name, kind in kinds.items()
    )
    for item in items:
        clips: list[tuple[Tensor, Tensor]] = []
        squares: list[np.ndarray] = []
        for number, path in enumerate(item.paths):
            clip_frames = read_frames(path, frames)
            if squares and len(clip_frames) != len(squares[0]):
                raise UserError(
                    f"{path} has {len(clip_frames)} frames, {item.paths[0].name} beside it {len(squares[0])}; "
                    "samples of one prompt must be of one length"
                )
            squares.append(resized(clip_frames, (_SIDE, _SIDE), Image.Resampling.BILINEAR))
            if number < SAMPLES:
                few = clip_frames[evenly(len(clip_frames))]
                clips.append((pooled(clip.images(few)), pooled(dino.images(few))))
        features = [torch.stack(column) for column in zip(*clips, strict=True)]
        values = [distance(column) if len(column) == SAMPLES else None for column in features]
        values.append(vbench2(squares, vgg) if len(squares) > 1 else None)
        yield {"prompt": item.index, "samples": len(squares), "values": dict(zip(MEASURES, values, strict=True))}
        advance(len(squares))


def columns(measured: Measured, allow_missing: bool = False) -> dict[str, list[float | None]]:
    """The values under their keys in a score JSON, `diversity.MEASURE`, by prompt: None where it was not measured.

    Raises UserError for what `lacking` names, unless that is allowed.
    """
    gone = lacking(measured)
    if gone and not allow_missing:
        raise UserError(
            f"the diversity suite is not whole: {gone[0]}{f' and {len(gone) - 1} more' * (len(gone) > 1)}; sample and "
            "measure it again, or allow missing samples (evaluation.allow_missing=true)"
        )
    rows = {row["prompt"]: row["values"] for row in measured.rows}
    count = max(rows, default=-1) + 1
    return {f"diversity.{name}": [rows.get(prompt, {}).get(name) for prompt in range(count)] for name in MEASURES}


def lacking(measured: Measured) -> list[str]:
    """Each prompt that was left out, or has fewer samples than another."""
    counts = {row["prompt"]: row["samples"] for row in measured.rows}
    most = max(counts.values(), default=0)
    return [
        f"prompt {prompt} of diversity has {counts.get(prompt, 0)} of {most} samples"
        for prompt in range(max(counts, default=-1) + 1)
        if counts.get(prompt, 0) < most
    ]


def block(measured: Measured) -> dict[str, Any]:
    """What a score JSON says under "evaluator" of the diversity in its columns."""
    sampling = measured.header.get("sampling")
    return {
        "by": measured.header["by"],
        "sampling": sampling,
        "prompts_sha256": (sampling or {}).get("prompts_sha256"),
        "samples": sum(row["samples"] for row in measured.rows),
    }


# --- Distances of features -----------------------------------------------------------------------------------------


def evenly(count: int) -> np.ndarray:
    """Indices of `FRAMES` of `count` frames at even distances, of all where there are no more."""
    return np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int)


def pooled(frames: Tensor) -> Tensor:
    """The feature (D,) of a clip, of length 1, from those of its frames (T, D)."""
    return F.normalize(F.normalize(frames.double(), dim=-1).mean(0), dim=-1)


def distance(features: Tensor) -> float:
    """1 - mean cosine over the pairs i < j of features (N, D) of length 1."""
    first, second = torch.triu_indices(len(features), len(features), 1)
    return float(1 - (features[first] * features[second]).sum(-1).mean())


def resized(frames: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    """Images uint8 (N, H, W, 3) in another size (width, height), by Pillow, as torchvision resizes pictures."""
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, method)) for frame in frames])


def _normalised(images: np.ndarray, device: torch.device | str) -> Tensor:
    """Images uint8 (N, H, W, 3) as float32 (N, 3, H, W) with ImageNet's mean 0 and deviation 1."""
    pixels = torch.tensor(images, device=device).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


class Dino:
    """DINOv2 with the weights in `folder`; the feature is the class token behind the last normalisation."""

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu"):
        self.model: Any = pretrained.opened("Dinov2Model", folder, device)
        self.device = device

    @staticmethod
    def preprocessed(frames: np.ndarray) -> np.ndarray:
        """The middle 224 x 224 pixels of images uint8 (N, H, W, 3) whose shorter side is brought to 256, bicubic."""
        height, width = frames.shape[1:3]
        short = min(height, width)
        size = (int(256 * width / short), int(256 * height / short))
        whole = resized(frames, size, Image.Resampling.BICUBIC)
        top, left = (whole.shape[1] - 224) // 2, (whole.shape[2] - 224) // 2
        return whole[:, top : top + 224, left : left + 224]

    @torch.inference_mode()
    def images(self, frames: np.ndarray) -> Tensor:
        """Features float32 (N, D), on the CPU, of images uint8 (N, H, W, 3)."""
        pixels = _normalised(self.preprocessed(frames), self.device)
        return torch.cat([self.model(pixel_values=batch).pooler_output.cpu() for batch in pixels.split(_BATCH)])


# --- VBench-2.0's Diversity ----------------------------------------------------------------------------------------


class Vgg(nn.Module):
    """The convolutions of VGG-19 under torchvision's names; `widths` are the channels of its five stages."""

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512, 512)):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, depth in zip(widths, (2, 2, 4, 4, 4), strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """What the layers of `_TAPS` give for images (N, 3, H, W), before their ReLU: (N, C, H', W') each.

        So it is on a GPU. On a CPU the official code sees them behind it, for its ReLU works in the same memory.
        """
        found = []
        for number in range(_TAPS[-1] + 1):
            images = self.features[number](images)
            if number in _TAPS:
                found.append(images)
        return found


def opened_vgg(path: Path | str, device: torch.device | str = "cpu") -> Vgg:
    """VGG-19 with torchvision's weights (a `.pth`; its classifier is left out); any other file is a UserError."""
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what is damaged
        raise UserError(f"cannot read {path} ({reason(error)}); expected torchvision's vgg19-dcbb9e9d.pth") from error
    state = {name: value for name, value in checked(given, str(path)).items() if not name.startswith("classifier.")}
    model = Vgg()
    load_into(model, state, str(path))
    return model.to(device).eval().requires_grad_(False)


def gram(feature: Tensor) -> Tensor:
    """Gram matrices (N, C, C) of features (N, C, H, W), divided by C H W."""
    flat = feature.flatten(2)
    return flat @ flat.mT / flat[0].numel()


def pair_difference(values: Tensor) -> float:
    """Mean |a - b| over the pairs i < j of (N, ...) and over their elements; a pair at a time is in memory."""
    pairs = [float((a - b).abs().mean()) for i, b in enumerate(values) for a in values[i + 1 :]]
    return float(np.mean(pairs))


@torch.inference_mode()
def vbench2(samples: Sequence[np.ndarray], vgg: Vgg) -> float:
    """VBench-2.0's Diversity of two or more samples, uint8 (T, H, W, 3) each, 512 x 512 pixels there: in [0, 1].

    (content + 1000 style) / 2 / 17.712, at most 1. Content is the mean over pairs of the mean |a - b| of the last
    layer's features, style the mean over pairs and five layers of the mean |A - B| of their Gram matrices. Both are
    means over frames too, so one frame of all samples is looked at at a time.
    """
    device = next(vgg.parameters()).device
    content, style = [], []
    for frames in zip(*samples, strict=True):
        found: list[list[Tensor]] = []
        for batch in _normalised(np.stack(frames), device).split(_BATCH):
            *styles, last = vgg(batch)
            found.append([*map(gram, styles), last])
        *grams, contents = (torch.cat(parts) for parts in zip(*found, strict=True))
        content.append(pair_difference(contents))
        style.append(np.mean([pair_difference(values) for values in grams]))
    return float(np.clip((np.mean(content) + 1000 * np.mean(style)) / 2 / MAXIMUM, 0, 1))
