"""OpenAI's CLIP through transformers: features of images and texts, and GenEval's classifier of colours.

Shapes: N images, H, W pixels, M texts, D features.
"""

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
    height, width = images.shape[1:3]
    short = min(height, width)
    resized = images.permute(0, 3, 1, 2).float()
    if short != size:
        to = (int(size * height / short), int(size * width / short))
        resized = F.interpolate(resized, to, mode="bicubic", antialias=antialias, align_corners=False)
        resized = resized.clamp(0, 255).round()
    top, left = (round((side - size) / 2) for side in resized.shape[2:])
    mean, std = (torch.tensor(values, device=resized.device)[:, None, None] for values in (MEAN, STD))
    return (resized[:, :, top : top + size, left : left + size] / 255 - mean) / std


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
