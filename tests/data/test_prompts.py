"""Captions: GenEval's file byte by byte, the tiny suites, and files of users."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rcm.artefact import UserError
from rcm.data import prompts, world
from rcm.data.prompts import COCO, TASKS, TINY


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_geneval_prompts_are_reproduced_byte_by_byte() -> None:
    made = prompts.geneval(COCO, seed=43, n=100)
    assert len(made) == 553
    assert _sha256(prompts.to_jsonl(made)) == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    plain = "".join(f"{item['prompt']}\n" for item in made)
    assert _sha256(plain) == "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"
    names = "".join(f"{name}\n" for name in COCO.classes)
    assert _sha256(names) == "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd"
    tags = Counter(item["tag"] for item in made)
    assert [tags[task] for task in TASKS] == [80, 99, 80, 94, 100, 100]


def test_another_seed_gives_other_prompts() -> None:
    assert len(prompts.geneval(COCO, seed=42, n=100)) == 559


def test_the_person_is_never_coloured() -> None:
    assert len(COCO.colorable()) == 79
    assert "person" not in COCO.colorable()
    assert COCO.colorable()[0] == "bicycle"
    middle = prompts.Vocabulary(("a", "b", "c", "d"), ("red",), uncolored="c")
    assert middle.colorable() == ["d", "a", "b"]  # index 1 + 2 mod 4, and on from there


def test_articles_and_plurals() -> None:
    assert prompts.single_object("orange")["prompt"] == "a photo of an orange"
    assert prompts.counting("bus", 3)["prompt"] == "a photo of three buses"
    assert prompts.colors("car", "orange")["prompt"] == "a photo of an orange car"


def test_tiny_captions_are_all_there_and_distinct() -> None:
    captions = prompts.every_caption(TINY)
    assert {task: len(found) for task, found in captions.items()} == {
        "single_object": 5,
        "two_object": 5 * 4,
        "counting": 5 * 3,
        "colors": 5 * 6,
        "position": 5 * 4 * 4,
        "color_attr": 5 * 4 * 6 * 5,
    }
    texts = [item["prompt"] for found in captions.values() for item in found]
    assert len(set(texts)) == len(texts)
    assert all(world.compatible(item) for found in captions.values() for item in found)


def test_suites_are_balanced_distinct_and_follow_the_seed() -> None:
    suite = prompts.evaluation_suite(TINY, seed=43, per_task=24)
    tags = Counter(item["tag"] for item in suite)
    assert [tags[task] for task in TASKS] == [5, 20, 15, 24, 24, 24]
    assert len({item["prompt"] for item in suite}) == len(suite)
    assert suite == prompts.evaluation_suite(TINY, seed=43, per_task=24)
    other = prompts.evaluation_suite(TINY, seed=44, per_task=24)
    assert {item["prompt"] for item in suite if item["tag"] == "color_attr"} != {
        item["prompt"] for item in other if item["tag"] == "color_attr"
    }


@pytest.mark.parametrize(
    ("caption", "motion", "text"),
    [
        (prompts.single_object("circle"), "left", "a video of a circle moving left"),
        (prompts.colors("circle", "red"), "up", "a video of a red circle moving up"),
        (prompts.counting("cross", 2), "down", "a video of two crosses, one moving down"),
        (prompts.two_object("star", "cross"), "right", "a video of a star and a cross, the star moving right"),
        (
            prompts.position("star", "left of", "cross"),
            "up",
            "a video of a star left of a cross, the star moving up",
        ),
        (
            prompts.color_attr("star", "red", "cross", "blue"),
            "left",
            "a video of a red star and a blue cross, the star moving left",
        ),
        (prompts.single_object("circle"), None, "a video of a circle"),
    ],
)
def test_captions_of_clips(caption: prompts.Metadata, motion: str | None, text: str) -> None:
    clip = prompts.as_clip(caption, motion)
    assert clip["prompt"] == text
    assert clip.get("motion") == motion
    assert ("motion" in clip) == (motion is not None)
    assert list(clip)[-1] == "prompt"


def test_clip_suites_can_be_shown_and_few_captions_recur_with_other_motions() -> None:
    suite = prompts.evaluation_suite(TINY, seed=43, per_task=24, media="clips", still=0.25)
    rng = np.random.default_rng(0)
    for item in suite:
        world.sample_scene(item, rng)
    tags = Counter(item["tag"] for item in suite)
    assert all(tags[task] >= 16 for task in TASKS)  # also of the five single objects
    assert len({item["prompt"] for item in suite}) == len(suite)
    share = np.mean(["motion" not in item for item in suite])
    assert 0.1 < share < 0.4
    for still in (0.0, 1.0):
        some = prompts.evaluation_suite(TINY, seed=43, per_task=8, media="clips", still=still)
        assert {"motion" not in item for item in some} == {bool(still)}


def test_training_prompts_follow_the_weights() -> None:
    weights = {"counting": 2.0, "position": 3.0, "colors": 1.0}
    suite = prompts.training_suite(TINY, seed=1, number=600, weights=weights)
    assert Counter(item["tag"] for item in suite) == {"counting": 200, "position": 300, "colors": 100}
    uses = Counter(item["prompt"] for item in suite if item["tag"] == "position")
    assert len(uses) == 80
    assert max(uses.values()) - min(uses.values()) <= 1
    with pytest.raises(UserError, match="colour"):
        prompts.training_suite(TINY, seed=1, number=10, weights={"colour": 1.0})
    clips = prompts.training_suite(TINY, seed=1, number=300, weights=dict.fromkeys(TASKS, 1.0), media="clips")
    assert all(world.compatible(item) for item in clips)


def test_files_are_read_back(tmp_path: Path) -> None:
    suite = prompts.evaluation_suite(TINY, seed=43, per_task=3, media="clips")
    path = tmp_path / "prompts.jsonl"
    path.write_text(prompts.to_jsonl(suite))
    assert prompts.read_prompts(path) == suite
    path.write_text(prompts.to_jsonl(prompts.geneval(COCO)))
    assert len(prompts.read_prompts(path)) == 553


def _with(**changes: object) -> str:
    good = prompts.position("star", "left of", "cross")
    return json.dumps({**good, **changes})


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ('{"prompt": "a dog", "seed": NaN}', r"not JSON \(NaN is no number of JSON\)"),
        ("[]", "JSON object"),
        (_with(prompt=3), "'prompt'"),
        (_with(prompt="\ud800"), "'prompt'"),
        (_with(tag="colour"), "'tag'"),
        (_with(include=[]), "'include'"),
        (_with(include=["star"]), r"'include\[0\]'"),
        (_with(include=[{"class": "star"}]), r"'include\[0\]\.count'"),
        (_with(include=[{"class": "star", "count": 0}]), r"'include\[0\]\.count'"),
        (_with(include=[{"class": "star", "count": True}]), r"'include\[0\]\.count'"),
        (_with(include=[{"count": 1}]), r"'include\[0\]\.class'"),
        (_with(include=[{"class": "star", "count": 1, "position": ["left of", 0]}]), r"'include\[0\]\.position'"),
        (_with(include=[{"class": "star", "count": 1, "position": ["near", 0]}]), r"'include\[0\]\.position'"),
        (_with(exclude={}), "'exclude'"),
        (_with(exclude=[{"class": "star", "count": "2"}]), r"'exclude\[0\]\.count'"),
        (_with(motion="sideways"), "'motion'"),
    ],
)
def test_mistakes_name_line_and_key(line: str, named: str) -> None:
    text = prompts.to_jsonl([prompts.single_object("star")]) + line + "\n"
    with pytest.raises(UserError, match=f"line 2: .*{named}"):
        prompts.parse_prompts(text, "mine.jsonl")


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        prompts.read_prompts(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no prompts"):
        prompts.read_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary"):
        prompts.read_prompts(tmp_path / "binary.jsonl")


@pytest.mark.parametrize(
    "text", ["$(touch x); rm -rf /", "../../etc/passwd", "a\nb\u2028c\x00", "%s {0} \\ \" '", "🟥"]
)
def test_hostile_strings_are_data(text: str, tmp_path: Path) -> None:
    item = {**prompts.single_object("star"), "prompt": text}
    path = tmp_path / "p.jsonl"
    path.write_text(prompts.to_jsonl([item]))
    assert prompts.read_prompts(path) == [item]
    path.write_text(json.dumps(item, ensure_ascii=False) + "\n", encoding="utf-8")
    assert prompts.read_prompts(path) == [item]
