"""Sizes in pixels: what a resolution means for a family of models, and what patch and codec can take.

Wan's are those of its own table and of rCM's; Cosmos-Predict2 makes images of its table "1024" at what is called 720p
here, which holds the 1360 x 768 of the paper's table 1.
"""

import math
from collections.abc import Mapping
from typing import Any

from rcm.artefact import UserError

Size = tuple[int, int]  # width, height

ASPECTS = ("16:9", "9:16", "1:1", "4:3", "3:4")
RESOLUTIONS = ("480p", "720p")
LANDSCAPE: dict[str, dict[str, dict[str, Size]]] = {  # upright ones are the same, turned
    "wan": {
        "480p": {"16:9": (832, 480), "1:1": (640, 640), "4:3": (640, 480)},
        "720p": {"16:9": (1280, 720), "1:1": (960, 960), "4:3": (960, 720)},
    },
    "cosmos": {
        "480p": {"16:9": (768, 432), "1:1": (480, 480), "4:3": (640, 480)},
        "720p": {"16:9": (1360, 768), "1:1": (1024, 1024), "4:3": (1168, 880)},
    },
}


def named(kind: str, resolution: str, aspect: str) -> Size:
    """The size of a resolution and aspect ratio for networks of a kind (wan, cosmos)."""
    table = LANDSCAPE[kind][resolution]
    return table[aspect] if aspect in table else table[":".join(reversed(aspect.split(":")))][::-1]


def multiples(settings: Mapping[str, Any]) -> Size:
    """What width and height must be multiples of: a cell of the codec times a patch of the network."""
    cell, (_, down, across) = settings["codec"]["cell"], settings["network"]["patch"]
    return cell * across, cell * down


def check(settings: Mapping[str, Any], size: Size, frames: int) -> None:
    """Raise UserError where codec or network cannot take clips of such a size and length."""
    for side, value, step in zip(("width", "height"), size, multiples(settings), strict=True):
        if value <= 0 or value % step:
            below = max(value // step, 1) * step
            raise UserError(
                f"the {side} is {value} pixels, but patch and codec take multiples of {step}; "
                f"the next ones are {below} and {below + step}"
            )
    stride, (patch, *_) = settings["codec"]["stride"], settings["network"]["patch"]
    step = stride * patch
    fits = frames == 1 if settings["media"] == "images" else frames > 1 and (frames - 1) % step == 0
    if not fits:
        wanted = "images have 1" if settings["media"] == "images" else f"clips have 1 + a multiple of {step}"
        raise UserError(f"{frames} frames asked for, but {wanted}")
    cell = settings["codec"]["cell"]
    tokens = [
        side // step
        for side, step in zip(
            (1 + (frames - 1) // stride, size[1] // cell, size[0] // cell), settings["network"]["patch"], strict=True
        )
    ]
    positions = settings["network"].get("positions")
    if positions and any(have < need for have, need in zip(positions, tokens, strict=True)):
        raise UserError(
            f"{frames} frames of {size[0]} x {size[1]} pixels are {tokens} tokens along t, h, w, but this network has "
            f"learned positions for {list(positions)} and no more"
        )


def of_image(image: Size, area: int, steps: Size) -> Size:
    """The size nearest below `area` pixels that keeps an image's aspect ratio, in multiples of `steps`, as Wan has it.

    Raises UserError where the image is so narrow that a side would vanish.
    """
    ratio = image[1] / image[0]
    width, height = (
        int(math.sqrt(exact) + 1e-6) // step * step
        for exact, step in zip((area / ratio, area * ratio), steps, strict=True)
    )
    if not (width and height):
        raise UserError(
            f"the image is {image[0]} x {image[1]} pixels, too narrow for a clip of its aspect ratio; "
            f"say --aspect ({', '.join(ASPECTS)}) to cut it"
        )
    return width, height
