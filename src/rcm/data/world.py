"""The tiny world: coloured shapes in a 3 x 3 grid, as images and as short clips in which one shape moves.

A scene is drawn for a caption in GenEval's metadata format (`rcm.data.prompts`). What the caption leaves open is
drawn at random: cells, colours that are not named, fill, and the grey of the background. These hidden factors are what
diversity is measured on. Clips have 1 + 4k frames, as the causal codec of Wan2.1 has them; the moving shape crosses
one cell in four frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (222, 44, 44),
    "yellow": (244, 212, 42),
    "green": (44, 168, 72),
    "blue": (46, 92, 232),
    "purple": (168, 60, 206),
    "white": (242, 242, 242),
}
FILLS = ("solid", "shaded", "striped", "rimmed")
RELATIONS = ("left of", "right of", "above", "below")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}

GRID = 3
CELL = 16  # pixels
SIZE = GRID * CELL
FRAMES_PER_CELL = 4  # frames in which a moving shape crosses one cell
CLIP_FRAMES = 1 + (GRID - 1) * FRAMES_PER_CELL
BACKGROUND = (25.0, 85.0)  # range of the grey level
RADIUS = 6.4  # pixels, circumscribed about a shape
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `cell` is (row, column)."""

    shape: str
    color: str
    cell: tuple[int, int]
    fill: str = "solid"


@dataclass(frozen=True)
class Scene:
    """Shapes on a grey background; in a clip the first thing moves in `direction`, if there is one."""

    things: tuple[Thing, ...]
    background: float
    direction: str | None = None


def _inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points (in units of the radius, y down) lie inside the shape."""
    if shape == "circle":
        return x**2 + y**2 <= 0.94**2
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.82
    if shape == "triangle":
        return (y <= 0.78) & (np.abs(x) <= (y + 0.98) * 0.56)
    if shape == "cross":
        return np.minimum(np.abs(x), np.abs(y)) <= 0.3
    if shape == "star":
        angle = np.arctan2(x, -y)
        sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        inner, outer = 0.44, 1.05
        # the edge from the tip (angle 0) to the notch (angle pi/5), as a line in polar form
        tip, notch = np.array([outer, 0.0]), inner * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
        radius = np.hypot(x, y)
        return radius * (np.cos(sector) * normal[0] + np.sin(sector) * normal[1]) <= normal @ tip
    raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")


@cache
def _stencil(shape: str, fill: str) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (CELL, CELL) in [0, 1] and brightness (CELL, CELL) of a shape in the middle of a cell."""
    n = CELL * _SUPERSAMPLE
    axis = ((np.arange(n) + 0.5) / _SUPERSAMPLE - CELL / 2) / RADIUS
    y, x = np.meshgrid(axis, axis, indexing="ij")
    inside = _inside(shape, y, x) & (np.maximum(np.abs(x), np.abs(y)) <= 1.05)
    if fill == "solid":
        tone = np.ones_like(x)
    elif fill == "shaded":
        tone = 0.9 - 0.32 * y
    elif fill == "striped":
        tone = np.where(np.floor((x + 2) * 2.2) % 2 == 0, 1.0, 0.7)
    elif fill == "rimmed":
        tone = np.where(_inside(shape, y / 0.72, x / 0.72), 1.0, 0.62)
    else:
        raise ValueError(f"unknown fill {fill!r}: expected one of {', '.join(FILLS)}")

    def pool(a: np.ndarray) -> np.ndarray:
        return a.reshape(CELL, _SUPERSAMPLE, CELL, _SUPERSAMPLE).mean((1, 3))

    coverage = pool(inside.astype(float))
    brightness = pool(inside * tone) / np.maximum(coverage, 1e-9)
    return coverage, np.clip(brightness, 0.0, 1.1)


def render(scene: Scene, frames: int = 1) -> np.ndarray:
    """Draw a scene: uint8 (frames, SIZE, SIZE, 3). A moving shape advances one cell in `FRAMES_PER_CELL` frames."""
    step = CELL // FRAMES_PER_CELL
    video = np.full((frames, SIZE, SIZE, 3), float(scene.background))
    for t in range(frames):
        for i, thing in enumerate(scene.things):
            coverage, brightness = _stencil(thing.shape, thing.fill)
            top, left = thing.cell[0] * CELL, thing.cell[1] * CELL
            if i == 0 and scene.direction is not None:
                dy, dx = DIRECTIONS[scene.direction]
                top, left = top + dy * step * t, left + dx * step * t
            if not (0 <= top <= SIZE - CELL and 0 <= left <= SIZE - CELL):
                raise ValueError(f"a {thing.shape} moves out of the picture: {frames} frames from cell {thing.cell}")
            color = np.clip(brightness[..., None] * np.array(COLORS[thing.color]), 0, 255)
            patch = video[t, top : top + CELL, left : left + CELL]
            patch += coverage[..., None] * (color - patch)
    return np.rint(video).astype(np.uint8)


def _related(relation: str, a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether cell `a` stands in `relation` to cell `b`; along a diagonal both relations hold, as in GenEval."""
    dy, dx = a[0] - b[0], a[1] - b[1]
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 0 and along >= abs(across)


def _track(cell: tuple[int, int], direction: str | None) -> list[tuple[int, int]]:
    if direction is None:
        return [cell]
    dy, dx = DIRECTIONS[direction]
    return [(cell[0] + dy * k, cell[1] + dx * k) for k in range(GRID)]


@cache
def _layouts(count: int, relation: str | None, direction: str | None) -> tuple[tuple[tuple[int, int], ...], ...]:
    """All placements of `count` shapes: no two meet, the first stays inside, and stands in `relation` to the second."""
    cells = list(product(range(GRID), range(GRID)))
    found: list[tuple[tuple[int, int], ...]] = []

    def extend(placed: tuple[tuple[int, int], ...]) -> None:
        if len(placed) == count:
            found.append(placed)
            return
        track = _track(placed[0], direction) if placed else []
        for cell in cells:
            if not placed:
                fits = all(0 <= y < GRID and 0 <= x < GRID for y, x in _track(cell, direction))
            else:
                fits = cell not in placed and cell not in track
                if len(placed) == 1 and relation is not None:
                    fits = fits and all(_related(relation, a, cell) for a in track)
            if fits:
                extend((*placed, cell))

    extend(())
    return tuple(found)


def compatible(metadata: Mapping[str, Any]) -> bool:
    """Whether the world can show a caption (some relations exclude some motions)."""
    return bool(_layouts(*_demands(metadata)[1:]))


def _demands(metadata: Mapping[str, Any]) -> tuple[list[tuple[str, str | None]], int, str | None, str | None]:
    """(shape, colour or None) of each thing, the mover first; their number; the relation; the direction."""
    include = list(metadata["include"])
    relation = None
    if include[-1].get("position"):  # GenEval lists B first and then A, which stands in relation to B
        relation = include[-1]["position"][0]
        include.reverse()
    things = [(item["class"], item.get("color")) for item in include for _ in range(item["count"])]
    for shape, color in things:
        if shape not in SHAPES:
            raise ValueError(f"the tiny world has no {shape!r}: it has {', '.join(SHAPES)}")
        if color is not None and color not in COLORS:
            raise ValueError(f"the tiny world has no colour {color!r}: it has {', '.join(COLORS)}")
    return things, len(things), relation, metadata.get("motion")


def sample_scene(metadata: Mapping[str, Any], rng: np.random.Generator) -> Scene:
    """Draw a scene that shows a caption; hidden factors are uniform.

    Raises ValueError where the world cannot show it: an unknown shape or colour, or too little room.
    """
    wanted, count, relation, direction = _demands(metadata)
    layouts = _layouts(count, relation, direction)
    if not layouts:
        raise ValueError(f"the tiny world has no room for {metadata.get('prompt', metadata)!r}")
    cells = layouts[rng.integers(len(layouts))]
    names = tuple(COLORS)
    things = tuple(
        Thing(shape, color or names[rng.integers(len(names))], cell, FILLS[rng.integers(len(FILLS))])
        for (shape, color), cell in zip(wanted, cells, strict=True)
    )
    return Scene(things, float(rng.uniform(*BACKGROUND)), direction)
