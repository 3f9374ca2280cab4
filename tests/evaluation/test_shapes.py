"""The detector of the tiny world on scenes that nothing was tuned on."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest

from rcm.data import prompts, world
from rcm.evaluation import shapeeval, shapes
from rcm.evaluation.geneval import judge, summarise
from rcm.evaluation.shapes import ShapeDetector, color_of, noise_level

SEED = 24680


def _scene(*things: world.Thing, background: float = 50.0) -> np.ndarray:
    return world.render(world.Scene(things, background))[0]


def test_ground_truth_scores_high_and_other_prompts_low() -> None:
    rng = np.random.default_rng(SEED)
    captions = prompts.evaluation_suite(prompts.TINY, seed=SEED, per_task=12) * 2
    images = [world.render(world.sample_scene(caption, rng))[0] for caption in captions]
    assert shapeeval(images, captions)["overall"] >= 0.99
    found = [ShapeDetector().detect(image) for image in images]
    floors = []
    for _ in range(20):
        correct = [judge(captions[i], found[j], color_of)[0] for i, j in enumerate(rng.permutation(len(images)))]
        floors.append(summarise([caption["tag"] for caption in captions], correct)["overall"])
    assert np.mean(floors) <= 0.10
    blurred = shapeeval([cv2.GaussianBlur(image, (0, 0), 0.8) for image in images], captions)
    assert blurred["overall"] >= 0.94


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_look_of_a_shape_is_sure_to_be_found(shape: str) -> None:
    for color in world.COLORS:
        for fill in world.FILLS:
            (found,) = ShapeDetector().detect(_scene(world.Thing(shape, color, (1, 1), fill), background=85.0))
            assert (found.cls, found.color) == (shape, color)
            assert found.score > 0.9


def test_the_grid_of_the_world_plays_no_part() -> None:
    things = (world.Thing("star", "red", (0, 0)), world.Thing("cross", "blue", (1, 2), "striped"))
    image = _scene(*things)
    there = sorted((found.cls, found.color, *found.box) for found in ShapeDetector().detect(image))
    for dy, dx in ((1, 0), (5, 3), (11, 0)):
        moved = np.full_like(image, 50)
        moved[dy:, : -dx or None] = image[: -dy or None, dx:]
        found = sorted(
            (d.cls, d.color, d.box[0] + dx, d.box[1] - dy, d.box[2] + dx, d.box[3] - dy)
            for d in ShapeDetector().detect(moved)
            if d.score > 0.3
        )
        assert [f[:2] for f in found] == [t[:2] for t in there]
    assert np.allclose(there[1][2:], (1, 1, 15, 14), atol=2)


def test_touching_shapes_are_told_apart() -> None:
    image = np.full((48, 48, 3), 50, np.uint8)
    for x, color in ((8, "red"), (22, "green")):
        square = _scene(world.Thing("square", color, (1, 1)))[16:32, 16:32]
        image[16:28, x : x + 14] = square[2:14, 1:15]
    image[17:27, 20:24] = image[17:27, 18:19]  # red right up to green
    found = [(d.cls, d.color) for d in ShapeDetector().detect(image) if d.color == "green"]
    assert len(found) == 1
    blurred = cv2.GaussianBlur(_scene(*(world.Thing("circle", "blue", (1, c)) for c in range(3))), (0, 0), 1.2)
    assert [d.cls for d in ShapeDetector().detect(blurred)] == ["circle"] * 3


def test_what_is_no_shape_scores_low() -> None:
    assert ShapeDetector().detect(np.full((48, 48, 3), 50, np.uint8)) == []
    assert ShapeDetector().detect(np.zeros((48, 48, 3), np.uint8)) == []
    y, x = np.mgrid[:48, :48]
    for sy, sx in ((3.5, 2.5), (2.2, 4.5), (5.0, 5.0)):
        spot = np.exp(-0.5 * (((y - 24) / sy) ** 2 + ((x - 24) / sx) ** 2))[..., None]
        image = np.rint(50 + spot * (np.array(world.COLORS["red"]) - 50)).astype(np.uint8)
        assert all(found.score < 0.5 for found in ShapeDetector().detect(image))
    rng = np.random.default_rng(SEED)
    noise = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert all(found.score < 0.3 for found in ShapeDetector().detect(noise))


def test_noise_is_measured() -> None:
    rng = np.random.default_rng(SEED)
    clean = _scene(world.Thing("star", "red", (0, 0)), world.Thing("cross", "blue", (1, 2), "striped"))
    assert noise_level(clean) < 1
    noisy = clean + rng.normal(0, 12, clean.shape)
    assert noise_level(noisy) == pytest.approx(12, rel=0.15)


@pytest.mark.slow
def test_the_constants_of_the_score_come_from_the_benchmark() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "detector.py"
    spec = importlib.util.spec_from_file_location("detector_benchmark", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.calibrate() == pytest.approx((shapes.SLOPE, shapes.OFFSET), abs=0.05)
