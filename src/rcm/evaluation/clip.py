"""OpenAI's CLIP through transformers: features of images and texts, and GenEval's classifier of colours.

Shapes: N images, H, W pixels, M texts, D features.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.artefact import UserError, reason
from rcm.data.prompts import COCO
from rcm.evaluation import pretrained
from rcm.evaluation.geneval import Detection
from rcm.vision import MEAN, STD

_BATCH = 32  # images, texts at a time
_SUPPORT = 4  # pixels beside a place that a bicubic enlargement looks at, and to spare
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_BACKGROUND = 0x99  # grey of what is not the object


def preprocessed(frames: np.ndarray | Tensor, size: int, *, antialias: bool = True) -> Tensor:
    """Images uint8 (N, H, W, 3) as CLIP takes them: float32 (N, 3, size, size).

    The shorter side is brought to `size` (bicubic, rounded to whole levels), the centre cut out, as in torchvision.
    Raises ValueError for another shape or type.
    """
    images = torch.as_tensor(frames)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"expected images uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    sides = tuple(images.shape[1:3])
    short = min(sides)
    (y0, y1, rows, top), (x0, x1, columns, left) = (_under(side, int(size * side / short), size) for side in sides)
    resized = images[:, y0:y1, x0:x1].permute(0, 3, 1, 2).float()
    if short != size:
        resized = F.interpolate(resized, (rows, columns), mode="bicubic", antialias=antialias, align_corners=False)
    centre = resized[:, :, top : top + size, left : left + size].clamp(0, 255).round()
    mean, std = (torch.tensor(values, device=centre.device)[:, None, None] for values in (MEAN, STD))
    return (centre / 255 - mean) / std


def _under(side: int, to: int, size: int) -> tuple[int, int, int, int]:
    """Of an axis that goes from `side` to `to` pixels: what of it the middle `size` are made from, and where they lie.

    First and last source pixel, the number that they become, and the first of the middle. Enlarged thin things would
    take much memory as a whole. A cut is at multiples of a step after which both grids meet, so that nothing moves.
    """
    first = round((to - size) / 2)
    if to <= side:  # a filter that is wider than a cut would help
        return 0, side, to, first
    step, meets = side // math.gcd(side, to), to // math.gcd(side, to)
    before = max(0, (first * side // to - _SUPPORT) // step)
    after = min(side // step, -((-(first + size) * side // to - _SUPPORT) // step))
    return before * step, after * step, (after - before) * meets, first - before * meets


class Clip:
    """CLIP with the weights and the vocabulary in `folder`.

    Raises UserError for weights that are not OpenAI's: those were trained with QuickGELU, and another activation gives
    other features without a word.
    """

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu"):
        transformers = pretrained.needed()
        self.folder, self.device = Path(folder), torch.device(device)
        self.model: Any = pretrained.opened("CLIPModel", folder, device)
        config = self.model.config
        for part in (config.text_config, config.vision_config):
            if part.hidden_act != "quick_gelu":
                raise UserError(
                    f"{self.folder / 'config.json'} says hidden_act {part.hidden_act!r}, but OpenAI's CLIP has "
                    "'quick_gelu'; fetch OpenAI's weights, such as hf://openai/clip-vit-large-patch14/"
                )
        try:
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # of many kinds, by the file that is damaged
            raise UserError(
                f"cannot read CLIP's vocabulary from {self.folder} ({reason(error)}); expected vocab.json, merges.txt"
            ) from error
        self.size: int = config.vision_config.image_size

    @torch.inference_mode()
    def images(self, frames: np.ndarray | Tensor, *, antialias: bool = True) -> Tensor:
        """Features float32 (N, D) of length 1, on the CPU, of images uint8 (N, H, W, 3)."""
        parts = []
        for batch in torch.as_tensor(frames).split(_BATCH):
            pixels = preprocessed(batch.to(self.device), self.size, antialias=antialias)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            parts.append(F.normalize(self.model.visual_projection(pooled), dim=-1).cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features float32 (M, D) of length 1, on the CPU; texts beyond the context are cut, their end token kept."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = [self._tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]
        parts = []
        for start in range(0, len(tokens), _BATCH):
            rows = [torch.tensor(row) for row in tokens[start : start + _BATCH]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # behind the end, which no token sees
            pooled = self.model.text_model(input_ids=ids.to(self.device)).pooler_output
            parts.append(F.normalize(self.model.text_projection(pooled), dim=-1).cpu())
        return torch.cat(parts)


class Colors:
    """GenEval's colours: which of its ten fits an object best, by CLIP with a classifier for each name of a class."""

    def __init__(self, clip: Clip):
        self.clip = clip
        self._classifiers: dict[str, Tensor] = {}

    def of(self, image: np.ndarray, detections: Sequence[Detection], name: str) -> list[str]:
        """The colour of each object of class `name` in an image uint8 (H, W, 3)."""
        if not detections:
            return []
        features = torch.cat([self.clip.images(cutout(image, found)[None]) for found in detections])
        fits = features @ self._classifier(name).T  # times 100 the logits, of which only the largest counts
        return [COCO.colors[index] for index in fits.argmax(-1).tolist()]

    def _classifier(self, name: str) -> Tensor:
        """Text features (10, D): the mean over the templates, brought back to length 1."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COCO.colors for template in _TEMPLATES]
            means = self.clip.texts(texts).unflatten(0, (len(COCO.colors), len(_TEMPLATES))).mean(1)
            self._classifiers[name] = F.normalize(means, dim=-1)
        return self._classifiers[name]


def cutout(image: np.ndarray, found: Detection) -> np.ndarray:
    """What the box holds of an image, in front of grey where there is a mask."""
    if found.mask is not None:
        if found.mask.shape != image.shape[:2]:
            raise ValueError(f"the mask is {found.mask.shape}, the image {image.shape[:2]}")
        image = np.where(found.mask[..., None], image, np.uint8(_BACKGROUND))
    x0, y0, x1, y1 = (round(value) for value in found.box)
    return image[y0:y1, x0:x1]
