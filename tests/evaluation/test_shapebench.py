"""VBench's formulas on numbers worked out by hand, and the dimensions on clips that are known to be good or broken."""

import cv2
import numpy as np
import pytest

from rcm.data import prompts, world
from rcm.evaluation import shapebench
from rcm.evaluation.fidelity import fidelity
from rcm.evaluation.shapebench import Clip
from rcm.evaluation.shapes import ShapeDetection, ShapeDetector

CAPTION = prompts.as_clip(prompts.two_object("star", "cross"), "right")


def _clip(caption: prompts.Metadata, seed: int = 0) -> np.ndarray:
    return world.render(world.sample_scene(caption, np.random.default_rng(seed)), world.CLIP_FRAMES)


def _shown(*frames: list[ShapeDetection]) -> Clip:
    """A clip in which exactly these things are detected."""

    class Scripted(ShapeDetector):
        def detect(self, image: np.ndarray) -> list[ShapeDetection]:
            return frames[int(image[0, 0, 0])]

    pictures = (
        np.zeros((len(frames), 48, 48, 3), np.uint8) + np.arange(len(frames), dtype=np.uint8)[:, None, None, None]
    )
    return Clip(pictures, Scripted())


def _at(cls: str, x: float, y: float = 0.0, color: str = "red") -> ShapeDetection:
    return ShapeDetection(cls, (x, y, x + 10, y + 10), 0.99, color=color)


def test_flickering_is_the_mean_difference() -> None:
    frames = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 51, 51)])
    assert shapebench.temporal_flickering(frames) == pytest.approx(1 - (0.2 + 0.0) / 2)


def test_consistency_compares_with_the_frame_before_and_the_first() -> None:
    table = {(1, 0): 0.5, (2, 1): 1.0, (2, 0): 0.2}
    assert shapebench.consistency(lambda s, t: table[s, t], 3) == pytest.approx(((0.5 + 0.5) / 2 + (1.0 + 0.2) / 2) / 2)


def test_subject_consistency_is_that_of_the_things_seen() -> None:
    star, cross = _at("star", 0), _at("cross", 20)
    assert shapebench.subject_consistency(_shown([star, cross], [star, cross])) == 1
    assert shapebench.subject_consistency(_shown([star, cross], [star])) == 0.5
    assert shapebench.subject_consistency(_shown([star], [_at("star", 0, color="blue")])) == 0
    assert shapebench.subject_consistency(_shown([], [])) == 0


def test_color_counts_frames_in_which_the_object_is_seen() -> None:
    red, blue = _at("star", 0), _at("star", 0, color="blue")
    assert shapebench.color(_shown([red], [blue], [], [red]), "star", "red") == pytest.approx(2 / 3)
    assert shapebench.color(_shown([], [_at("cross", 0)]), "star", "red") is None


def test_spatial_relationship_ignores_the_side() -> None:
    left = _shown([_at("star", 0), _at("cross", 20)])
    assert shapebench.spatial_relationship(left, "star", "cross", "left of") == 1
    assert shapebench.spatial_relationship(left, "star", "cross", "right of") == 1
    assert shapebench.spatial_relationship(left, "star", "cross", "above") == 0
    overlapping = _shown([_at("star", 0), _at("cross", 5)])  # intersection 50 of 150
    assert shapebench.spatial_relationship(overlapping, "star", "cross", "left of") == pytest.approx(0.3)
    assert shapebench.spatial_relationship(_shown([_at("star", 0)]), "star", "cross", "left of") == 0


def test_ground_truth_is_perfect_where_it_must_be() -> None:
    values = shapebench.measure(Clip(_clip(CAPTION)), CAPTION)
    for name in ("dynamic_degree", "subject_consistency", "multiple_objects", "motion", "overall_consistency"):
        assert values[name] == 1
    for name in ("motion_smoothness", "track_smoothness", "background_consistency", "imaging_quality"):
        assert (values[name] or 0) > 0.99
    assert values["temporal_flickering"] is values["object_class"] is values["color"] is None
    assert values.keys() == shapebench.KINDS.keys()


def test_each_defect_lowers_its_own_dimension() -> None:
    frames = _clip(CAPTION)
    rng = np.random.default_rng(1)
    good = shapebench.measure(Clip(frames), CAPTION)

    def lower(changed: np.ndarray, *names: str) -> dict[str, float | None]:
        values = shapebench.measure(Clip(changed), CAPTION)
        for name in names:
            assert (values[name] or 0) < (good[name] or 0) - 0.005, name
        return values

    lower(np.repeat(frames[:1], len(frames), axis=0), "dynamic_degree", "motion", "overall_consistency")
    noisy = np.clip(frames + rng.normal(0, 12, frames.shape), 0, 255).astype(np.uint8)
    lower(noisy, "motion_smoothness", "imaging_quality")
    lower(frames[[0, 5, 2, 7, 1, 8, 3, 6, 4]], "motion_smoothness", "track_smoothness")
    lower(frames[::-1], "motion")
    lower(np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in frames]), "imaging_quality")
    flash = np.clip(frames * np.where(np.arange(9) % 2, 1.0, 1.25)[:, None, None, None], 0, 255).astype(np.uint8)
    lower(flash, "background_consistency", "motion_smoothness", "imaging_quality")


def test_still_prompts_measure_flickering_after_the_static_filter() -> None:
    still = prompts.as_clip(prompts.single_object("star"), None)
    frames = _clip(still)
    values = shapebench.measure(Clip(frames), still)
    assert values["temporal_flickering"] == 1
    assert values["dynamic_degree"] is None
    moving = _clip(prompts.as_clip(prompts.single_object("star"), "up"))
    assert not shapebench.is_static(Clip(moving))
    assert shapebench.measure(Clip(moving), still)["temporal_flickering"] is None
    assert not shapebench.motion(Clip(moving), still)


@pytest.mark.parametrize("direction", prompts.MOTIONS)
def test_motion_is_the_direction_of_the_first_mentioned_shape(direction: str) -> None:
    caption = prompts.as_clip(prompts.color_attr("star", "red", "cross", "blue"), direction)
    clip = Clip(_clip(caption))
    said = {word: shapebench.motion(clip, {**caption, "motion": word}) for word in prompts.MOTIONS}
    assert said == {word: word == direction for word in prompts.MOTIONS}
    other = prompts.as_clip(prompts.color_attr("cross", "blue", "star", "red"), direction)
    assert not shapebench.motion(clip, other)  # the cross stands still


def test_one_of_several_moves() -> None:
    caption = prompts.as_clip(prompts.counting("circle", 2), "right")
    one = _shown(*[[_at("circle", 4.0 * t), _at("circle", 0, 30)] for t in range(9)])
    both = _shown(*[[_at("circle", 4.0 * t), _at("circle", 4.0 * t, 30)] for t in range(9)])
    assert shapebench.motion(one, caption)
    assert not shapebench.motion(both, caption)
    assert not shapebench.motion(_shown(*[[] for _ in range(9)]), caption)


def test_facts_are_counted_one_by_one() -> None:
    caption = prompts.as_clip(prompts.color_attr("star", "red", "cross", "blue"), "right")
    clip = _shown(*[[_at("star", 4.0 * t), _at("cross", 0, 30, color="green")] for t in range(9)])
    facts = shapebench.facts(clip, caption)
    assert facts == {"0.objects": True, "0.color": True, "1.objects": True, "1.color": False, "motion": True}
    two = prompts.as_clip(prompts.counting("star", 2), None)
    three = _shown([_at("star", 0), _at("star", 15), _at("star", 30)])
    assert shapebench.facts(three, two) == {"0.objects": True, "exclude": False, "motion": True}
    place = prompts.as_clip(prompts.position("star", "above", "cross"), None)
    beside = _shown([_at("star", 0), _at("cross", 20)])
    assert shapebench.facts(beside, place)["1.position"] is False


def test_fidelity_sees_blur_and_noise() -> None:
    caption = prompts.two_object("star", "circle")
    image = world.render(world.sample_scene(caption, np.random.default_rng(2)))[0]
    rng = np.random.default_rng(3)

    def of(changed: np.ndarray) -> tuple[float, float]:
        found = fidelity(changed, ShapeDetector().detect(changed))
        assert found.psnr is not None and found.sharpness is not None
        return found.psnr, found.sharpness

    psnr, sharpness = of(image)
    assert psnr > 45
    assert sharpness == pytest.approx(1, abs=0.01)
    psnr, sharpness = of(np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8))
    assert psnr == pytest.approx(20 * np.log10(255 / 5), abs=0.6)  # that of the noise itself
    assert sharpness == pytest.approx(1, abs=0.05)
    psnr, sharpness = of(cv2.GaussianBlur(image, (0, 0), 0.8))
    assert sharpness < 0.7
    nothing = fidelity(np.full((48, 48, 3), 50, np.uint8), [])
    assert nothing.psnr is nothing.sharpness is None
