"""Samples on disk in GenEval's layout: `00012/metadata.jsonl` and `00012/samples/0003.png`, clips also as `0003.mp4`.

A folder may hold one part of a suite; beside the prompts' folders `sampling.json` says how its samples were made. What
else lies there, such as GenEval's `grid.png`, is ignored.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from rcm.artefact import UserError, json_value, read_json, reason
from rcm.data.prompts import Metadata, parse_prompts

SAMPLING = "sampling.json"
_FOLDER = re.compile(r"\d{1,9}", re.ASCII)
_SAMPLE = re.compile(r"\d{1,9}\.(png|mp4)", re.ASCII)
_NAME = re.compile(r"(\d{1,9})/samples/(\d{1,9})\.(png|mp4)", re.ASCII)


@dataclass(frozen=True)
class PromptSamples:
    """All samples of the prompt with number `index`."""

    index: int
    metadata: Metadata
    paths: tuple[Path, ...]

    def name(self, path: Path) -> str:
        """The sample's name, the same wherever its folder lies."""
        return f"{self.index:05d}/samples/{path.name}"


@dataclass(frozen=True)
class Expected:
    """The prompts of a suite and how many samples each shall have."""

    prompts: Sequence[Metadata]
    samples: int | Sequence[int]

    def of(self, prompt: int) -> int:
        """The number of samples of one prompt."""
        return self.samples if isinstance(self.samples, int) else self.samples[prompt]


def list_samples(folders: Sequence[str | Path]) -> list[PromptSamples]:
    """Samples of all prompts in the folders (parts of one suite), by number of prompt.

    Raises UserError where a folder or metadata is missing or broken, or a prompt or sample is there twice.
    """
    found: dict[int, PromptSamples] = {}
    for root in map(Path, folders):
        if not root.is_dir():
            raise UserError(f"no folder of samples {str(root)!r}")
        for folder in sorted(path for path in root.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()):
            index = int(folder.name)
            if index in found:
                raise UserError(
                    f"prompt {folder.name} is in {root} and in {found[index].paths[0].parents[2]}; parts must differ"
                )
            files = [path for path in (folder / "samples").glob("*") if _SAMPLE.fullmatch(path.name)]
            paths = tuple(sorted(files, key=lambda path: (int(path.stem), path.name)))
            if not paths:
                raise UserError(f"no samples such as 0000.png in {folder / 'samples'}")
            for a, b in pairwise(paths):
                if int(a.stem) == int(b.stem):
                    raise UserError(f"{a} and {b} are the same sample twice; remove one of them")
            found[index] = PromptSamples(index, _metadata(folder / "metadata.jsonl"), paths)
    if not found:
        raise UserError(f"no samples in {', '.join(map(str, folders))}; expected folders such as 00000/samples")
    return [found[index] for index in sorted(found)]


def _metadata(path: Path) -> Metadata:
    """The one caption of a file: GenEval's where it has a tag, else any object with a prompt."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) != 1:
        raise UserError(f"{path} holds {len(lines)} captions; expected one")
    try:
        item = json_value(lines[0])
    except ValueError:
        item = None
    if isinstance(item, dict) and "tag" not in item and isinstance(item.get("prompt"), str) and item["prompt"]:
        return item
    return parse_prompts(lines[0], str(path))[0]


def read_sampling(folders: Sequence[str | Path]) -> dict[str, Any] | None:
    """How the samples in the folders were made, without the number of the part; None if no folder says so.

    Raises UserError where the parts were not made alike.
    """
    said: list[dict[str, Any] | None] = []
    for root in map(Path, folders):
        path = root / SAMPLING
        value = read_json(path) if path.exists() else None
        if path.exists() and not isinstance(value, dict):
            raise UserError(f"{path} holds no JSON object; sample this part again")
        said.append(None if value is None else {key: value[key] for key in value if key != "part"})
        if said[-1] != said[0]:
            keys = [
                k for k in {**(said[0] or {}), **(said[-1] or {})} if (said[0] or {}).get(k) != (said[-1] or {}).get(k)
            ]
            raise UserError(
                f"{path} and {Path(folders[0]) / SAMPLING} differ in {', '.join(keys)}: "
                "the parts were not sampled alike; sample them again"
            )
    return said[0] if said else None


def numbers_of(name: str) -> tuple[int, int]:
    """Prompt and sample of a name such as `00012/samples/0003.png`, whose zeros are free. UserError for another."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{name} is no name of a sample, such as 00012/samples/0003.png")
    return int(match[1]), int(match[2])


def missing(expected: Expected | None, found: Iterable[str], allow_missing: bool = False) -> list[str]:
    """Names of the samples that should be there and are not, by prompt and number.

    Args:
        expected: None asks for as many samples of every prompt, up to the last one found, as the fullest of them has.
        found: names such as `00012/samples/0003.png`; where numbers begin and how many zeros they have is free.
        allow_missing: return the names; otherwise missing samples are a UserError with their number.

    Samples beyond the expected number are a UserError: they are of another suite, or of a run before.
    """
    there: dict[int, set[int]] = {}
    suffix = "png"
    for name in found:
        prompt, number = numbers_of(name)
        if expected and prompt >= len(expected.prompts):
            raise UserError(f"{name} is of none of the {len(expected.prompts)} prompts; check which prompts are meant")
        there.setdefault(prompt, set()).add(number)
        suffix = name[-3:]
    if expected:
        counts = {prompt: expected.of(prompt) for prompt in range(len(expected.prompts))}
    else:
        counts = dict.fromkeys(range(max(there, default=-1) + 1), max(map(len, there.values()), default=0))
    lacking = []
    for prompt, count in counts.items():
        own = there.get(prompt, set())
        if len(own) > count:
            raise UserError(
                f"{prompt:05d}/samples/{sorted(own)[count]:04d}.{suffix} is one too many: of this prompt the suite has "
                f"{count} samples; check which suite is meant, and remove what an older run left"
            )
        absent = [number for number in range(count) if number not in own][: max(0, count - len(own))]
        lacking += [f"{prompt:05d}/samples/{number:04d}.{suffix}" for number in absent]
    if lacking and not allow_missing:
        raise UserError(
            f"{len(lacking)} of {sum(counts.values())} samples are missing, the first {lacking[0]}; "
            "sample them, or allow missing samples (evaluation.allow_missing=true)"
        )
    return lacking


def check_prompt(expected: Expected, prompt: int, metadata: Mapping[str, Any], where: str | Path) -> None:
    """Raise UserError unless a sample's metadata are those of its prompt."""
    if prompt >= len(expected.prompts):
        raise UserError(f"{where} is of none of the {len(expected.prompts)} prompts; check which prompts are meant")
    if metadata != expected.prompts[prompt]:
        raise UserError(
            f"{where} was made from {metadata.get('prompt')!r}, but prompt {prompt} of the file is "
            f"{expected.prompts[prompt].get('prompt')!r} or has other metadata; give the prompts that were sampled"
        )


def read_frames(path: str | Path, frames: int | None = None) -> np.ndarray:
    """Frames of a PNG, animated PNG or MP4, uint8 (T, H, W, 3); `frames` is the number that there must be.

    Raises UserError that names the file if it is damaged, cut off or of another length.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise UserError(f"the sample {path} is empty (0 bytes); sample it again")
        read = _mp4(path) if path.suffix.lower() == ".mp4" else _png(path)
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the sample {path}: {reason(error)}") from None
    if frames is not None and len(read) != frames:
        raise UserError(f"{path} has {len(read)} frame{'s' * (len(read) != 1)}, expected {frames}")
    return read


def _png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels are {image.mode}; expected 8 bits a channel")
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def _mp4(path: Path) -> np.ndarray:
    try:
        import imageio_ffmpeg
    except ImportError:
        raise UserError(f"reading {path} needs ffmpeg: `pip install imageio-ffmpeg`") from None
    # an absolute path is never taken for a protocol or an option; at the first damage ffmpeg stops
    reader = imageio_ffmpeg.read_frames(
        str(path.resolve()),
        input_params=["-xerror"],
        output_params=["-fps_mode", "passthrough"],
    )
    try:
        about = next(reader)
        pictures = list(reader)
    except OSError:
        raise ValueError("not a film, or cut off") from None
    # the header states the duration to a hundredth of a second, so the number of frames to one or less
    promised = math.ceil(about["fps"] * (about["duration"] - 0.005))
    if not pictures or len(pictures) < promised - 1:
        raise ValueError(f"only {len(pictures)} of about {promised} frames can be decoded")
    width, height = about["size"]
    return np.frombuffer(b"".join(pictures), np.uint8).reshape(len(pictures), height, width, 3)
