"""GenEval's decision: which captions do the detected objects satisfy? (Ghosh et al., arXiv 2310.11513)

Only the detector and the classifier of colours differ between the tiny world and photographs; thresholds, order and
limits are GenEval's. Tiny results are called ShapeEval: same protocol, other detector, other prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from rcm.data.prompts import TASKS

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16  # of a class
POSITION_THRESHOLD = 0.1  # share of the two objects' sizes by which offsets shrink
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One object: box (x0, y0, x1, y1) in pixels with x1, y1 exclusive, score in [0, 1], mask (H, W) bool or None."""

    cls: str
    box: Box
    score: float
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


Found = TypeVar("Found", bound=Detection)


class Detector(Protocol):
    """Finds objects; the result is neither filtered nor sorted."""

    @property
    def classes(self) -> tuple[str, ...]:
        """What it can find."""
        ...

    def detect(self, image: np.ndarray) -> Sequence[Detection]:
        """Objects of an uint8 (H, W, 3) image."""
        ...


def relations(a: Box, b: Box) -> set[str]:
    """How `a` stands to `b`: offset of the centres, less a tenth of both sizes, over the length of the raw offset."""
    center_a, center_b = (np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]) for box in (a, b))
    size_a, size_b = (np.array([box[2] - box[0], box[3] - box[1]]) for box in (a, b))
    offset = center_a - center_b
    reduced = np.maximum(np.abs(offset) - POSITION_THRESHOLD * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(reduced) < 1e-3):
        return set()
    x, y = reduced / np.linalg.norm(offset)
    return {
        name
        for name, holds in (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
        if holds
    }


def kept(metadata: Mapping[str, Any], detections: Sequence[Found]) -> dict[str, list[Found]]:
    """Detections above the task's threshold by class, best first, at most `MAX_OBJECTS` of each."""
    threshold = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
    groups: dict[str, list[Found]] = {}
    for found in sorted(detections, key=lambda detection: -detection.score):
        group = groups.setdefault(found.cls, [])
        if found.score > threshold and len(group) < MAX_OBJECTS:
            group.append(found)
    return groups


def judge(
    metadata: Mapping[str, Any], detections: Sequence[Found], color_of: Callable[[Found], str]
) -> tuple[bool, str]:
    """Whether the detections, unfiltered and in any order, satisfy a caption, and why not.

    Of each class that `include` names, the `count` most confident objects are judged. Other objects do no harm,
    unless `exclude` forbids that many of a class. `color_of` names the colour of a detection, one of those given.
    """
    seen_by_class = kept(metadata, detections)
    faults: list[str] = []
    groups: list[list[Found] | None] = []
    for wanted in metadata.get("include") or []:
        name, count = wanted["class"], wanted["count"]
        found = seen_by_class.get(name, [])[:count]
        fault = None
        if len(found) < count:
            fault = f"expected {name} >= {count}, found {len(found)}"
        elif "color" in wanted:
            seen = [color_of(detection) for detection in found]
            if seen.count(wanted["color"]) < count:
                fault = f"expected {wanted['color']} {name} >= {count}, found {', '.join(seen)}"
        if fault is None and "position" in wanted:
            relation, index = wanted["position"]
            target = groups[index]
            if target is None:
                fault = f"no object for {name} to be {relation}"
            else:
                for a, b in ((a, b) for a in found for b in target):
                    seen_relations = relations(a.box, b.box)
                    if relation not in seen_relations:
                        seen_text = " and ".join(sorted(seen_relations)) or "not apart from"
                        fault = f"expected {name} {relation} target, found {seen_text} target"
                        break
        if fault:
            faults.append(fault)
        groups.append(found if fault is None else None)
    for unwanted in metadata.get("exclude") or []:
        number = len(seen_by_class.get(unwanted["class"], []))
        if number >= unwanted["count"]:
            faults.append(f"expected {unwanted['class']} < {unwanted['count']}, found {number}")
    return not faults, "\n".join(faults)


def summarise(tags: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    """Share of correct images of each task, and `overall`, the unweighted mean of the tasks that occur.

    Raises ValueError for a tag that is none of GenEval's tasks, and where there are no images.
    """
    if not tags or not set(tags) <= set(TASKS):
        strange = next((tag for tag in tags if tag not in TASKS), "none")
        raise ValueError(f"expected tags among {', '.join(TASKS)}; got {strange}")
    shares = {
        task: float(np.mean([ok for tag, ok in zip(tags, correct, strict=True) if tag == task]))
        for task in TASKS
        if task in tags
    }
    return {**shares, "overall": float(np.mean(list(shares.values())))}


def shapeeval(images: Sequence[np.ndarray], metadatas: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Task scores of uint8 (48, 48, 3) images of the tiny world, one caption each."""
    from rcm.evaluation.shapes import ShapeDetector, color_of

    detector = ShapeDetector()
    correct = [judge(meta, detector.detect(image), color_of)[0] for image, meta in zip(images, metadatas, strict=True)]
    return summarise([meta["tag"] for meta in metadatas], correct)
