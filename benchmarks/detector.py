"""How far the detector of the tiny world can be trusted, and where the constants of its score come from.

python benchmarks/detector.py               # oracle, floor, noise and blur on scenes that nothing was tuned on
python benchmarks/detector.py --calibrate   # SLOPE and OFFSET of rcm.evaluation.shapes
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np

from rcm.data import prompts, world
from rcm.evaluation.geneval import judge as judge_caption
from rcm.evaluation.geneval import summarise
from rcm.evaluation.shapes import ShapeDetection, ShapeDetector, color_of

CALIBRATION_SEED = 7000
Degrade = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def blurred(sigma: float) -> Degrade:
    """Gaussian blur of `sigma` pixels."""
    return lambda image, rng: cv2.GaussianBlur(image, (0, 0), sigma) if sigma > 0 else image


def noisy(deviation: float) -> Degrade:
    """White noise, in grey levels."""
    return lambda image, rng: np.clip(image + rng.normal(0, deviation, image.shape), 0, 255).astype(np.uint8)


CONDITIONS: dict[str, Degrade] = {
    "oracle": lambda image, rng: image,
    "noise 10": noisy(10),
    "noise 20": noisy(20),
    "blur 0.8": blurred(0.8),
    "blur 1.5": blurred(1.5),
    "blur 0.8 + noise 10": lambda image, rng: noisy(10)(blurred(0.8)(image, rng), rng),
}


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return common / (areas - common)


def shows(detection: ShapeDetection, scene: world.Scene) -> bool:
    """Whether a thing of the scene has the detection's shape, colour and place."""
    for thing in scene.things:
        y, x = ((k + 0.5) * world.CELL for k in thing.cell)
        box = (x - world.RADIUS, y - world.RADIUS, x + world.RADIUS, y + world.RADIUS)
        if (thing.shape, thing.color) == (detection.cls, detection.color) and overlap(detection.box, box) > 0.4:
            return True
    return False


def chimeras(scene: world.Scene, rng: np.random.Generator) -> np.ndarray:
    """Upper or left halves of the shapes with the other halves of other shapes."""
    others = tuple(
        replace(thing, shape=str(rng.choice([shape for shape in world.SHAPES if shape != thing.shape])))
        for thing in scene.things
    )
    image, other = world.render(scene)[0], world.render(replace(scene, things=others))[0]
    place = np.mgrid[: world.SIZE, : world.SIZE][rng.integers(2)] % world.CELL
    return np.where((place < world.CELL / 2)[..., None], image, other)


def blobs(scene: world.Scene, rng: np.random.Generator) -> np.ndarray:
    """Smooth spots in place of the shapes."""
    y, x = np.mgrid[: world.SIZE, : world.SIZE]
    image = np.full((world.SIZE, world.SIZE, 3), scene.background)
    for thing in scene.things:
        cy, cx = ((k + 0.5) * world.CELL for k in thing.cell)
        sy, sx = rng.uniform(2, 4, 2)
        spot = np.exp(-0.5 * (((y - cy) / sy) ** 2 + ((x - cx) / sx) ** 2))[..., None]
        image += spot * (np.array(world.COLORS[thing.color]) - image)
    return np.rint(image).astype(np.uint8)


def calibrate(scenes: int = 1500) -> tuple[float, float]:
    """Platt's logistic regression with his smoothed targets, on scenes of which a third shows no proper shapes."""
    rng = np.random.default_rng(CALIBRATION_SEED)
    captions = prompts.evaluation_suite(prompts.TINY, seed=CALIBRATION_SEED, per_task=60)
    evidence, right = [], []
    for i in range(scenes):
        scene = world.sample_scene(captions[rng.integers(len(captions))], rng)
        spoilt = i % 3 == 2
        image = (chimeras if i % 2 else blobs)(scene, rng) if spoilt else world.render(scene)[0]
        if i % 3:
            image = noisy(rng.uniform(0, 10))(blurred(rng.uniform(0, 1.2))(image, rng), rng)
        for detection, strength in ShapeDetector().candidates(image):
            evidence.append(strength)
            right.append(not spoilt and shows(detection, scene))
    z, positive = np.array(evidence), np.array(right)
    target = np.where(positive, (positive.sum() + 1) / (positive.sum() + 2), 1 / ((~positive).sum() + 2))
    design = np.stack([z, np.ones_like(z)], axis=1)
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ weights))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + 1e-9 * np.eye(2)
        weights += np.linalg.solve(hessian, design.T @ (target - p))
    print(f"{len(z)} candidates, {positive.mean():.2f} of them right")
    return float(weights[0]), float(weights[1])


def table(seed: int, per_task: int, samples: int) -> None:
    """Print the scores of ground truth under every condition, and of renders of other prompts."""
    rng = np.random.default_rng(seed)
    suite = prompts.evaluation_suite(prompts.TINY, seed=seed, per_task=per_task)
    captions = [caption for caption in suite for _ in range(samples)]
    images = [world.render(world.sample_scene(caption, rng))[0] for caption in captions]
    tags = [caption["tag"] for caption in captions]
    detector = ShapeDetector()

    def row(name: str, scores: dict[str, float]) -> None:
        print(f"{name:22s}" + "".join(f"{value:15.3f}" for value in scores.values()))

    print(f"{len(suite)} prompts, {len(images)} images, seed {seed}")
    print(f"{'':22s}" + "".join(f"{name:>15s}" for name in [*prompts.TASKS, "overall"]))
    for name, degrade in CONDITIONS.items():
        started = time.process_time()
        found = [detector.detect(degrade(image, rng)) for image in images]
        took = (time.process_time() - started) / len(images) * 1e3
        row(name, summarise(tags, [judge_caption(c, d, color_of)[0] for c, d in zip(captions, found, strict=True)]))
        if name == "oracle":
            floors = []
            for _ in range(20):
                order = rng.permutation(len(images))
                correct = [judge_caption(c, found[j], color_of)[0] for c, j in zip(captions, order, strict=True)]
                floors.append(summarise(tags, correct))
            row("floor (shuffled)", {key: float(np.mean([f[key] for f in floors])) for key in floors[0]})
            print(
                f"{'':22s}{took:.1f} ms of processor time an image; overall floor of single shuffles up to "
                f"{max(f['overall'] for f in floors):.3f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true", help="derive the constants of the score")
    parser.add_argument("--seed", type=int, default=9100, help="of prompts and scenes")
    parser.add_argument("--per-task", type=int, default=40)
    parser.add_argument("--samples", type=int, default=4, help="images a prompt")
    arguments = parser.parse_args()
    if arguments.calibrate:
        print("SLOPE, OFFSET = {:.2f}, {:.2f}".format(*calibrate()))
    else:
        table(arguments.seed, arguments.per_task, arguments.samples)
