"""Diversity over seeds of one prompt, on what the caption leaves open: place, unnamed colour, fill, background.

Only samples that satisfy their caption count, so that failures do not pass for variety. As entropies grow with the
number of samples, every measure is its expectation over `MINIMUM` of them drawn without replacement: a model that fails
more often is not thereby less diverse. A prompt with fewer satisfying samples has no value.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import hypergeom

from rcm.data import world
from rcm.evaluation.fidelity import background, redraw
from rcm.evaluation.geneval import THRESHOLD
from rcm.evaluation.shapebench import Clip, mover
from rcm.evaluation.shapes import ShapeDetection, lab

MINIMUM = 8  # satisfying samples that a prompt needs, and the number that measures refer to
FACTORS = ("cell", "color", "fill", "background")
_LEVELS = 4  # parts of the range of grey levels
_SHARP = 0.6  # sharpness below which fills cannot be told apart; then the fill is "unclear"
_DRAWS = 64  # random subsets where there is no closed form
_PRIOR_SCENES = 2000
_REFERENCES = 32  # scenes of a caption, for recall and coverage
_BLOCKS = 8  # a side: parts of a picture whose mean colours are its features
_NEAREST = 3

Factors = dict[str, Hashable]


def hidden_factors(clip: Clip, metadata: Mapping[str, Any]) -> Factors | None:
    """The hidden factors of the first frame, or None if the shape that the caption mentions first is not seen.

    Of several such shapes the first in reading order is taken. Colour is left out where the caption names it.
    """
    found = clip.detections[0]
    entry = mover(metadata)
    own = [
        d for d in found if d.score > THRESHOLD and d.cls == entry["class"] and entry.get("color", d.color) == d.color
    ]
    if not own:
        return None
    first = min(own, key=_cell)
    sharpness = clip.fidelities[0].sharpness
    _, fills = redraw(clip.frames[0], found)
    return _factors(
        metadata,
        cell=_cell(first),
        color=first.color,
        fill=fills[found.index(first)] if sharpness is not None and sharpness >= _SHARP else "unclear",
        level=float(background(clip.frames[0], found).mean()),
    )


def _cell(detection: ShapeDetection) -> tuple[int, int]:
    x0, y0, x1, y1 = detection.box
    return int((y0 + y1) / 2 // world.CELL), int((x0 + x1) / 2 // world.CELL)


def _factors(metadata: Mapping[str, Any], *, cell: Hashable, color: Hashable, fill: Hashable, level: float) -> Factors:
    low, high = world.BACKGROUND
    part = int(np.clip((level - low) / (high - low) * _LEVELS, 0, _LEVELS - 1))
    factors: Factors = {"cell": cell, "color": color, "fill": fill, "background": part}
    if "color" in mover(metadata):
        del factors["color"]
    return factors


def prior(metadata: Mapping[str, Any], seed: int = 0) -> dict[str, dict[Hashable, float]]:
    """How often the world shows each value of each hidden factor for a caption (from 2,000 scenes)."""
    rng = np.random.default_rng(seed)
    entry = mover(metadata)
    counts: dict[str, Counter[Hashable]] = {}
    for _ in range(_PRIOR_SCENES):
        scene = world.sample_scene(metadata, rng)
        own = [t for t in scene.things if t.shape == entry["class"] and entry.get("color", t.color) == t.color]
        first = min(own, key=lambda thing: thing.cell)
        factors = _factors(metadata, cell=first.cell, color=first.color, fill=first.fill, level=scene.background)
        for name, value in factors.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: {value: k / _PRIOR_SCENES for value, k in found.items()} for name, found in counts.items()}


# --- Measures ------------------------------------------------------------------------------------------------------


def entropy(values: Sequence[Hashable], size: int = MINIMUM) -> float | None:
    """Expected entropy, bits, of `size` of the values drawn without replacement; None if there are fewer.

    E[-sum_c (k_c / m) log2(k_c / m)] with k_c hypergeometric: exact.
    """
    n = len(values)
    if n < size:
        return None
    k = np.arange(1, size + 1)
    terms = -k / size * np.log2(k / size)
    return float(sum(hypergeom.pmf(k, n, count, size) @ terms for count in Counter(values).values())) + 0.0


def vendi(kernel: np.ndarray) -> float:
    """Vendi score exp(-sum_i l_i ln l_i) of the eigenvalues of kernel / n (Friedman and Dieng, arXiv 2210.02410).

    The effective number of different samples: 1 if all are alike, n if none is like another. The kernel (n, n) is
    positive semi-definite with ones on the diagonal.
    """
    values = np.linalg.eigvalsh(kernel / len(kernel))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def attribute_kernel(samples: Sequence[Factors]) -> np.ndarray:
    """Share of hidden factors in which two samples agree (n, n)."""
    agree = [[np.mean([a[name] == b[name] for name in a]) for b in samples] for a in samples]
    return np.array(agree).reshape(len(samples), len(samples))


def total_variation(values: Sequence[Hashable], wanted: Mapping[Hashable, float]) -> float:
    """Half the L1 distance of the values' frequencies from the wanted ones."""
    seen = {value: count / len(values) for value, count in Counter(values).items()}
    # fsum: the order of a set of texts differs from process to process, the sum must not
    return math.fsum(abs(seen.get(v, 0.0) - wanted.get(v, 0.0)) for v in seen.keys() | wanted.keys()) / 2


def pixel_distance(images: Sequence[np.ndarray]) -> float:
    """Mean over pairs of the root mean squared difference, pixels in [0, 1]; noise raises it, so it is secondary."""
    flat = np.stack([image.ravel() for image in images]).astype(np.float64) / 255
    squares = (flat**2).sum(1)
    distances = np.maximum(squares[:, None] + squares[None] - 2 * flat @ flat.T, 0) / flat.shape[1]
    return float(np.sqrt(distances[np.triu_indices(len(flat), 1)]).mean())


def appearance(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Features of pictures uint8 (H, W, 3): the mean colour of each of 8 x 8 blocks, CIELAB (N, 192)."""
    blocks = [cv2.resize(frame, (_BLOCKS, _BLOCKS), interpolation=cv2.INTER_AREA) for frame in frames]
    return np.stack([lab(block).ravel() for block in blocks]).astype(np.float64)


def _radii(features: np.ndarray) -> np.ndarray:
    """Distance of each to its third nearest other one (N,)."""
    return np.sort(cdist(features, features), axis=1)[:, _NEAREST]


def recall(real: np.ndarray, made: np.ndarray) -> float:
    """Share of real samples (M, D) within reach of a made one (N, D), as far as its third nearest made neighbour.

    Kynkaanniemi et al., arXiv 1904.06991, with k = 3.
    """
    return float((cdist(real, made) <= _radii(made)).any(axis=1).mean())


def coverage(real: np.ndarray, made: np.ndarray) -> float:
    """Share of real samples (M, D) that have a made one (N, D) as near as their third nearest real neighbour.

    Naeem et al., arXiv 2002.09797, with k = 3.
    """
    return float((cdist(real, made).min(axis=1) <= _radii(real)).mean())


def _over_subsets(measure: Callable[[np.ndarray], float], n: int, seed: int) -> float | None:
    """Mean of a measure of `MINIMUM` of n samples over random subsets; None if there are fewer."""
    if n < MINIMUM:
        return None
    if n == MINIMUM:
        return measure(np.arange(n))
    rng = np.random.default_rng(seed)
    return float(np.mean([measure(rng.permutation(n)[:MINIMUM]) for _ in range(_DRAWS)]))


def of_prompt(clips: Sequence[Clip], metadata: Mapping[str, Any], seed: int = 0) -> dict[str, float | None]:
    """All measures over samples of one prompt; `clips` are those that satisfy it.

    `diversity.*`: entropies in bits and the Vendi score of the hidden factors, more is more diverse. `prior.*`: total
    variation between the samples' factors and the world's, less is better; recall and coverage of the world's pictures
    by the samples' first frames, more is better. Even ground truth does not reach 0 and 1 with so few samples, so
    compare with the control. `pixels.distance`: secondary.
    """
    seen = [(clip, factors) for clip in clips if (factors := hidden_factors(clip, metadata)) is not None]
    n = len(seen)
    expected = prior(metadata) if n >= MINIMUM else {}
    values: dict[str, float | None] = {}
    for name in FACTORS:
        column = [factors[name] for _, factors in seen if name in factors]
        values[f"diversity.{name}_entropy"] = entropy(column)
        values[f"prior.{name}_distance"] = _distance(column, expected.get(name, {}), seed)
    kernel = attribute_kernel([factors for _, factors in seen])
    values["diversity.vendi"] = _over_subsets(lambda chosen: vendi(kernel[np.ix_(chosen, chosen)]), n, seed)
    values |= _reached([clip.frames[0] for clip, _ in seen], metadata, seed)
    values["pixels.distance"] = pixel_distance([clip.frames for clip, _ in seen]) if n >= MINIMUM else None
    return values


def _reached(frames: Sequence[np.ndarray], metadata: Mapping[str, Any], seed: int) -> dict[str, float | None]:
    """Recall and coverage of scenes of the caption."""
    if len(frames) < MINIMUM:
        return {"prior.recall": None, "prior.coverage": None}
    rng = np.random.default_rng(0)
    real = appearance([world.render(world.sample_scene(metadata, rng))[0] for _ in range(_REFERENCES)])
    made = appearance(frames)
    return {
        "prior.recall": _over_subsets(lambda chosen: recall(real, made[chosen]), len(made), seed),
        "prior.coverage": _over_subsets(lambda chosen: coverage(real, made[chosen]), len(made), seed),
    }


def _distance(column: Sequence[Hashable], expected: Mapping[Hashable, float], seed: int) -> float | None:
    return _over_subsets(lambda chosen: total_variation([column[i] for i in chosen], expected), len(column), seed)
