"""A contact sheet: samples of shards as small pictures, each with its prompt and seed.

A card shows the frame of an image, and of a clip the first and the middle one. A sheet is a PNG, where long prompts are
shortened and letters that its font lacks are boxes, or an HTML page. One sample is decoded at a time.
"""

import base64
import html
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from rcm.artefact import UserError, atomic_file
from rcm.codecs import to_pixels
from rcm.data.samples import Entry, Sample, entries, naming
from rcm.data.shards import sample_at

Place = tuple[Path, Entry]
Card = tuple[Sample, list[Image.Image]]  # a sample and its frames, enlarged or made smaller

_SIDE = 192, 240  # pixels of a frame's shorter side, in which small pictures are enlarged and large ones made smaller
_WIDTH = 1764  # pixels of a sheet, if no card is wider
_GAP, _BETWEEN = 28, 4  # pixels between cards, and between frames of one
_LINES, _LEADING = 4, 18  # of a prompt at most, and pixels from one to the next
_PAPER, _INK, _SOFT = "#f6f5f1", "#1d2126", "#6a737d"


def chosen_places(paths: Sequence[Path], count: int) -> tuple[list[Place], int]:
    """Where `count` samples of some shards stand, evenly spread by index, and of how many; nothing is verified."""
    places: list[Place] = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"shard {path} does not exist; make it with `rcm synthesize`")
        with naming(f"shard {path}"), tarfile.open(path, "r:") as tar:
            places += [(path, entry) for entry in entries(tar)]
    if not places or not count:
        raise UserError("there are no samples to show; give a shard that has some, and a --count of 1 or more")
    places.sort(key=lambda place: place[1].index)
    chosen = np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int))
    return [places[number] for number in chosen], len(places)


def cards_of(places: Iterable[Place], decoder: Any, device: torch.device) -> Iterator[Card]:
    """The samples, decoded."""
    for path, entry in places:
        sample = sample_at(path, entry)
        channels = sample.latents_CTHW.shape[0]
        if channels != decoder.channels:
            raise UserError(f"{path} has latents of {channels} channels, but the codec has {decoder.channels}")
        yield sample, [_sized(frame) for frame in _frames(sample, decoder, device)]


@torch.no_grad()
def _frames(sample: Sample, decoder: Any, device: torch.device) -> list[np.ndarray]:
    """The first and the middle frame, uint8 (H, W, 3); what comes behind is not decoded."""
    middle = (sample.latents_CTHW.shape[1] - 1) * decoder.stride // 2
    found: list[np.ndarray] = []
    first = 0  # frame of the piece
    for piece in decoder.frames(sample.latents_CTHW[None].float().to(device)):
        for wanted in sorted({0, middle}):
            if first <= wanted < first + piece.shape[2]:
                found.append(to_pixels(piece[:, :, wanted - first, None])[0, 0])
        first += piece.shape[2]
        if first > middle:
            break
    return found


def _sized(frame_HWC: np.ndarray) -> Image.Image:
    picture, (smallest, largest) = Image.fromarray(frame_HWC), _SIDE
    short = min(picture.size)
    if short < smallest:  # in whole factors, with pixels to be seen
        times = max(1, smallest // short)
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    scale = min(1.0, largest / short)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)


def write_sheet(out: Path, cards: Iterable[Card], count: int, title: str) -> None:
    """Write a sheet of so many cards, in the format that the suffix names."""
    with atomic_file(out) as path:
        (_write_page if out.suffix.lower() == ".html" else _write_picture)(path, cards, count, title)


# --- As a picture --------------------------------------------------------------------------------------------------


def _write_picture(path: Path, cards: Iterable[Card], count: int, title: str) -> None:
    cards = iter(cards)
    first = next(cards)
    width = sum(frame.width for frame in first[1]) + _BETWEEN * (len(first[1]) - 1)  # of all cards
    columns = min(count, max(1, (_WIDTH - _GAP) // (width + _GAP)))
    cards, strips = chain([first], cards), []
    while row := list(islice(cards, columns)):
        strips.append(_strip(row, width, columns))
    sheet = Image.new("RGB", (strips[0].width, 2 * _GAP + sum(strip.height for strip in strips)), _PAPER)
    ImageDraw.Draw(sheet).text((_GAP, _GAP / 2), title, _SOFT, _font(13))
    y = 2 * _GAP
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    sheet.save(path, "PNG")


def _strip(row: Sequence[Card], width: int, columns: int) -> Image.Image:
    """One row of cards, as high as the highest one."""
    prompts = [_wrapped(sample.prompt, _font(13), width) for sample, _ in row]
    height = max(frame.height for _, frames in row for frame in frames)
    below = _GAP // 4 + (1 + max(map(len, prompts))) * _LEADING + _GAP
    strip = Image.new("RGB", (_GAP + columns * (width + _GAP), height + below), _PAPER)
    draw = ImageDraw.Draw(strip)
    for number, ((sample, frames), lines) in enumerate(zip(row, prompts, strict=True)):
        left = _GAP + number * (width + _GAP)
        for k, frame in enumerate(frames):
            strip.paste(frame, (left + k * (frame.width + _BETWEEN), 0))
        draw.text((left, height + _GAP // 4), f"{sample.index}  ·  seed {sample.seed}", _SOFT, _font(12))
        for k, line in enumerate(lines, start=1):
            draw.text((left, height + _GAP // 4 + k * _LEADING), line, _INK, _font(13))
    return strip


@cache
def _font(size: int) -> Any:
    """One that matplotlib brings along."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """The first lines of a text; what is left out shows as an ellipsis."""
    lines: list[str] = [""]
    for word in text[: _LINES * width].split():  # no letter is narrower than a pixel
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < _LINES:
            lines.append(word)
        else:
            lines[-1] += " …"
            break
    return [_shortened(line, font, width) for line in lines]


def _shortened(line: str, font: Any, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" …")
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"


# --- As a page -----------------------------------------------------------------------------------------------------

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --paper: #f6f5f1; --card: #fff; --ink: #1d2126; --soft: #59626c; --line: #dfe2e6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14171a; --card: #1b1f23; --ink: #e4e7ea; --soft: #9fa8b2; --line: #31373e; }}
}}
body {{ margin: 0; padding: 28px; background: var(--paper); color: var(--ink); font: 14px/1.5 system-ui, sans-serif; }}
header {{ color: var(--soft); margin-bottom: 20px; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({width}px, 1fr)); gap: 22px; }}
figure {{ margin: 0; align-self: start; overflow: hidden; }}
figure {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; }}
figure div {{ display: flex; gap: 2px; }}
img {{ flex: 1; min-width: 0; display: block; }}
figcaption {{ padding: 8px 12px 12px; overflow-wrap: anywhere; }}
small {{ display: block; color: var(--soft); font-variant-numeric: tabular-nums; }}
</style>
</head>
<body>
<header>{title}</header>
<main>
"""


def _write_page(path: Path, cards: Iterable[Card], count: int, title: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, (sample, frames) in enumerate(cards):
            if number == 0:
                width = min(560, len(frames) * frames[0].width)
                file.write(_HEAD.format(title=html.escape(title), width=width))
            pictures = "".join(f'<img src="{_data(frame)}" alt="" loading="lazy">' for frame in frames)
            about = f"<small>{sample.index} · seed {sample.seed}</small>{html.escape(sample.prompt)}"
            file.write(f"<figure><div>{pictures}</div><figcaption>{about}</figcaption></figure>\n")
        file.write("</main>\n</body>\n</html>\n")


def _data(frame: Image.Image) -> str:
    buffer = io.BytesIO()
    frame.save(buffer, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
