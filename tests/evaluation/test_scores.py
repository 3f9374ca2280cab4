"""Scores from folders of samples: ground truth, another prompt's pictures, and folders that are broken."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcm.artefact import UserError, sha256_file
from rcm.cli.pictures import png
from rcm.data import prompts, world
from rcm.evaluation import check_controls, evaluate, results_jsonl
from rcm.evaluation.samples import Expected, list_samples, read_frames


def _write(root: Path, suite: list[prompts.Metadata], samples: int, frames: int, shift: int = 0, part: int = 0) -> Path:
    """Ground truth of the suite, or of the prompt `shift` places on; only every second prompt if `part` is 1 or 2."""
    for index, caption in enumerate(suite):
        if part and index % 2 != part - 1:
            continue
        folder = root / f"{index:05d}" / "samples"
        folder.mkdir(parents=True)
        (folder.parent / "metadata.jsonl").write_text(json.dumps(caption) + "\n")
        for number in range(samples):
            scene = world.sample_scene(suite[(index + shift) % len(suite)], np.random.default_rng([index, number]))
            (folder / f"{number:04d}.png").write_bytes(png(world.render(scene, frames)))
    return root


def _scored(model: str, value: float) -> dict[str, Any]:
    return {"model": model, "media": "images", "metrics": {"shapeeval.overall": {"value": value}}}


@pytest.fixture(scope="module")
def suite() -> list[prompts.Metadata]:
    return prompts.evaluation_suite(prompts.TINY, seed=8, per_task=4)


def test_images(tmp_path: Path, suite: list[prompts.Metadata]) -> None:
    parts = [_write(tmp_path / str(part), suite, 2, 1, part=part) for part in (1, 2)]
    several = _write(tmp_path / "d", [prompts.single_object("star"), prompts.colors("cross", "red")], 10, 1)
    found = evaluate(parts, [several], media="images", model="oracle", steps=0)
    scores = found.scores
    assert (scores["model"], scores["steps"], scores["media"]) == ("oracle", 0, "images")
    assert (scores["n_prompts"], scores["n_samples"]) == (24, 48)
    overall = scores["metrics"]["shapeeval.overall"]
    assert overall == {"value": 1.0, "low": 1.0, "high": 1.0, "n_prompts": 24, "kind": "substituted_model"}
    assert scores["metrics"]["fidelity.psnr"]["value"] > 45
    assert scores["metrics"]["diversity.vendi"]["value"] > 3
    assert scores["metrics"]["diversity.color_entropy"]["n_prompts"] == 1  # the other caption names the colour
    assert scores["evaluator"]["diversity"]["satisfying"] == [10, 10]
    per_prompt = scores["per_prompt"]
    assert per_prompt["tag"] == [item["tag"] for item in suite]
    counting = [tag == "counting" for tag in per_prompt["tag"]]
    assert [value is not None for value in per_prompt["shapeeval.counting"]] == counting
    file = tmp_path / "prompts.jsonl"
    file.write_text(prompts.to_jsonl(suite))
    assert scores["evaluator"]["prompts_sha256"] == sha256_file(file)
    json.dumps(scores, allow_nan=False)
    lines = [json.loads(line) for line in results_jsonl(found.results).splitlines()]
    assert len(lines) == 48
    assert lines[0].keys() == {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert lines[0]["filename"] == "00000/samples/0000.png"
    assert json.loads(lines[0]["metadata"]) == suite[0]
    (boxes,) = json.loads(lines[0]["details"]).values()
    assert len(boxes[0]) == 5


def test_pictures_of_other_prompts_fail_and_say_why(tmp_path: Path, suite: list[prompts.Metadata]) -> None:
    found = evaluate([_write(tmp_path, suite, 1, 1, shift=5)], media="images", model="shuffled", steps=0)
    assert found.scores["metrics"]["shapeeval.overall"]["value"] <= 0.25
    assert not any(key.startswith("diversity") for key in found.scores["metrics"])
    failed = [line for line in found.results if not line["correct"]]
    assert failed
    assert all(line["reason"].startswith("expected") or "no object" in line["reason"] for line in failed)


def test_clips_need_their_motion(tmp_path: Path) -> None:
    suite = [
        prompts.as_clip(prompts.single_object("star"), "left"),
        prompts.as_clip(prompts.colors("cross", "red"), None),
    ]
    moving = evaluate([_write(tmp_path / "a", suite, 1, 9)], media="clips", model="oracle", steps=0)
    for family in ("shapeeval", "shapeeval_frames"):
        assert moving.scores["metrics"][f"{family}.overall"]["value"] == 1
    assert moving.scores["metrics"]["shapebench.temporal_flickering"]["kind"] == "same_formula"
    for folder in sorted((tmp_path / "a").iterdir()):
        path = folder / "samples" / "0000.png"
        path.write_bytes(png(np.repeat(read_frames(path)[:1], 9, axis=0)))
    still = evaluate([tmp_path / "a"], media="clips", model="still", steps=0)
    assert still.scores["metrics"]["shapeeval.overall"]["value"] == 0.5
    assert still.scores["metrics"]["shapeeval_frames.overall"]["value"] == 1
    assert still.results[0]["reason"] == "expected motion left"
    assert still.results[0]["frames_correct"]
    with pytest.raises(UserError, match=r"9 frames"):
        evaluate([tmp_path / "a"], media="images", model="oracle", steps=0)


def test_clips_are_read_back_frame_by_frame(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (9, 48, 48, 3), dtype=np.uint8)
    frames[4] = frames[3]
    (tmp_path / "clip.png").write_bytes(png(frames))
    assert np.array_equal(read_frames(tmp_path / "clip.png"), frames)


def test_the_evaluator_says_what_it_is(tmp_path: Path, suite: list[prompts.Metadata]) -> None:
    folder = _write(tmp_path, suite[:2], 1, 1)
    said = {"checkpoint_sha256": "ab", "sigma_max": 80.0, "frames": 1}
    (folder / "sampling.json").write_text(json.dumps(said | {"part": "1-of-1"}))
    scores = evaluate([folder], [folder], media="images", model="rcm-0", steps=4).scores
    evaluator = scores["evaluator"]
    assert (evaluator["name"], evaluator["version"], evaluator["device"]) == ("ShapeEval", "1", "CPU")
    assert evaluator["versions"]["numpy"] == np.__version__
    assert evaluator["sampling"] == evaluator["diversity"]["sampling"] == said
    assert evaluator["known"] is evaluator["paper"] is evaluator["prompts_file"] is None
    assert evaluator["missing"] == []
    (folder / "sampling.json").write_text(json.dumps(said | {"frames": 9}))
    with pytest.raises(UserError, match=r"00000/samples/0000.png has 1 frame, expected 9"):
        evaluate([folder], media="images", model="rcm-0", steps=4)


def test_missing_samples_are_refused_or_named(tmp_path: Path, suite: list[prompts.Metadata]) -> None:
    folder = _write(tmp_path, suite[:3], 2, 1)
    expected = Expected(suite[:3], 2)
    who = {"media": "images", "model": "rcm-0", "steps": 4}
    whole = evaluate([folder], **who, expected=expected).scores
    assert whole == evaluate([folder], **who).scores
    (folder / "00002" / "samples" / "0001.png").unlink()
    with pytest.raises(UserError, match=r"1 of 6 samples are missing, the first 00002/samples/0001.png"):
        evaluate([folder], **who)
    shutil.rmtree(folder / "00001")
    with pytest.raises(UserError, match=r"3 of 6 samples are missing, the first 00001/samples/0000.png"):
        evaluate([folder], **who, expected=expected)
    scores = evaluate([folder], **who, expected=expected, allow_missing=True).scores
    assert len(scores["evaluator"]["missing"]) == 3
    assert (scores["n_prompts"], scores["n_samples"]) == (2, 3)
    assert scores["per_prompt"]["shapeeval.overall"] == [1, None, 1]
    assert scores["evaluator"]["prompts_sha256"] == whole["evaluator"]["prompts_sha256"]
    with pytest.raises(UserError, match=r"00000/metadata.jsonl was made from"):
        evaluate([folder], **who, expected=Expected(suite[3:6], 2))
    (folder / "00000" / "metadata.jsonl").write_text('{"prompt": "a red circle"}')
    with pytest.raises(UserError, match=r"00000/metadata.jsonl has a prompt but no tag"):
        evaluate([folder], **who, allow_missing=True)


def test_missing_samples_of_diversity_are_refused_or_named(tmp_path: Path, suite: list[prompts.Metadata]) -> None:
    folder, several = _write(tmp_path / "r", suite[:1], 1, 1), _write(tmp_path / "d", suite[:3], 8, 1)
    who = {"media": "images", "model": "rcm-0", "steps": 4}
    whole = evaluate([folder], [several], **who).scores
    (several / "00002" / "samples" / "0003.png").unlink()
    with pytest.raises(UserError, match=r"1 of 24 samples are missing, the first 00002/samples/0003.png"):
        evaluate([folder], [several], **who)
    shutil.rmtree(several / "00001")
    scores = evaluate([folder], [several], **who, allow_missing=True).scores
    gone = scores["evaluator"]["missing"]
    assert (len(gone), gone[0], gone[-1]) == (9, "diversity/00001/samples/0000.png", "diversity/00002/samples/0003.png")
    first, *others = scores["per_prompt"]["diversity.vendi"]  # prompts keep their places
    assert others == [None, None] and first == whole["per_prompt"]["diversity.vendi"][0]


def test_broken_folders_are_named(tmp_path: Path, suite: list[prompts.Metadata]) -> None:
    with pytest.raises(UserError, match=r"nowhere"):
        list_samples([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no samples in .*empty"):
        list_samples([tmp_path / "empty"])
    good = _write(tmp_path / "good", suite[:2], 1, 1)
    with pytest.raises(UserError, match=r"prompt 00000 is in"):
        list_samples([good, good])
    (good / "00001" / "samples" / "0000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"0000.png"):
        evaluate([good], media="images", model="x", steps=1)
    Image.new("L", (48, 48)).save(good / "00001" / "samples" / "0000.png")
    assert evaluate([good], media="images", model="x", steps=1).scores["n_samples"] == 2
    (good / "00001" / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"metadata.jsonl, line 1"):
        list_samples([good])
    (good / "00001" / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"metadata.jsonl"):
        list_samples([good])


def test_controls_must_hold() -> None:
    check_controls(_scored("oracle", 0.95), _scored("shuffled", 0.10))
    with pytest.raises(UserError, match=r"ground truth has shapeeval.overall 0.940"):
        check_controls(_scored("oracle", 0.94), _scored("shuffled", 0.05))
    with pytest.raises(UserError, match=r"other prompts have 0.110"):
        check_controls(_scored("oracle", 1.0), _scored("shuffled", 0.11))
    check_controls(_scored("oracle", 0.9), _scored("shuffled", 0.15), oracle_at_least=0.9, floor_at_most=0.2)
