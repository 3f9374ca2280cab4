"""ShapeBench: VBench's questions (Huang et al., arXiv 2311.17982) asked of clips of the tiny world.

No weights are needed, so most answers are analogues; `KINDS` says of each dimension what it shares with VBench:
`same_formula`, `substituted_model` (VBench's rule with DIS flow for RAFT or the shape detector for GRiT) or `analogue`.
Aesthetic quality, human action, scene and the styles have no honest counterpart here and are left out. Raw values are
reported, never VBench's normalised total. A dimension that does not apply to a clip is None.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import cv2
import numpy as np

from rcm.evaluation.fidelity import MAX_PSNR, Fidelity, background, fidelity
from rcm.evaluation.geneval import THRESHOLD, judge
from rcm.evaluation.shapes import ShapeDetection, ShapeDetector, color_of, denoise, lab

KINDS = {
    "temporal_flickering": "same_formula",
    "motion_smoothness": "substituted_model",
    "track_smoothness": "analogue",
    "dynamic_degree": "substituted_model",
    "subject_consistency": "analogue",
    "background_consistency": "analogue",
    "imaging_quality": "analogue",
    "object_class": "substituted_model",
    "multiple_objects": "substituted_model",
    "color": "substituted_model",
    "spatial_relationship": "substituted_model",
    "spatial_relationship_strict": "analogue",
    "motion": "analogue",
    "overall_consistency": "analogue",
}
_STILL_FLOW = 3.0 / 256  # of the shorter side, VBench's limit for a static pair, mean of the top 2 % of the flow
_MOVING_FLOW = 6.0 / 256  # of the shorter side, VBench's limit for a dynamic pair, mean of the top 5 %
_MOVED = 1 / 6  # of the shorter side: a track that goes at least so far has a direction
_STAYED = 1 / 12  # of the shorter side: a track that goes at most so far stands still
_LINK = 3 / 4  # of the shorter side: how far detections of one track may lie apart from frame to frame


@dataclass
class Track:
    """One object over time: centres (T, 2) as (x, y), NaN where it was not seen."""

    cls: str
    color: str
    points: np.ndarray

    @property
    def whole(self) -> bool:
        """Whether it was seen in two thirds of the frames, over two thirds of the time at least."""
        seen = np.flatnonzero(~np.isnan(self.points[:, 0]))
        return len(seen) >= 2 / 3 * len(self.points) and seen[-1] - seen[0] >= 2 / 3 * (len(self.points) - 1)

    def direction(self, side: float) -> str | None:
        """left, right, up, down or still by the way from first to last sight; None for anything between."""
        seen = self.points[~np.isnan(self.points[:, 0])]
        dx, dy = seen[-1] - seen[0]
        if np.hypot(dx, dy) <= _STAYED * side:
            return "still"
        if max(abs(dx), abs(dy)) < _MOVED * side or max(abs(dx), abs(dy)) < 2 * min(abs(dx), abs(dy)):
            return None
        return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")


@dataclass
class Clip:
    """Frames uint8 (T, H, W, 3) and what is seen in them; T = 1 for an image."""

    frames: np.ndarray
    detector: ShapeDetector = field(default_factory=ShapeDetector)

    @cached_property
    def detections(self) -> list[list[ShapeDetection]]:
        """All candidates of each frame, with scores."""
        return [self.detector.detect(frame) for frame in self.frames]

    @cached_property
    def seen(self) -> list[list[ShapeDetection]]:
        """Detections of each frame above GenEval's threshold."""
        return [[found for found in frame if found.score > THRESHOLD] for frame in self.detections]

    @cached_property
    def fidelities(self) -> list[Fidelity]:
        """Fidelity of each frame."""
        return [fidelity(frame, found) for frame, found in zip(self.frames, self.detections, strict=True)]

    @cached_property
    def side(self) -> int:
        """The shorter side in pixels."""
        return min(self.frames.shape[1:3])

    @cached_property
    def flow(self) -> np.ndarray:
        """Length of the flow between neighbouring frames (T-1, H, W), pixels."""
        greys = [grey(frame) for frame in self.frames]
        return np.stack([np.linalg.norm(dis_flow(a, b), axis=2) for a, b in pairwise(greys)])

    @cached_property
    def tracks(self) -> list[Track]:
        """Detections of one class and colour, linked from frame to frame to the nearest."""
        tracks: list[Track] = []
        for t, frame in enumerate(self.seen):
            free = list(tracks)
            for found in sorted(frame, key=lambda found: -found.score):
                center = np.array([(found.box[0] + found.box[2]) / 2, (found.box[1] + found.box[3]) / 2])
                track = _nearest(free, found, center, _LINK * self.side)
                if track is None:
                    track = Track(found.cls, found.color, np.full((len(self.frames), 2), np.nan))
                    tracks.append(track)
                else:
                    free = [other for other in free if other is not track]
                track.points[t] = center
        return tracks


def _nearest(tracks: Sequence[Track], found: ShapeDetection, center: np.ndarray, least: float) -> Track | None:
    """The track of the same class and colour that was last seen nearest to `center`, if as near as `least`."""
    best = None
    for track in tracks:
        if (track.cls, track.color) == (found.cls, found.color):
            last = track.points[~np.isnan(track.points[:, 0])][-1]
            distance = float(np.linalg.norm(last - center))
            if distance <= least:
                best, least = track, distance
    return best


def grey(frame: np.ndarray) -> np.ndarray:
    """uint8 (H, W), with noise removed."""
    return cv2.cvtColor(np.rint(denoise(frame)).astype(np.uint8), cv2.COLOR_RGB2GRAY)


def dis_flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dense inverse search flow (H, W, 2) from grey frame `a` to `b`."""
    flow = np.zeros((*a.shape, 2), np.float32)
    return np.asarray(cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(a, b, flow))


def top_flow(flow: np.ndarray, share: float) -> np.ndarray:
    """Mean of the largest `share` of the flow lengths of each pair (T-1,)."""
    lengths = np.sort(flow.reshape(len(flow), -1), axis=1)[:, ::-1]
    return lengths[:, : max(1, int(share * lengths.shape[1]))].mean(1)


# --- Quality -------------------------------------------------------------------------------------------------------


def temporal_flickering(frames: np.ndarray) -> float:
    """(255 - mean absolute difference of neighbouring frames) / 255."""
    return 1 - float(np.mean([cv2.absdiff(a, b).mean() for a, b in pairwise(frames)])) / 255


def is_static(clip: Clip) -> bool:
    """VBench's filter before temporal flickering: fewer than round(2 T / 16) pairs move."""
    moving = int((top_flow(clip.flow, 0.02) > _STILL_FLOW * clip.side).sum())
    return moving < max(1, round(2 * len(clip.frames) / 16))


def dynamic_degree(clip: Clip) -> float:
    """1 if at least round(4 T / 16) pairs move, else 0."""
    moving = int((top_flow(clip.flow, 0.05) > _MOVING_FLOW * clip.side).sum())
    return float(moving >= max(1, round(4 * len(clip.frames) / 16)))


def motion_smoothness(frames: np.ndarray) -> float:
    """(255 - mean absolute error of every second frame, interpolated from its neighbours by flow) / 255."""
    errors = [np.abs(_between(a, c) - b.astype(np.float32)).mean() for a, b, c in _triples(frames)]
    return float(1 - np.mean(errors) / 255)


def _triples(frames: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [(frames[t - 1], frames[t], frames[t + 1]) for t in range(1, len(frames) - 1, 2)]


def _between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The frame half-way: each end moved by half its flow, the two averaged; what moves wins over what it uncovers."""
    halves = [_pushed(a, dis_flow(grey(a), grey(b)) / 2), _pushed(b, dis_flow(grey(b), grey(a)) / 2)]
    weight = sum(weights for _, weights in halves)
    return sum(values * weights for values, weights in halves) / weight


def _pushed(frame: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels moved along their flow, and weights (H, W, 1) by which faster pixels cover slower ones."""
    height, width = frame.shape[:2]
    ys, xs = np.mgrid[:height, :width]
    weights = np.exp(2 * np.minimum(np.linalg.norm(flow, axis=2), 8.0))
    x, y = xs + flow[..., 0], ys + flow[..., 1]
    total, values = np.zeros(height * width), np.zeros((height * width, 3))
    for dy in (0, 1):
        for dx in (0, 1):
            px, py = np.floor(x).astype(int) + dx, np.floor(y).astype(int) + dy
            share = weights * (1 - np.abs(x - px)) * (1 - np.abs(y - py))
            inside = (px >= 0) & (px < width) & (py >= 0) & (py < height)
            target = (py * width + px)[inside]
            total += np.bincount(target, share[inside], height * width)
            for c in range(3):
                values[:, c] += np.bincount(target, (share * frame[..., c])[inside], height * width)
    hole = total < 1e-6
    values = np.where(hole[:, None], frame.reshape(-1, 3), values / np.maximum(total, 1e-6)[:, None])
    total = np.where(hole, 1e-3, total)
    return values.reshape(frame.shape), total.reshape(height, width, 1)


def track_smoothness(clip: Clip) -> float | None:
    """exp(-median length of the second differences, pixels) of a track, mean over tracks."""
    steps = [np.linalg.norm(np.diff(track.points, 2, axis=0), axis=1) for track in clip.tracks if track.whole]
    known = [lengths[~np.isnan(lengths)] for lengths in steps]
    return _mean([float(np.exp(-np.median(lengths))) for lengths in known if len(lengths)])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def consistency(similarity: Callable[[int, int], float], frames: int) -> float:
    """VBench's formula: mean over t >= 1 of (similarity to the frame before + similarity to the first) / 2."""
    return float(np.mean([(similarity(t, t - 1) + similarity(t, 0)) / 2 for t in range(1, frames)]))


def subject_consistency(clip: Clip) -> float:
    """Consistency of the multiset of (colour, shape): intersection over union, 0 where nothing is seen."""
    bags = [Counter((found.color, found.cls) for found in frame) for frame in clip.seen]

    def similarity(s: int, t: int) -> float:
        union = (bags[s] | bags[t]).total()
        return (bags[s] & bags[t]).total() / union if union else 0.0

    return consistency(similarity, len(bags))


def background_consistency(clip: Clip) -> float:
    """Consistency of the background's colour: 1 - CIELAB distance / 100."""
    pairs = zip(clip.frames, clip.detections, strict=True)
    levels = [lab(background(frame, found)[None, None])[0, 0] for frame, found in pairs]
    return consistency(lambda s, t: max(0.0, 1 - float(np.linalg.norm(levels[s] - levels[t])) / 100), len(levels))


def imaging_quality(clip: Clip) -> float:
    """Mean over frames of PSNR / 50 dB and sharpness, in equal parts; a frame in which nothing is found counts 0."""
    parts = [
        0.0 if f.psnr is None or f.sharpness is None else (f.psnr / MAX_PSNR + min(max(f.sharpness, 0.0), 1.0)) / 2
        for f in clip.fidelities
    ]
    return float(np.mean(parts))


# --- Semantics -----------------------------------------------------------------------------------------------------


def share_of_frames(clip: Clip, holds: Callable[[list[ShapeDetection]], bool]) -> float:
    """Share of frames whose detections fulfil a condition."""
    return float(np.mean([holds(frame) for frame in clip.seen]))


def _shows_all(include: Sequence[Mapping[str, Any]]) -> Callable[[list[ShapeDetection]], bool]:
    return lambda frame: {item["class"] for item in include} <= {found.cls for found in frame}


def color(clip: Clip, name: str, wanted: str) -> float | None:
    """Frames with the object in its colour over frames with the object; None if it is never seen."""
    shown = [[found.color for found in frame if found.cls == name] for frame in clip.seen]
    return float(np.mean([wanted in colors for colors in shown if colors])) if any(shown) else None


def spatial_relationship(clip: Clip, a: str, b: str, relation: str) -> float:
    """VBench's rule, mean over frames: 1 if the right axis dominates and boxes hardly overlap; it ignores the side."""

    def of_frame(frame: Sequence[ShapeDetection]) -> float:
        pairs = [(x.box, y.box) for x in frame for y in frame if x is not y and (x.cls, y.cls) == (a, b)]
        return max((_axis_score(x, y, relation) for x, y in pairs), default=0.0)

    return float(np.mean([of_frame(frame) for frame in clip.seen]))


def _axis_score(a: Sequence[float], b: Sequence[float], relation: str) -> float:
    dx, dy = (abs(a[i] + a[i + 2] - b[i] - b[i + 2]) for i in (0, 1))
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if along <= across:
        return 0.0
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    overlap = width * height / (areas - width * height)
    return 1.0 if overlap < 0.1 else 0.1 / overlap


def mover(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of `include` that the caption mentions first: the one that moves."""
    return metadata["include"][-1 if metadata["tag"] == "position" else 0]


def motion(clip: Clip, metadata: Mapping[str, Any]) -> bool:
    """Whether the clip moves as the caption says.

    With a motion word a track of the first-mentioned object goes that way, and where several of its class are asked
    for it is the only one that moves. Without a motion word there are tracks and all stand still.
    """
    whole = [track for track in clip.tracks if track.whole]
    if "motion" not in metadata:
        return bool(whole) and all(track.direction(clip.side) == "still" for track in whole)
    entry = mover(metadata)
    own = [t for t in whole if t.cls == entry["class"] and entry.get("color", t.color) == t.color]
    directions = [track.direction(clip.side) for track in own]
    if entry["count"] > 1 and len(directions) - directions.count("still") != 1:
        return False
    return metadata["motion"] in directions


def majority(clip: Clip, metadata: Mapping[str, Any]) -> bool:
    """Whether more than half of the frames satisfy a caption by GenEval's decision."""
    return bool(np.mean([judge(metadata, frame, color_of)[0] for frame in clip.detections]) > 0.5)


def facts(clip: Clip, metadata: Mapping[str, Any]) -> dict[str, bool]:
    """Each fact of the caption (objects, colours, relations, limits, motion) and whether it holds."""
    tag, include = metadata["tag"], metadata["include"]
    bare = [{k: v for k, v in entry.items() if k in ("class", "count")} for entry in include]
    claims: dict[str, list[Mapping[str, Any]]] = {}
    for i, entry in enumerate(include):
        claims[f"{i}.objects"] = [bare[i]]
        if "color" in entry:
            claims[f"{i}.color"] = [{**bare[i], "color": entry["color"]}]
        if "position" in entry:
            claims[f"{i}.position"] = [*bare[:i], {**bare[i], "position": entry["position"]}]
    held = {name: majority(clip, {"tag": tag, "include": claim}) for name, claim in claims.items()}
    if metadata.get("exclude"):
        held["exclude"] = majority(clip, {"tag": tag, "include": [], "exclude": metadata["exclude"]})
    return {**held, "motion": motion(clip, metadata)}


def measure(clip: Clip, metadata: Mapping[str, Any]) -> dict[str, float | None]:
    """All dimensions of one clip; None where a dimension does not ask about such captions."""
    tag, include = metadata["tag"], metadata["include"]
    moves = "motion" in metadata
    values: dict[str, float | None] = dict.fromkeys(KINDS)
    if not moves and is_static(clip):
        values["temporal_flickering"] = temporal_flickering(clip.frames)
    if moves:
        values["dynamic_degree"] = dynamic_degree(clip)
    values |= {
        "motion_smoothness": motion_smoothness(clip.frames),
        "track_smoothness": track_smoothness(clip),
        "subject_consistency": subject_consistency(clip),
        "background_consistency": background_consistency(clip),
        "imaging_quality": imaging_quality(clip),
        "motion": float(motion(clip, metadata)),
        "overall_consistency": float(np.mean(list(facts(clip, metadata).values()))),
    }
    if tag == "single_object":
        values["object_class"] = share_of_frames(clip, _shows_all(include))
    elif tag == "two_object":
        values["multiple_objects"] = share_of_frames(clip, _shows_all(include))
    elif tag == "colors" and "color" in include[0]:
        values["color"] = color(clip, include[0]["class"], include[0]["color"])
    elif tag == "position" and "position" in include[-1]:
        relation, index = include[-1]["position"]
        values["spatial_relationship"] = spatial_relationship(
            clip, include[-1]["class"], include[index]["class"], relation
        )
        values["spatial_relationship_strict"] = float(
            np.mean([judge(metadata, found, color_of)[0] for found in clip.detections])
        )
    return values
