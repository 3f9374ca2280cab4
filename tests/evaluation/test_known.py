"""The check before a detector is trusted: one that recognises the photographs passes, others fail what they should."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rcm.artefact import UserError
from rcm.data.prompts import COCO
from rcm.evaluation import known
from rcm.evaluation.geneval import Box, Detection
from rcm.evaluation.known import HEIGHT, PHOTOGRAPHS, WIDTH, check, facts, photograph, trusted
from rcm.evaluation.samples import list_samples, read_frames

BOXES: dict[str, Box] = {  # read off the photographs of 480 x 320 pixels
    "person": (35, 13, 340, 320),
    "cat": (30, 0, 405, 320),
    "cup": (138, 14, 340, 240),
    "motorcycle": (58, 48, 442, 294),
}


class Recogniser:
    """Finds the photographs in a picture by their pixels, and says what is known of them."""

    classes = COCO.classes

    def __init__(self, change: Callable[[Detection, int, int], Detection | None] = lambda found, height, width: found):
        self.change = change

    def detect(self, image: np.ndarray) -> list[Detection]:
        found = []
        for top in range(0, image.shape[0], HEIGHT):
            for left in range(0, image.shape[1], WIDTH):
                panel = image[top : top + HEIGHT, left : left + WIDTH]
                for name, (x0, y0, x1, y1) in BOXES.items():
                    if np.array_equal(panel[:, ::-1], photograph(name)):
                        x0, x1 = WIDTH - x1, WIDTH - x0
                    elif not np.array_equal(panel, photograph(name)):
                        continue
                    found.append(Detection(name, (x0 + left, y0 + top, x1 + left, y1 + top), 0.95))
        height, width = image.shape[:2]
        return [changed for one in found if (changed := self.change(one, height, width))]


def test_the_photographs_lie_in_scikit_images_wheel() -> None:
    shipped = {str(path) for path in files("scikit-image") or []}
    assert {f"skimage/data/{name}" for name in PHOTOGRAPHS.values()} <= shipped


def test_a_photograph_keeps_its_proportions() -> None:
    assert {photograph(name).shape for name in PHOTOGRAPHS} == {(320, 480, 3)}
    face = photograph("person")[50:170, 170:260].reshape(-1, 3).mean(0)  # in the upper two thirds of 512 x 512 pixels
    assert face[0] > face[1] + 20 > face[2] + 20  # skin
    tank = photograph("motorcycle")[125:150, 225:250].reshape(-1, 3).mean(0)
    assert tank[0] > 2 * tank[1:].max()  # red


def test_a_true_detector_passes() -> None:
    found = check(Recogniser())
    assert found == {"score": 1.0, "facts": 14, "failed": [], "images": list(PHOTOGRAPHS.values())}
    trusted(found, 1.0)


def test_a_blind_detector_fails_all() -> None:
    found = check(Recogniser(lambda one, height, width: None))
    assert found["score"] == 0
    assert len(found["failed"]) == 14
    with pytest.raises(
        UserError,
        match=r"fails 14 of 14 facts on known photographs, such as 'a photo of a person': 0.00 hold, at least",
    ):
        trusted(found, 0.8)


@pytest.mark.parametrize("found", [{}, {"score": 1.0}, {"score": "1", "facts": 15, "failed": []}])
def test_what_no_check_has_found_is_refused(found: dict) -> None:
    with pytest.raises(UserError, match="known photographs were looked at, but not how that went"):
        trusted(found, 0.8)


def mirrored(one: Detection, height: int, width: int) -> Detection:
    x0, y0, x1, y1 = one.box
    return replace(one, box=(width - x1, y0, width - x0, y1))


def upside_down(one: Detection, height: int, width: int) -> Detection:
    x0, y0, x1, y1 = one.box
    return replace(one, box=(x0, height - y1, x1, height - y0))


def transposed(one: Detection, height: int, width: int) -> Detection:
    x0, y0, x1, y1 = one.box
    return replace(one, box=(y0, x0, y1, x1))


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (mirrored, ("left", "right")),
        (upside_down, ("above", "below")),
        (transposed, ("left", "right", "above", "below")),
    ],
)
def test_wrong_places_fail_the_relations_that_they_break(change, wrong: tuple[str, ...]) -> None:
    found = check(Recogniser(change))
    expected = {
        fact.metadata["prompt"] for fact in facts(colored=False) if set(fact.metadata["prompt"].split()) & set(wrong)
    }
    assert set(found["failed"]) == expected
    assert len(expected) == 2 * len(wrong)
    with pytest.raises(UserError):
        trusted(found, 0.8)


def test_low_scores_fail_the_counts() -> None:
    found = check(Recogniser(lambda one, height, width: replace(one, score=0.85)))
    assert found["failed"] == ["a photo of two cats", "a photo of two cups"]
    assert found["score"] == pytest.approx(12 / 14)


def test_classes_out_of_order_fail_all() -> None:
    def next_class(one: Detection, height: int, width: int) -> Detection:
        return replace(one, cls=COCO.classes[COCO.classes.index(one.cls) + 1])

    assert check(Recogniser(next_class))["score"] == 0


def test_a_detector_that_sees_everything_fails() -> None:
    class Everything(Recogniser):
        def detect(self, image: np.ndarray) -> list[Detection]:
            return [Detection(name, (0, 0, 9, 9), 0.99) for name in self.classes for _ in range(5)]

    assert check(Everything())["score"] == 0


class Reds:
    """Stands for CLIP: two directions, red and anything else; `sign` -1 takes one for the other."""

    def __init__(self, sign: float):
        self.sign = sign

    def images(self, frames, *, antialias=True):
        red, green, blue = torch.as_tensor(frames).float().mean((0, 1, 2))
        return torch.tensor([[1.0, 0.0] if self.sign * (red - (green + blue) / 2) > 0 else [0.0, 1.0]])

    def texts(self, texts):
        return torch.tensor([[1.0, 0.0] if " red" in text else [0.0, 1.0] for text in texts])


def test_with_clip_the_red_motorcycle_counts() -> None:
    assert check(Recogniser(), Reds(1.0))["facts"] == 15  # type: ignore[arg-type]
    assert check(Recogniser(), Reds(1.0))["failed"] == []  # type: ignore[arg-type]
    assert check(Recogniser(), Reds(-1.0))["failed"] == ["a photo of a red motorcycle"]  # type: ignore[arg-type]


def test_the_folder_has_genevals_layout(tmp_path: Path) -> None:
    known.main(["--out", str(tmp_path / "known")])
    items = list_samples([tmp_path / "known"])
    made = facts(colored=True)
    assert [item.metadata for item in items] == [fact.metadata for fact in made]
    for item, fact in zip(items, made, strict=True):
        (path,) = item.paths
        np.testing.assert_array_equal(read_frames(path)[0], fact.picture())
        assert json.loads((path.parents[1] / "metadata.jsonl").read_text()) == fact.metadata


def test_a_damaged_photograph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path):
        raise OSError("truncated")

    photograph.cache_clear()
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match=r"chelsea.png, a photograph of scikit-image \(truncated\)"):
        photograph("cat")
