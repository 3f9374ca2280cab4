"""Classical detector of coloured shapes: contrast with the background, components, templates, calibrated scores.

It knows the outlines, the palette and the approximate size of the shapes, but nothing of cells, and it was not trained
on what the networks are trained on. Its score is the probability that shape and place are right:

    score = sigmoid(SLOPE * z + OFFSET),   z = log((1.01 - other) / (1.01 - fit)) * clip((fit - .6) / .3, 0, 1),

with the Tanimoto coefficients of contrast and template: fit of the best shape, other of the next. The constants come
from `python benchmarks/detector.py --calibrate`.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

import cv2
import numpy as np

from rcm.data import world
from rcm.evaluation.geneval import Box, Detection

SLOPE, OFFSET = 9.60, -7.05

_WINDOW = 19  # pixels, side of the crop that is compared with templates
_HALF = _WINDOW // 2
_MIN_AREA = 20  # pixels
_MIN_CONTRAST = 18.0  # CIELAB units
_RAMP = 0.5  # contrast, as a share of the object's own, at which coverage counts as full
_SCALES = (0.85, 1.0, 1.15)
_SHIFTS = (-0.7, 0.0, 0.7)
_LOOKS = (*((fill, "red", 55.0) for fill in world.FILLS), *((fill, "white", 85.0) for fill in ("rimmed", "shaded")))
_BLURS = (0.0, 1.0)  # pixels
_TONES = (1.0, 0.85, 0.7)
_NAMES = tuple(world.COLORS)
_PALETTE = np.array([world.COLORS[name] for name in _NAMES], np.float32)


@dataclass(frozen=True)
class ShapeDetection(Detection):
    """A shape and the name of its colour in the palette."""

    color: str = field(kw_only=True)


def color_of(detection: ShapeDetection) -> str:
    """The colour that the detector saw."""
    return detection.color


def lab(image: np.ndarray) -> np.ndarray:
    """uint8 or float (H, W, 3) RGB in 0..255 -> float32 CIELAB."""
    return cv2.cvtColor(np.asarray(image, np.float32) / 255, cv2.COLOR_RGB2LAB)


def noise_level(image: np.ndarray) -> float:
    """Standard deviation of white noise, from the median of a second difference that ignores edges."""
    grey = image.astype(np.float32).mean(2)
    cross = grey[:-2, :-2] - 2 * grey[:-2, 1:-1] + grey[:-2, 2:]
    cross = cross - 2 * (grey[1:-1, :-2] - 2 * grey[1:-1, 1:-1] + grey[1:-1, 2:])
    cross = cross + grey[2:, :-2] - 2 * grey[2:, 1:-1] + grey[2:, 2:]
    return float(np.median(np.abs(cross)) / 0.6745 / 6 * np.sqrt(3))


def denoise(image: np.ndarray) -> np.ndarray:
    """Edge-preserving smoothing where there is noise; clean images pass unchanged."""
    sigma = noise_level(image)
    if sigma < 1.5:
        return image
    return cv2.bilateralFilter(image.astype(np.float32), 5, 4.5 * sigma, 1.2)


def _contrast(image: np.ndarray) -> np.ndarray:
    """CIELAB distance of each pixel from the median colour (H, W)."""
    values = lab(image)
    return np.linalg.norm(values - np.median(values.reshape(-1, 3), axis=0), axis=2)


def _window(contrast: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Soft silhouette in [0, 1], (window, window) about the middle of the mask's box.

    Contrast relative to the object's own and saturated, so that its fill hardly shows.
    """
    own = np.percentile(contrast[mask], 80)
    near = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
    x0, y0, x1, y1 = _box(mask)
    y, x = int(y0 + y1) // 2, int(x0 + x1) // 2
    coverage = np.pad(np.clip(contrast / (_RAMP * own), 0, 1) * near, _HALF)
    return coverage[y : y + _WINDOW, x : x + _WINDOW]


@cache
def _bank() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Templates (N, window^2), their squared norms, and the index of each one's shape."""
    templates, owners = [], []
    for index, shape in enumerate(world.SHAPES):
        for fill, color, background in _LOOKS:
            image = world.render(world.Scene((world.Thing(shape, color, (1, 1), fill),), background))[0]
            contrasts = [_contrast(cv2.GaussianBlur(image, (0, 0), blur) if blur else image) for blur in _BLURS]
            crops = [_window(contrast, contrast > _MIN_CONTRAST) for contrast in contrasts]
            for crop, scale in product(crops, _SCALES):
                for dy in _SHIFTS:
                    for dx in _SHIFTS:
                        move = np.array(
                            [[scale, 0, _HALF * (1 - scale) + dx], [0, scale, _HALF * (1 - scale) + dy]], np.float32
                        )
                        moved = cv2.warpAffine(crop.astype(np.float32), move, (_WINDOW, _WINDOW))
                        templates.append(moved.ravel())
                        owners.append(index)
    bank = np.stack(templates)
    return bank, (bank**2).sum(1), np.array(owners)


def _fits(windows: np.ndarray) -> np.ndarray:
    """Best Tanimoto coefficient a.b / (|a|^2 + |b|^2 - a.b) of windows (N, ...) with templates: (N, shapes)."""
    bank, norms, owners = _bank()
    a = windows.reshape(len(windows), -1).astype(np.float32)
    products = a @ bank.T
    tanimoto = products / (norms + (a**2).sum(1, keepdims=True) - products)
    return np.stack([tanimoto[:, owners == index].max(1) for index in range(len(world.SHAPES))], axis=1)


def evidence(fits: np.ndarray) -> float:
    """z of the module's formula, from the fits of all shapes."""
    second, first = np.sort(fits)[-2:]
    return float(np.log((1.01 - second) / (1.01 - first)) * np.clip((first - 0.6) / 0.3, 0, 1))


def _pieces(mask: np.ndarray) -> list[np.ndarray]:
    """4-connected components of at least `_MIN_AREA` pixels."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return [labels == i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= _MIN_AREA]


def _split_by_color(piece: np.ndarray, contrast: np.ndarray, label: np.ndarray) -> list[np.ndarray]:
    """Parts of a component by palette colour, if a second colour has an object's area of strong pixels in it."""
    strong = piece & (contrast > 0.5 * np.percentile(contrast[piece], 90))
    cores = {k: _pieces(strong & (label == k)) for k in np.unique(label[strong])}
    cores = {k: parts for k, parts in cores.items() if parts}
    if len(cores) < 2:
        return [piece]
    return [part for k in cores for part in _pieces(piece & (label == k))]


def _split_by_neck(piece: np.ndarray, contrast: np.ndarray) -> list[np.ndarray]:
    """Parts of a component that is too large for one object, at the level of contrast where it falls apart."""
    ys, xs = np.nonzero(piece)
    if max(np.ptp(ys), np.ptp(xs)) + 1 <= 1.3 * 2 * world.RADIUS:
        return [piece]
    top = np.percentile(contrast[piece], 90)
    for level in np.arange(0.2, 0.75, 0.05):
        cores = _pieces(piece & (contrast > level * top))
        if len(cores) > 1:
            distance = [cv2.distanceTransform((~core).astype(np.uint8), cv2.DIST_L2, 3) for core in cores]
            nearest = np.argmin(distance, axis=0)
            return [part for i in range(len(cores)) for part in _split_by_neck(piece & (nearest == i), contrast)]
    return [piece]


class ShapeDetector:
    """Finds the shapes of the tiny world in uint8 (H, W, 3) images."""

    classes = world.SHAPES

    def detect(self, image: np.ndarray) -> list[ShapeDetection]:
        """All candidates with their calibrated scores."""
        return [
            replace(found, score=float(1 / (1 + np.exp(-SLOPE * z - OFFSET)))) for found, z in self.candidates(image)
        ]

    def candidates(self, image: np.ndarray) -> list[tuple[ShapeDetection, float]]:
        """Detections before calibration (score 0), each with its evidence z."""
        smooth = denoise(image)
        contrast = _contrast(smooth)
        background = np.median(smooth.reshape(-1, 3), axis=0)
        spread = 1.4826 * np.median(contrast)
        foreground = contrast > max(_MIN_CONTRAST, 3.5 * spread)
        label = _color_labels(smooth, background)
        masks = [
            mask
            for piece in _pieces(foreground)
            for part in _split_by_color(piece, contrast, label)
            for mask in _split_by_neck(part, contrast)
        ]
        if not masks:
            return []
        fits = _fits(np.stack([_window(contrast, mask) for mask in masks]))
        return [
            (
                ShapeDetection(world.SHAPES[row.argmax()], _box(mask), 0.0, mask, color=color_name(smooth, mask)),
                evidence(row),
            )
            for mask, row in zip(masks, fits, strict=True)
        ]


def _box(mask: np.ndarray) -> Box:
    ys, xs = np.nonzero(mask)
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def _color_labels(image: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Index of the palette colour towards which each pixel departs from the background (H, W)."""
    offset = image.astype(np.float32) - background
    targets = 0.85 * _PALETTE - background
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    return (offset @ targets.T).argmax(2)


def color_name(image: np.ndarray, mask: np.ndarray) -> str:
    """Nearest palette entry, at any brightness that fills have, to the median colour inside the mask."""
    core = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    median = np.median(image[core if core.sum() >= 8 else mask].reshape(-1, 3), axis=0)
    tones = np.concatenate([tone * _PALETTE for tone in _TONES])
    distance = np.linalg.norm(lab(tones[None])[0] - lab(median[None, None])[0, 0], axis=1)
    return _NAMES[int(distance.argmin()) % len(_NAMES)]
