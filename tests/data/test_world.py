"""The tiny world shows what its captions say."""

from itertools import product

import numpy as np
import pytest

from rcm.data import prompts, world
from rcm.evaluation.geneval import relations


def captions(media: str) -> list[prompts.Metadata]:
    return prompts.evaluation_suite(prompts.TINY, seed=11, per_task=15, media=media)


def test_every_caption_has_a_scene_and_scenes_differ_in_what_the_caption_leaves_open():
    rng = np.random.default_rng(0)
    for metadata in captions("images"):
        scenes = [world.sample_scene(metadata, rng) for _ in range(30)]
        assert len({tuple(t.cell for t in s.things) for s in scenes}) > 3
        assert len({s.background for s in scenes}) == 30
        wanted = sorted(i["class"] for i in metadata["include"] for _ in range(i["count"]))
        assert all(sorted(t.shape for t in s.things) == wanted for s in scenes)


def test_named_colours_and_positions_hold():
    rng = np.random.default_rng(1)
    for metadata in captions("clips"):
        scene = world.sample_scene(metadata, rng)
        for item in metadata["include"]:
            if "color" in item:
                assert {t.color for t in scene.things if t.shape == item["class"]} == {item["color"]}
        if metadata["tag"] == "position":
            (a, b), relation = scene.things, metadata["include"][1]["position"][0]
            steps = range(world.GRID) if scene.direction else range(1)
            dy, dx = world.DIRECTIONS[scene.direction] if scene.direction else (0, 0)
            for k in steps:  # while A moves, GenEval's rule on the boxes sees the relation
                boxes = [
                    (c * 16.0 + 2, r * 16.0 + 2, c * 16.0 + 14, r * 16.0 + 14)
                    for r, c in ((a.cell[0] + k * dy, a.cell[1] + k * dx), b.cell)
                ]
                assert relation in relations(*boxes)


def test_moving_shapes_cross_one_cell_in_four_frames_and_nothing_else_moves():
    thing, other = world.Thing("circle", "red", (2, 0)), world.Thing("star", "white", (0, 2))
    video = world.render(world.Scene((thing, other), 40.0, "up"), world.CLIP_FRAMES)
    assert video.shape == (9, 48, 48, 3)
    red = (video[..., 0].astype(int) - video[..., 2]) > 100
    rows = [np.argwhere(frame)[:, 0].mean() for frame in red]
    assert np.allclose(np.diff(rows), -4.0)
    assert (video[:, :16, 32:] == video[0, :16, 32:]).all()


def test_shapes_cover_the_area_of_their_outline():
    """Coverage against closed forms, up to the quarter pixels of the supersampling."""
    area = {shape: world._stencil(shape, "solid")[0].sum() / world.RADIUS**2 for shape in world.SHAPES}
    assert area["circle"] == pytest.approx(np.pi * 0.94**2, rel=0.01)
    assert area["square"] == pytest.approx((2 * 0.82) ** 2, rel=0.02)
    assert area["cross"] == pytest.approx(2 * 2.1 * 0.6 - 0.6**2, rel=0.05)
    star = 5 * 1.05 * 0.44 * np.sin(np.pi / 5)  # ten triangles between tip and notch
    assert area["star"] == pytest.approx(star, rel=0.05)


def test_no_two_looks_are_alike():
    looks = [
        world.render(world.Scene((world.Thing(s, c, (1, 1), f),), 55.0)).astype(float)
        for s, c, f in product(world.SHAPES, world.COLORS, world.FILLS)
    ]
    for i, a in enumerate(looks):
        assert all(np.abs(a - b).mean() > 0.2 for b in looks[:i])


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ([{"class": "dog", "count": 1}], "has no 'dog'"),
        ([{"class": "star", "count": 1, "color": "pink"}], "has no colour 'pink'"),
        ([{"class": "star", "count": 10}], "has no room for"),
    ],
)
def test_what_the_world_cannot_show_is_refused(include, message):
    with pytest.raises(ValueError, match=message):
        world.sample_scene({"include": include, "prompt": "x"}, np.random.default_rng(0))


def test_a_relation_that_a_motion_would_break_is_incompatible():
    position = prompts.position("star", "left of", "circle")
    assert world.compatible(prompts.as_clip(position, "up"))
    assert not world.compatible(prompts.as_clip(position, "right"))
