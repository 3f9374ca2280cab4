"""Figures of samples, which keep every pixel of small ones: images side by side and clips as film strips."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from rcm.artefact import UserError
from rcm.evaluation.samples import PromptSamples, list_samples, read_frames
from rcm.report.look import DPI, FAINT, color_of, png, style
from rcm.report.scores import CONTROLS, Run, run_of

STRIP = 9  # frames of a clip that are shown
LEAST = 240  # pixels across which a picture is shown at least, if it has them


@dataclass(frozen=True)
class Samples:
    """The samples of one run, by number of the prompt."""

    run: Run
    prompts: Mapping[int, PromptSamples]

    def frames(self, prompt: int) -> np.ndarray:
        """The first sample of a prompt, uint8 (T, H, W, 3)."""
        return read_frames(self.prompts[prompt].paths[0])

    def caption(self, prompt: int) -> str:
        """What a prompt asks for."""
        return str(self.prompts[prompt].metadata["prompt"])


def sample_runs(folders: Iterable[Path]) -> list[Samples]:
    """Sample folders `.../{model}-{steps}/{suite}/{part}`, joined by run, in the order of tables; controls last."""
    found: dict[Run, list[Path]] = defaultdict(list)
    for folder in folders:
        model, dash, steps = ("", "", *folder.absolute().parts)[-3].rpartition("-")
        if not dash or not steps.isdecimal():
            raise UserError(f"{folder} is no folder of samples; expected .../MODEL-STEPS/SUITE/PART")
        found[run_of(model, int(steps))].append(folder)
    runs = sorted(found, key=lambda run: run.order)
    return [Samples(run, {item.index: item for item in list_samples(sorted(found[run]))}) for run in runs]


def chosen_prompts(runs: Sequence[Samples], count: int) -> list[int]:
    """Prompts that all runs have, the first of each task in turn: chosen before anyone saw a sample."""
    if not runs:
        raise UserError("there are no samples to show")
    by_task: dict[str, list[int]] = defaultdict(list)
    for index in sorted(set.intersection(*(set(run.prompts) for run in runs))):
        by_task[_task(runs[0].prompts[index].metadata)].append(index)
    turns = zip_longest(*by_task.values())
    taken = [index for turn in turns for index in turn if index is not None][:count]
    if not taken:
        raise UserError("the runs have no prompt in common, so their samples cannot be shown side by side")
    return [index for indices in by_task.values() for index in indices if index in taken]


def _task(metadata: Mapping[str, Any]) -> str:
    """GenEval's task of a prompt, or the first of VBench's dimensions that ask something of it."""
    return str(metadata.get("tag") or next(iter(metadata.get("dimension") or ()), ""))


def _tile(picture: np.ndarray, room: int, most: int) -> tuple[int, int]:
    """Width and height at which a picture (H, W, 3) is shown: up to `most` times enlarged, or scaled down to `room`."""
    height, width = picture.shape[:2]
    factor = min(most, room // width)
    return (width * factor, height * factor) if factor else (room, max(1, round(height * room / width)))


def _fitted(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture in a tile of this width and height: whole pixels as squares, or scaled down smoothly."""
    (width, height), (rows, columns) = size, picture.shape[:2]
    if height % rows == 0 and width % columns == 0:
        return picture.repeat(height // rows, axis=0).repeat(width // columns, axis=1)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def _strip(frames: np.ndarray) -> np.ndarray:
    """At most `STRIP` frames of a clip, evenly spaced, the first and the last among them."""
    chosen = np.linspace(0, len(frames) - 1, min(STRIP, len(frames)))
    return frames[chosen.round().astype(int)]


def _lines(text: str, width: int, most: int) -> str:
    """A caption in lines of so many characters; what goes beyond is cut off at a word."""
    return fill(text, width, max_lines=most, placeholder=" …")


class _Canvas:
    """A figure of a given size in pixels on which pictures keep every pixel and text is placed from the top left."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        self.pixels = np.full((height, width, 3), 255, dtype=np.uint8)

    def picture(self, x: int, y: int, picture: np.ndarray) -> None:
        self.pixels[y : y + picture.shape[0], x : x + picture.shape[1]] = picture

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **style)

    def rule(self, x0: float, x1: float, y: float) -> None:
        height = 1 - y / self.height
        self.figure.add_artist(Line2D([x0 / self.width, x1 / self.width], [height, height], color=FAINT, linewidth=0.6))

    def png(self) -> bytes:
        self.figure.figimage(self.pixels, origin="upper", zorder=-1)
        return png(self.figure)


def _heading(run: Run) -> str:
    return f"{run.steps} step{'s' * (run.steps != 1)}" if run.method not in CONTROLS else ""


def _named(runs: Sequence[Samples]) -> list[str]:
    """Names of runs, with the seed where a method has several."""
    seeds = {(s.run.method, s.run.seed) for s in runs}
    several = {method for method, _ in seeds if sum(m == method for m, _ in seeds) > 1}
    return [s.run.label + (f" (seed {s.run.seed})" if s.run.method in several else "") for s in runs]


def figure_samples(samples: Sequence[Path], *, prompts: int = 8) -> bytes:
    """Same seeds for all: a row a prompt; columns teacher, then the students by number of steps.

    `samples` are folders in GenEval's layout as the sample stage writes them, `.../{model}-{steps}/{suite}/{part}`, in
    any order and number of parts; model and steps are read from the path.
    """
    runs = sample_runs(samples)
    rows = chosen_prompts(runs, prompts)
    names = _named(runs)
    caption, header, gap, apart = 400, 104, 8, 28
    size = _tile(runs[0].frames(rows[0])[0], max(LEAST, 1720 // len(runs) - gap), most=5)
    tile, high = size
    lefts, x = [], caption
    for index in range(len(runs)):
        x += 0 if index == 0 else gap if names[index] == names[index - 1] else apart
        lefts.append(x)
        x += tile
    with style():
        canvas = _Canvas(x + 16, header + len(rows) * (high + gap) + 8)
        for name in dict.fromkeys(names):
            own = [left for left, other in zip(lefts, names, strict=True) if other == name]
            color = color_of(runs[names.index(name)].run.method)
            middle = (own[0] + own[-1] + tile) / 2
            canvas.text(middle, 40, name, ha="center", va="baseline", size=9.5, weight="bold", color=color)
            canvas.rule(own[0], own[-1] + tile, 54)
        for left, run in zip(lefts, runs, strict=True):
            canvas.text(left + tile / 2, 88, _heading(run.run), ha="center", va="baseline", size=7.5)
        for row, prompt in enumerate(rows):
            y = header + row * (high + gap)
            text = _lines(runs[0].caption(prompt), 24, max(2, min(5, high // 28)))
            canvas.text(
                caption - 24,
                y + high / 2,
                text,
                ha="right",
                va="center",
                size=7.5,
                linespacing=1.25,
            )
            for left, run in zip(lefts, runs, strict=True):
                canvas.picture(left, y, _fitted(run.frames(prompt)[0], size))
        return canvas.png()


def figure_clips(samples: Sequence[Path], *, prompts: int = 4) -> bytes:
    """Clips as film strips: a block a prompt, a row a model, frames side by side. Input as `figure_samples`."""
    runs = sample_runs(samples)
    blocks = chosen_prompts(runs, prompts)
    names = _named(runs)
    first = _strip(runs[0].frames(blocks[0]))
    caption, gap, apart, line = 330, 6, 30, 30
    size = _tile(first[0], 1700 // len(first) - gap, most=4)
    tile, high = size
    width = caption + len(first) * (tile + gap) + 16
    asked = [_lines(runs[0].caption(prompt), (width - caption) // 14, 2) for prompt in blocks]
    header = 60 + line * max(text.count("\n") for text in asked)
    height = header + len(runs) * (high + gap)
    with style():
        canvas = _Canvas(width, len(blocks) * (height + apart))
        for block, (prompt, text) in enumerate(zip(blocks, asked, strict=True)):
            top = block * (height + apart)
            canvas.text(caption, top + header - 16, text, va="bottom", size=8.5, style="italic")
            for row, run in enumerate(runs):
                y = top + header + row * (high + gap)
                color, middle = color_of(run.run.method), y + high / 2
                canvas.text(
                    caption - 24, middle - 5, names[row], ha="right", va="bottom", size=8.5, weight="bold", color=color
                )
                canvas.text(caption - 24, middle + 7, _heading(run.run), ha="right", va="top", size=7.5)
                for index, frame in enumerate(_strip(run.frames(prompt))[: len(first)]):
                    canvas.picture(caption + index * (tile + gap), y, _fitted(frame, size))
        return canvas.png()
