"""What a detector must find before it is trusted: photographs whose content is beyond doubt, judged by GenEval's rules.

Four photographs of scikit-image's wheel (a person, a cat, a cup, a motorcycle), alone, in pairs side by side and on top
of each other, and twice in one picture. A detector with broken operators, another order of classes, swapped axes or
far too low scores fails.

Not checked: the other 76 classes, small and many objects, and nine of the ten colours: the motorcycle, which is red, is
the only one whose colour leaves no doubt, and it counts only where colours are given.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rcm.artefact import UserError, atomic_folder
from rcm.data.prompts import Metadata, colors, counting, position, single_object
from rcm.evaluation.clip import Clip, Colors
from rcm.evaluation.geneval import Detection, Detector, judge

PHOTOGRAPHS = {
    "person": "astronaut.png",
    "cat": "chelsea.png",
    "cup": "coffee.png",
    "motorcycle": "motorcycle_left.png",
}
WIDTH, HEIGHT = 480, 320  # of each photograph in a picture
_PAIRS = (("cat", "person"), ("cup", "motorcycle"))


@dataclass(frozen=True)
class Fact:
    """What a picture shows: photographs beside each other, or above each other if `stacked`."""

    metadata: Metadata
    photographs: tuple[str, ...]
    stacked: bool = False

    def picture(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3); a photograph that recurs is mirrored."""
        panels = [
            photograph(name)[:, ::-1] if name in self.photographs[:place] else photograph(name)
            for place, name in enumerate(self.photographs)
        ]
        return np.concatenate(panels, axis=0 if self.stacked else 1)


def facts(*, colored: bool) -> list[Fact]:
    """All facts; those on colours only if `colored`."""
    names = list(PHOTOGRAPHS)
    made = [
        Fact({**single_object(name), "exclude": [{"class": absent, "count": 1}]}, (name,))
        for name, absent in zip(names, [*names[1:], names[0]], strict=True)
    ]
    for first, second in _PAIRS:
        for stacked, relation, opposite in ((False, "left of", "right of"), (True, "above", "below")):
            made.append(Fact(position(first, relation, second), (first, second), stacked))
            made.append(Fact(position(first, opposite, second), (second, first), stacked))
    made += [
        Fact(counting("cat", 2), ("cat", "cat")),
        Fact(counting("cup", 2), ("cup", "cup"), stacked=True),
    ]
    if colored:
        made.append(Fact(colors("motorcycle", "red"), ("motorcycle",)))
    return made


@cache
def photograph(name: str) -> np.ndarray:
    """The photograph of a class, uint8 (HEIGHT, WIDTH, 3), cut off at the bottom where it is too high."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise UserError(
            "the check with known photographs needs the package scikit-image: install it with "
            "`pip install -e .[scoring]`"
        )
    path = Path(found.origin).parent / "data" / PHOTOGRAPHS[name]
    try:
        with Image.open(path) as image:
            wide = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"cannot read {path}, a photograph of scikit-image ({error}); install scikit-image again"
        ) from None
    visible = (0, 0, wide.width, min(wide.height, wide.width * HEIGHT / WIDTH))
    return np.asarray(wide.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=visible))


def check(detector: Detector, clip: Clip | None = None) -> dict[str, Any]:
    """Share of the facts that hold by what the detector finds, and which do not; with CLIP, those on colours too."""
    palette = Colors(clip) if clip else None
    made = facts(colored=palette is not None)
    failed = []
    for fact in made:
        picture = fact.picture()

        def color_of(found: Detection, picture: np.ndarray = picture) -> str:
            assert palette is not None
            return palette.of(picture, [found], found.cls)[0]

        if not judge(fact.metadata, detector.detect(picture), color_of)[0]:
            failed.append(fact.metadata["prompt"])
    return {
        "score": 1 - len(failed) / len(made),
        "facts": len(made),
        "failed": failed,
        "images": list(PHOTOGRAPHS.values()),
    }


def trusted(found: Mapping[str, Any], at_least: float) -> None:
    """Raise UserError if less than the share `at_least` of the facts hold, or `found` is not by `check`."""
    kinds = {"score": int | float, "facts": int, "failed": list}
    if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise UserError(
            "the measurement says that known photographs were looked at, but not how that went (score, facts, failed); "
            "measure again"
        )
    if not found["score"] >= at_least:
        raise UserError(
            f"the detector fails {len(found['failed'])} of {found['facts']} facts on known photographs, such as "
            f"{next(iter(found['failed']), '')!r}: {found['score']:.2f} hold, at least {at_least:g} are needed "
            "(evaluation.known_at_least); check its weights, and the device with another one"
        )


def write_folder(folder: Path | str) -> None:
    """Write the facts, those on colours among them, in GenEval's layout, for an evaluator with its own detector."""
    with atomic_folder(folder) as staging:
        for number, fact in enumerate(facts(colored=True)):
            samples = staging / f"{number:05d}" / "samples"
            samples.mkdir(parents=True)
            (samples.parent / "metadata.jsonl").write_text(json.dumps(fact.metadata) + "\n", encoding="utf-8")
            Image.fromarray(fact.picture()).save(samples / "0000.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m rcm.evaluation.known --out FOLDER`."""
    parser = argparse.ArgumentParser(description="Write known photographs in GenEval's layout.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    try:
        write_folder(parser.parse_args(arguments).out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
