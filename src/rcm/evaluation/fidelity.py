"""How cleanly shapes are drawn: the picture against the same scene drawn ideally (analysis by synthesis).

Blur, noise and stray marks lower the PSNR; blur alone lowers the sharpness. Neither asks for the caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from rcm.data import world
from rcm.evaluation.shapes import ShapeDetection

MAX_PSNR = 50.0  # dB; what is closer than that counts as equal


@dataclass(frozen=True)
class Fidelity:
    """PSNR in dB and sharpness, 1 for ideal edges and 0 for none; None where nothing was detected."""

    psnr: float | None
    sharpness: float | None


@cache
def _ink(shape: str, color: str) -> tuple[np.ndarray, np.ndarray]:
    """Each fill's own light and what it lets through of the background, both (fills, cell, cell, 3)."""
    cell = slice(world.CELL, 2 * world.CELL)
    things = [(world.Thing(shape, color, (1, 1), fill),) for fill in world.FILLS]
    dark, light = (
        np.stack([world.render(world.Scene(thing, level))[0, cell, cell] for thing in things]).astype(np.float32)
        for level in (0.0, 255.0)
    )
    return dark, (light - dark) / 255


def background(image: np.ndarray, detections: Sequence[ShapeDetection]) -> np.ndarray:
    """Median colour of the pixels away from all detections (3,)."""
    free = np.ones(image.shape[:2], bool)
    for detection in detections:
        if detection.mask is not None:
            free &= cv2.dilate(detection.mask.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    return np.median(image[free] if free.any() else image.reshape(-1, 3), axis=0).astype(np.float32)


def redraw(image: np.ndarray, detections: Sequence[ShapeDetection]) -> tuple[np.ndarray, list[str]]:
    """The detected scene drawn ideally, float (H, W, 3), and the fill of each shape.

    Fill and place (to one pixel about the box) are those of least squared error.
    """
    level = background(image, detections)
    size, pad = world.CELL, world.CELL
    padded = np.pad(image.astype(np.float32), ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    canvas = np.broadcast_to(level, padded.shape).copy()
    fills = []
    for detection in detections:
        ink, through = _ink(detection.cls, detection.color)
        drawn = ink + through * level
        x0, y0, x1, y1 = detection.box
        top, left = int((y0 + y1 - size) // 2) + pad, int((x0 + x1 - size) // 2) + pad
        errors = {
            (int(error.argmin()), top + dy, left + dx): float(error.min())
            for dy in (-1, 0, 1, 2)
            for dx in (-1, 0, 1, 2)
            for error in [
                ((drawn - padded[top + dy : top + dy + size, left + dx : left + dx + size]) ** 2).sum((1, 2, 3))
            ]
        }
        fill, top, left = min(errors, key=lambda key: errors[key])
        place = canvas[top : top + size, left : left + size]
        place[:] = ink[fill] + through[fill] * place
        fills.append(world.FILLS[fill])
    return canvas[pad:-pad, pad:-pad], fills


def fidelity(image: np.ndarray, detections: Sequence[ShapeDetection]) -> Fidelity:
    """Compare a picture with its redrawn scene; `detections` are all candidates, however unsure.

    Sharpness is the slope of the picture's gradients over the ideal ones, which noise leaves unchanged on average.
    """
    if not detections:
        return Fidelity(None, None)
    ideal, _ = redraw(image, detections)
    error = float(((image - ideal) ** 2).mean())
    psnr = min(MAX_PSNR, 10 * np.log10(255**2 / max(error, 1e-9)))
    product = norm = 0.0
    for axis in (0, 1):
        wanted, seen = np.diff(ideal, axis=axis), np.diff(image.astype(np.float32), axis=axis)
        product += float((wanted * seen).sum())
        norm += float((wanted**2).sum())
    return Fidelity(float(psnr), product / norm if norm else None)
