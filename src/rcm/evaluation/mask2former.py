"""GenEval's detector through transformers: Mask2Former with a Swin-S, of COCO's instances.

FAIR's weights stand in for the training run of mmdet that GenEval took: the same network, classes and score of an
instance, but other scores, to which counting with its threshold of 0.9 is sensitive. Hence the name GenEval (HF
Mask2Former) of what is measured with it. Preparation and selection are those of mmdet 2.27, not transformers' own,
which has other thresholds and masks of 384 x 384 pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.artefact import UserError
from rcm.data.prompts import COCO
from rcm.evaluation import pretrained
from rcm.evaluation.clip import Clip, Colors
from rcm.evaluation.geneval import THRESHOLD, Box, Detection, Detector
from rcm.evaluation.samples import PromptSamples, read_frames

MOST = 100  # detections of an image
_LONG, _SHORT = 1333, 800  # the sides of a prepared image, at most
_DIVISOR, _PADDING = 32, 128  # of the sides, by padding, and its level
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # red, green, blue
Size = tuple[int, int]


class Mask2Former:
    """A `Detector` of COCO's classes with the weights in `folder`, in float32."""

    classes = COCO.classes

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.model: Any = pretrained.opened("Mask2FormerForUniversalSegmentation", folder, device)
        if self.model.config.num_labels != len(self.classes):
            raise UserError(
                f"the Mask2Former in {folder} knows {self.model.config.num_labels} classes; expected COCO's "
                f"{len(self.classes)} of instances, as hf://facebook/mask2former-swin-small-coco-instance/ has them"
            )
        for number, label in self.model.config.id2label.items():  # LABEL_3 and other spellings say nothing
            if label in self.classes and self.classes[number] != label:
                raise UserError(
                    f"the Mask2Former in {folder} calls class {number} {label!r}, which is COCO's "
                    f"{self.classes[number]!r}; expected the 80 classes in COCO's order"
                )

    @torch.inference_mode()
    def detect(self, image: np.ndarray) -> list[Detection]:
        """At most 100 objects of an uint8 (H, W, 3) image, the surest class of a query first."""
        pixels, size = prepared(image)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self.model(pixel_values=pixels[None].to(self.device))
        height, width = image.shape[:2]
        return instances(
            found.class_queries_logits[0],
            found.masks_queries_logits[0],
            (pixels.shape[1], pixels.shape[2]),
            size,
            (height, width),
        )


def prepared(image: np.ndarray) -> tuple[Tensor, Size]:
    """An uint8 (H, W, 3) image as float32 (3, height, width), multiples of 32, and its size without the padding.

    The padding stands right of and below the image and is grey, as the networks saw it in training; neither mmdet nor
    transformers hides it from them.
    """
    height, width = image.shape[:2]
    scale = min(_LONG / max(height, width), _SHORT / min(height, width))
    height, width = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    below, right = -height % _DIVISOR, -width % _DIVISOR
    padded = np.pad(resized, ((0, below), (0, right), (0, 0)), constant_values=_PADDING)
    normalised = (torch.from_numpy(padded).float() - torch.tensor(_MEAN)) / torch.tensor(_STD)
    return normalised.permute(2, 0, 1), (height, width)


def instances(classes: Tensor, masks: Tensor, padded: Size, unpadded: Size, original: Size) -> list[Detection]:
    """The best of all queries and classes, as boxes and masks in the original image.

    `classes` (Q, 81) are logits, the last of no object; `masks` (Q, h, w) logits of the padded image. A score is the
    probability of the class times the mean of sigmoid(mask) where the mask is positive, over its pixels in the
    original image. A query whose mask is nowhere positive gives nothing.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    best, order = probabilities.flatten().topk(min(MOST, probabilities.numel()))
    seen: dict[int, tuple[np.ndarray, Box, float] | None] = {}
    found = []
    for probability, index in zip(best.tolist(), order.tolist(), strict=True):
        query, cls = divmod(index, probabilities.shape[1])
        if query not in seen:
            seen[query] = _placed(masks[query], padded, unpadded, original)
        if (placed := seen[query]) is not None:
            mask, box, inside = placed
            found.append(Detection(COCO.classes[cls], box, probability * inside, mask))
    return found


def _placed(mask: Tensor, padded: Size, unpadded: Size, original: Size) -> tuple[np.ndarray, Box, float] | None:
    """A query's mask in the original image, its tight box and its mean sigmoid inside; None where it is empty."""
    logits = _resized(mask, padded)[: unpadded[0], : unpadded[1]]
    logits = _resized(logits, original)
    inside = logits > 0
    area = inside.sum()
    if not area:
        return None
    sureness = float((logits.sigmoid() * inside).sum() / (area + 1e-6))
    columns, rows = (inside.any(axis).nonzero()[:, 0] for axis in (0, 1))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return inside.cpu().numpy(), box, sureness


def _resized(logits: Tensor, size: Size) -> Tensor:
    return F.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def measure(
    items: Sequence[PromptSamples], detector: Detector, clip: Clip, advance: Callable[..., Any]
) -> Iterator[dict[str, Any]]:
    """What is found in each sample, one row each: [class, x0, y0, x1, y1, score, colour or None] of every object.

    Objects have a colour where the caption asks for the colour of their class and GenEval's threshold lets them count.
    Raises UserError for a sample that is no single image.
    """
    colors = Colors(clip)
    for item in items:
        colored = {wanted["class"] for wanted in item.metadata.get("include", ()) if "color" in wanted}
        for path in item.paths:
            frames = read_frames(path)
            if len(frames) != 1:
                raise UserError(f"{path} has {len(frames)} frames; GenEval looks at single images")
            found = detector.detect(frames[0])
            seen: list[str | None] = [None] * len(found)
            for name in colored:
                places = [place for place, one in enumerate(found) if one.cls == name and one.score > THRESHOLD]
                for place, color in zip(places, colors.of(frames[0], [found[k] for k in places], name), strict=True):
                    seen[place] = color
            yield {
                "prompt": item.index,
                "filename": item.name(path),
                "metadata": item.metadata,
                "detections": [[one.cls, *one.box, one.score, color] for one, color in zip(found, seen, strict=True)],
            }
            advance()
