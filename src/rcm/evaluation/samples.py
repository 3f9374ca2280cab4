"""Samples on disk in GenEval's layout: `00012/metadata.jsonl` and `00012/samples/0003.png`; clips are animated PNGs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from rcm.artefact import UserError
from rcm.data.prompts import Metadata, parse_prompts

_IMAGE = re.compile(r"\d+\.png")


@dataclass(frozen=True)
class PromptSamples:
    """All samples of the prompt with number `index`."""

    index: int
    metadata: Metadata
    paths: tuple[Path, ...]

    def name(self, path: Path) -> str:
        """The sample's name, the same wherever its folder lies."""
        return f"{self.index:05d}/samples/{path.name}"


def list_samples(folders: Sequence[str | Path]) -> list[PromptSamples]:
    """Samples of all prompts in the folders (parts of one suite), by number of prompt.

    Raises UserError where a folder or metadata is missing or broken, or two folders hold the same prompt.
    """
    found: dict[int, PromptSamples] = {}
    for root in map(Path, folders):
        if not root.is_dir():
            raise UserError(f"no folder of samples {str(root)!r}")
        for folder in sorted(path for path in root.iterdir() if path.name.isdecimal() and path.is_dir()):
            index = int(folder.name)
            if index in found:
                raise UserError(
                    f"prompt {folder.name} is in {root} and in {found[index].paths[0].parents[2]}; parts must differ"
                )
            files = sorted((folder / "samples").glob("*.png"), key=lambda path: path.name)
            paths = tuple(path for path in files if _IMAGE.fullmatch(path.name))
            if not paths:
                raise UserError(f"no samples such as 0000.png in {folder / 'samples'}")
            found[index] = PromptSamples(index, _metadata(folder / "metadata.jsonl"), paths)
    if not found:
        raise UserError(f"no samples in {', '.join(map(str, folders))}; expected folders such as 00000/samples")
    return [found[index] for index in sorted(found)]


def _metadata(path: Path) -> Metadata:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    prompts = parse_prompts(text, str(path))
    if len(prompts) != 1:
        raise UserError(f"{path} holds {len(prompts)} captions; expected one")
    return prompts[0]


def read_frames(path: str | Path) -> np.ndarray:
    """Frames of a PNG or animated PNG, uint8 (T, H, W, 3)."""
    try:
        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read the sample {path}: {error}") from None
