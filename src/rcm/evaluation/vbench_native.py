"""Five of VBench's dimensions on transformers' models: what its own code measures, without its environment.

The formulas and the ways to bring frames to a model's size are those of VBench's code. What differs: its CLIP runs in
float16 on a GPU, here all is float32. `temporal_flickering` is of all samples: VBench first drops those that move, by
RAFT, which is not part of this project, so the two compare on the same videos only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.artefact import UserError, reason
from rcm.evaluation import pretrained
from rcm.evaluation.clip import Clip
from rcm.evaluation.samples import PromptSamples, read_frames
from rcm.evaluation.shapebench import temporal_flickering
from rcm.vision import MEAN, STD

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "aesthetic_quality",
    "appearance_style",
)
_SIZE = 224  # pixels of the shorter side
_BATCH = 32  # frames at a time
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PAIRS = ("subject_consistency", "background_consistency", "temporal_flickering")  # these compare two frames
_WEIGHTS = ("dino", "clip_base", "clip_large", "aesthetic")


class Dino:
    """DINO's ViT-B/16 of the weights in a folder, as the authors' own code runs it."""

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu"):
        # eps is DINO's; the converted configuration says 1e-12
        self.model: Any = pretrained.opened("ViTModel", folder, device, add_pooling_layer=False, layer_norm_eps=1e-6)
        self.device = torch.device(device)
        embeddings = self.model.embeddings
        embeddings.interpolate_pos_encoding = lambda _, height, width: positions(
            embeddings.position_embeddings, height // embeddings.patch_size, width // embeddings.patch_size
        )

    @torch.inference_mode()
    def images(self, frames: np.ndarray) -> Tensor:
        """Features float32 (N, D) of length 1, on the CPU, of frames uint8 (N, H, W, 3), whole and not cut square."""
        parts = []
        for batch in torch.as_tensor(frames).split(_BATCH):
            pixels = normalised(resized(batch.to(self.device), _SIZE, "bilinear"), *_IMAGENET)
            hidden = self.model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
            parts.append(F.normalize(hidden[:, 0], dim=-1).cpu())
        return torch.cat(parts)


def positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """DINO's position embeddings (1, 1 + rows columns, D) for a grid of patches that it was not trained on.

    They are scaled by (rows + 0.1) / side, as DINO's own code does, where transformers takes rows / side.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return table
    grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scales = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scales, mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)


def resized(frames: Tensor, size: int, mode: str) -> Tensor:
    """Frames uint8 (N, H, W, 3) as float32 (N, 3, h, w) in levels, the shorter side `size`; without antialiasing.

    Values are neither rounded nor clipped to levels.
    """
    images = frames.permute(0, 3, 1, 2).float()
    height, width = images.shape[2:]
    short = min(height, width)
    if short == size:
        return images
    to = (int(size * height / short), int(size * width / short))
    return F.interpolate(images, to, mode=mode, align_corners=False, antialias=False)


def normalised(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Levels (N, 3, H, W) of 0 … 255, scaled to 0 … 1, with the mean of each channel taken off and its spread."""
    means, stds = (torch.tensor(values, device=levels.device)[:, None, None] for values in (mean, std))
    return (levels / 255 - means) / stds


@torch.inference_mode()
def clip_features(clip: Clip, frames: np.ndarray) -> Tensor:
    """CLIP's features (N, D) of length 1 of the frames' centres, resized as VBench resizes videos for CLIP."""
    parts = []
    for batch in torch.as_tensor(frames).split(_BATCH):
        levels = resized(batch.to(clip.device), clip.size, "bicubic")
        top, left = (round((side - clip.size) / 2) for side in levels.shape[2:])
        centre = levels[:, :, top : top + clip.size, left : left + clip.size]
        pooled = clip.model.vision_model(pixel_values=normalised(centre, MEAN, STD)).pooler_output
        parts.append(F.normalize(clip.model.visual_projection(pooled), dim=-1).cpu())
    return torch.cat(parts)


def consistency(features: Tensor) -> float:
    """Mean over t ≥ 1 of (max(0, f_t f_t-1) + max(0, f_t f_0)) / 2, of features (T, D) of length 1."""
    f = features.double()
    before, first = (f[1:] * f[:-1]).sum(1), f[1:] @ f[0]
    return float(((before.clamp(min=0) + first.clamp(min=0)) / 2).mean())


def appearance_style(clip: Clip, frames: np.ndarray, style: str) -> float:
    """Mean over frames of CLIP's logit of frame and style phrase, / 100; frames are resized with antialiasing."""
    cosines = clip.images(frames, antialias=True).double() @ clip.texts([style]).double().T
    return float(cosines.mean() * clip.model.logit_scale.exp().item() / 100)


def aesthetic_quality(features: Tensor, head: Mapping[str, Tensor]) -> float:
    """Mean over frames of LAION's linear predictor on CLIP's features (T, D), / 10."""
    return float(F.linear(features.double(), head["weight"].double(), head["bias"].double()).mean() / 10)


def open_head(path: Path | str, width: int = 768) -> dict[str, Tensor]:
    """LAION's linear predictor: weight (1, width) and bias (1). UserError where the file holds something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # of many kinds, by how the file is damaged
        raise UserError(f"cannot read the aesthetic predictor {path} ({reason(error)}); fetch it again") from error
    if shapes != {"weight": (1, width), "bias": (1,)}:
        raise UserError(f"{path} holds {shapes}; expected LAION's predictor with weight (1, {width}) and bias (1)")
    return dict(state)


class Models:
    """What the dimensions look with; each opened when it is first needed.

    Raises UserError where weights are needed that were not given.
    """

    def __init__(self, paths: Mapping[str, Path | str], device: torch.device | str = "cpu"):
        unknown = sorted(set(paths) - set(_WEIGHTS))
        if unknown:
            raise UserError(f"VBench's dimensions have no use for the weights {unknown[0]}; they take {_WEIGHTS}")
        self._paths, self._device = paths, device

    def _path(self, name: str) -> Path:
        if name not in self._paths:
            raise UserError(f"VBench's dimensions need the weights {name}: add --weights {name}=PATH")
        return Path(self._paths[name])

    @cached_property
    def dino(self) -> Dino:
        return Dino(self._path("dino"), self._device)

    @cached_property
    def clip_base(self) -> Clip:
        return Clip(self._path("clip_base"), self._device)

    @cached_property
    def clip_large(self) -> Clip:
        return Clip(self._path("clip_large"), self._device)

    @cached_property
    def aesthetic(self) -> dict[str, Tensor]:
        return open_head(self._path("aesthetic"), self.clip_large.model.config.projection_dim)

    def value(self, dimension: str, frames: np.ndarray, metadata: Mapping[str, Any]) -> float:
        """One dimension of one clip uint8 (T, H, W, 3)."""
        match dimension:
            case "subject_consistency":
                return consistency(self.dino.images(frames))
            case "background_consistency":
                return consistency(clip_features(self.clip_base, frames))
            case "temporal_flickering":
                return temporal_flickering(frames)
            case "aesthetic_quality":
                return aesthetic_quality(clip_features(self.clip_large, frames), self.aesthetic)
            case "appearance_style":
                return appearance_style(self.clip_base, frames, style_of(metadata))
        raise ValueError(f"{dimension} is not measured here; known: {DIMENSIONS}")


def style_of(metadata: Mapping[str, Any]) -> str:
    """The style phrase of a prompt; UserError where it has none."""
    try:
        style = metadata["auxiliary_info"]["appearance_style"]["appearance_style"]
    except (KeyError, TypeError):
        style = None
    if not isinstance(style, str) or not style:
        raise UserError(
            f"the prompt {metadata.get('name')!r} asks for an appearance style but names none under auxiliary_info; "
            "make the suite again with `rcm prompts --info VBench_full_info.json`"
        )
    return style


def measure(
    items: Sequence[PromptSamples],
    models: Mapping[str, Path | str] | Models,
    device: torch.device | str = "cpu",
    advance: Callable[..., Any] = lambda: None,
    *,
    frames: int | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for every sample: the dimensions of `DIMENSIONS` that its prompt is about. Other clips are not opened.

    Args:
        items: samples whose metadata have VBench's "name", "dimension" and "auxiliary_info".
        models: paths of "dino", "clip_base", "clip_large" and "aesthetic".
        advance: called after every sample.
        frames: how many each clip must have.
    """
    opened = models if isinstance(models, Models) else Models(models, device)
    for item in items:
        name, asked = item.metadata.get("name"), item.metadata.get("dimension")
        if not isinstance(name, str) or not isinstance(asked, list):
            raise UserError(
                f"prompt {item.index:05d} is none of VBench's: it lacks a name or dimensions; make the suite with "
                "`rcm prompts --names all_dimension.txt --info VBench_full_info.json`"
            )
        wanted = [dimension for dimension in DIMENSIONS if dimension in asked]
        for path in item.paths:
            values: dict[str, float] = {}
            if wanted:
                clip = read_frames(path, frames)
                if len(clip) < 2 and set(wanted) & set(_PAIRS):
                    raise UserError(f"{path} has one frame, but {wanted[0]} compares frames; expected a clip")
                values = {dimension: opened.value(dimension, clip, item.metadata) for dimension in wanted}
            yield {
                "prompt": item.index,
                "filename": item.name(path),
                "name": name,
                "dimension": list(asked),
                "values": values,
            }
            advance()
