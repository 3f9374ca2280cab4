"""Diversity against kernels and distributions whose values are known."""

import os
import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from rcm.data import prompts, world
from rcm.evaluation import diversity
from rcm.evaluation.shapebench import Clip


def test_vendi_score_of_known_kernels() -> None:
    assert diversity.vendi(np.eye(7)) == pytest.approx(7)
    assert diversity.vendi(np.ones((7, 7))) == pytest.approx(1)
    assert diversity.vendi(np.kron(np.eye(3), np.ones((4, 4)))) == pytest.approx(3)  # three groups of equals
    s = 0.6
    p, q = (1 + s) / 2, (1 - s) / 2
    assert diversity.vendi(np.array([[1, s], [s, 1]])) == pytest.approx(np.exp(-p * np.log(p) - q * np.log(q)))


def _plain_entropy(values: tuple[str, ...]) -> float:
    p = np.array(list(Counter(values).values())) / len(values)
    return float(-(p * np.log2(p)).sum())


def test_entropy_is_the_mean_over_all_subsets() -> None:
    values = tuple("aaabbcd")
    every = [_plain_entropy(subset) for subset in combinations(values, 4)]
    assert diversity.entropy(values, 4) == pytest.approx(np.mean(every))
    assert diversity.entropy(values, 7) == pytest.approx(_plain_entropy(values))
    assert diversity.entropy("aaaaaaaa", 8) == 0
    assert diversity.entropy("abcdefghij", 8) == pytest.approx(3)
    assert diversity.entropy("abc", 8) is None


def test_total_variation() -> None:
    assert diversity.total_variation("aabb", {"a": 0.5, "b": 0.5}) == 0
    assert diversity.total_variation("aaaa", {"a": 0.25, "b": 0.75}) == pytest.approx(0.75)
    assert diversity.total_variation("cc", {"a": 1.0}) == pytest.approx(1)


def test_pixel_distance() -> None:
    images = [np.full((2, 2, 3), level, np.uint8) for level in (0, 51, 255)]
    assert diversity.pixel_distance(images) == pytest.approx((0.2 + 1.0 + 0.8) / 3)


def test_recall_and_coverage_by_hand() -> None:
    real = np.array([[0.0], [1.0], [2.0], [3.0], [10.0]])  # third nearest others: 3, 2, 2, 3 and 9 away
    made = real[:4]  # 3, 2, 2 and 3 away: 10 is out of reach of 3
    assert diversity.recall(real, made) == pytest.approx(4 / 5)
    assert diversity.coverage(real, made) == 1  # 3 is within the 9 of 10
    assert diversity.recall(real, np.zeros((8, 1))) == pytest.approx(1 / 5)  # one picture eight times
    assert diversity.coverage(real, np.zeros((8, 1))) == pytest.approx(4 / 5)


def test_one_mode_lowers_recall_and_coverage() -> None:
    caption = prompts.evaluation_suite(prompts.TINY, seed=5, per_task=1)[0]
    rng = np.random.default_rng(7)
    scenes = [world.sample_scene(caption, rng) for _ in range(diversity.MINIMUM)]
    true = diversity.of_prompt([Clip(world.render(scene)) for scene in scenes], caption)
    same = diversity.of_prompt([Clip(world.render(scenes[0]))] * diversity.MINIMUM, caption)
    for key in ("prior.recall", "prior.coverage"):
        assert same[key] < 0.2 < 0.4 < true[key], key


def test_hidden_factors_are_those_of_the_scene() -> None:
    rng = np.random.default_rng(5)
    for caption in prompts.evaluation_suite(prompts.TINY, seed=5, per_task=4):
        scene = world.sample_scene(caption, rng)
        found = diversity.hidden_factors(Clip(world.render(scene)), caption)
        assert found is not None
        entry = caption["include"][-1 if caption["tag"] == "position" else 0]
        first = min((t for t in scene.things if t.shape == entry["class"]), key=lambda thing: thing.cell)
        expected = {"cell": first.cell, "color": first.color, "fill": first.fill}
        if "color" in entry:
            del expected["color"]
        assert {name: found[name] for name in found if name != "background"} == expected
        assert found["background"] == int((scene.background - 25) // 15)
    assert diversity.hidden_factors(Clip(np.full((1, 48, 48, 3), 50, np.uint8)), prompts.single_object("star")) is None


def test_the_prior_is_the_worlds() -> None:
    prior = diversity.prior(prompts.single_object("star"))
    assert len(prior["cell"]) == 9
    assert all(abs(p - 1 / 9) < 0.03 for p in prior["cell"].values())
    assert all(abs(p - 1 / 6) < 0.03 for p in prior["color"].values())
    moving = diversity.prior(prompts.as_clip(prompts.colors("star", "red"), "left"))
    assert set(moving["cell"]) == {(row, 2) for row in range(3)}
    assert "color" not in moving


def test_collapse_shows_and_too_few_samples_have_no_value() -> None:
    caption = prompts.single_object("circle")
    rng = np.random.default_rng(6)
    clips = [Clip(world.render(world.sample_scene(caption, rng))) for _ in range(16)]
    varied = diversity.of_prompt(clips, caption)
    same = diversity.of_prompt([Clip(clips[0].frames) for _ in range(16)], caption)
    assert all(value is not None for value in [*varied.values(), *same.values()])
    assert same["diversity.vendi"] == pytest.approx(1)
    assert same["diversity.cell_entropy"] == 0
    assert same["pixels.distance"] == pytest.approx(0, abs=1e-6)
    assert (varied["diversity.vendi"] or 0) > 4.5
    assert (varied["diversity.cell_entropy"] or 0) > 2
    for name in diversity.FACTORS:
        assert (varied[f"prior.{name}_distance"] or 0) < (same[f"prior.{name}_distance"] or 0) - 0.2
    few = diversity.of_prompt(clips[: diversity.MINIMUM - 1], caption)
    assert set(few.values()) == {None}
    assert few.keys() == varied.keys()
    assert set(diversity.of_prompt([], caption).values()) == {None}


def test_the_last_digit_does_not_depend_on_the_process():
    """Python orders a set of texts anew in every process."""
    program = (
        "from rcm.data import prompts; from rcm.evaluation import diversity\n"
        "wanted = {f'value {i}': 10.0 ** (i % 9 - 8) / (i + 3) for i in range(200)}\n"
        "print(repr(diversity.total_variation([f'value {i * i % 211}' for i in range(300)], wanted)))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(printed) == 1
