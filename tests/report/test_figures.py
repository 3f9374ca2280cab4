"""Figures are the same bytes every time and show the pixels they were given."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import pytest
from PIL import Image

from rcm.artefact import UserError
from rcm.report.figures import (
    chosen_prompts,
    figure_clips,
    figure_precision,
    figure_quality_diversity,
    figure_samples,
    figure_training,
    sample_runs,
)
from rcm.report.scores import Run


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def places(figure: np.ndarray, picture: np.ndarray, factor: int) -> list[tuple[int, int]]:
    """Where in the figure the picture stands, enlarged by an integer: (y, x) of its corners."""
    wanted = np.kron(picture, np.ones((factor, factor, 1), np.uint8))
    height, width = wanted.shape[:2]
    distance = cv2.matchTemplate(figure, wanted, cv2.TM_SQDIFF_NORMED)
    near = np.argwhere(distance < 1e-4).tolist()
    return [(y, x) for y, x in near if (figure[y : y + height, x : x + width] == wanted).all()]


@pytest.fixture(scope="module")
def drawn(
    image_samples: list[Path],
    clip_samples: list[Path],
    metrics: list[Path],
    scores: dict[str, list[dict[str, Any]]],
    rounding: list[dict[str, Any]],
) -> dict[str, bytes]:
    """Every figure once."""
    return {
        "samples": figure_samples(image_samples, prompts=2),
        "clips": figure_clips(clip_samples, prompts=1),
        "quality_diversity": figure_quality_diversity(scores["images"]),
        "training": figure_training(metrics),
        "precision": figure_precision(rounding),
    }


def test_runs_are_read_from_paths_and_ordered(image_samples: list[Path]) -> None:
    assert [samples.run for samples in sample_runs(image_samples)] == [
        Run("teacher", None, 20),
        Run("dmd", 0, 4),
        Run("rcm", 0, 1),
        Run("rcm", 0, 4),
    ]
    with pytest.raises(UserError, match="MODEL-STEPS"):
        sample_runs([Path("/somewhere/else")])


def test_parts_of_one_run_are_joined(sampled: Callable[..., Path], tmp_path: Path) -> None:
    whole = sampled(tmp_path / "rcm-0-4" / "report" / "1-of-2", "images", 1.0)
    half = sorted(whole.iterdir())[6:]
    second = whole.with_name("2-of-2")
    second.mkdir()
    for prompt in half:
        shutil.move(prompt, second / prompt.name)
    (joined,) = sample_runs([second, whole])
    assert len(joined.prompts) == 12


def test_prompts_are_the_first_of_each_task(image_samples: list[Path]) -> None:
    runs = sample_runs(image_samples)
    tags = [runs[0].prompts[index].metadata["tag"] for index in chosen_prompts(runs, 6)]
    assert tags == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert len(chosen_prompts(runs, 8)) == 8
    assert len(chosen_prompts(runs, 100)) == 12


def test_samples_stand_where_their_headings_say(image_samples: list[Path], drawn: dict[str, bytes]) -> None:
    figure = pixels(drawn["samples"])
    runs = sample_runs(image_samples)
    prompts = chosen_prompts(runs, 2)
    lefts, tops = [], []
    for run in runs:
        found = {place for index in prompts for place in places(figure, run.frames(index)[0], 5)}
        lefts.append(min(x for _, x in found))
        tops.append(min(y for y, _ in found))
    assert lefts == sorted(lefts) and len(set(lefts)) == len(runs)  # columns in the order of tables
    assert len(set(tops)) == 1  # one row a prompt


def test_clips_show_every_frame_in_order(clip_samples: list[Path], drawn: dict[str, bytes]) -> None:
    figure = pixels(drawn["clips"])
    teacher = sample_runs(clip_samples)[0]
    (prompt,) = chosen_prompts(sample_runs(clip_samples), 1)
    clip = teacher.frames(prompt)
    assert len(clip) == 9
    found = [places(figure, frame, 3) for frame in (clip[0], clip[4], clip[8])]
    assert all(found)
    assert found[0][0][0] == found[1][0][0] == found[2][0][0]  # one line
    assert found[0][0][1] < found[1][0][1] < found[2][0][1]


def test_same_inputs_same_bytes(
    image_samples: list[Path],
    clip_samples: list[Path],
    metrics: list[Path],
    scores: dict[str, list[dict[str, Any]]],
    rounding: list[dict[str, Any]],
    drawn: dict[str, bytes],
) -> None:
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 10}):  # a user's taste
        again = {  # in another order
            "samples": figure_samples(image_samples[::-1], prompts=2),
            "clips": figure_clips(clip_samples[::-1], prompts=1),
            "quality_diversity": figure_quality_diversity(scores["images"][::-1]),
            "training": figure_training(metrics[::-1]),
            "precision": figure_precision(rounding[::-1]),
        }
    assert again == drawn
    for png in drawn.values():
        with Image.open(io.BytesIO(png)) as image:
            assert "Software" not in image.info
            assert image.width >= 1000


@pytest.mark.parametrize("name", ["quality_diversity", "training"])
def test_every_method_has_its_colour_in_the_plots(name: str, drawn: dict[str, bytes]) -> None:
    assert {0x0072B2, 0xD55E00, 0xCC79A7, 0x009E73} <= colours(drawn[name])  # sCM, DMD, DMD2, rCM


def colours(png: bytes) -> set[int]:
    return set(np.unique(pixels(png).reshape(-1, 3).astype(np.uint32) @ np.uint32([1 << 16, 1 << 8, 1])).tolist())


def test_training_has_a_panel_for_each_figure_that_was_noted(metrics: list[Path], drawn: dict[str, bytes]) -> None:
    by_method = {path.parent.name: path for path in metrics}
    scm = pixels(figure_training([by_method["scm-0"]]))  # sCM loss, tangent norm, gradient norm: one line of panels
    dmd2 = pixels(figure_training([by_method["dmd2-0"]]))  # DMD, GAN, critic, its GAN, two gradient norms: two lines
    everything = pixels(drawn["training"])  # eight: three lines
    heights = [len(figure) for figure in (scm, dmd2, everything)]
    assert heights[1] - heights[0] == heights[2] - heights[1] > 300


def test_each_precision_is_drawn_at_its_level(drawn: dict[str, bytes]) -> None:
    figure = pixels(drawn["precision"])
    panel = figure[60 : len(figure) // 2, 200 : figure.shape[1] // 2]  # of the first network, the output
    rows = {color: np.argwhere((panel == color).all(axis=-1))[:, 0] for color in ((213, 94, 0), (0, 114, 178))}
    rounded, precise = (np.median(found) for found in rows.values())
    grey = np.argwhere((panel == (140, 149, 159)).all(axis=-1))[:, 0]
    assert rounded < precise < np.median(grey[grey > precise])  # 3e-2 above 1e-2 above 1e-7


def test_prompts_are_no_mathematics(sampled: Callable[..., Path], tmp_path: Path) -> None:
    folder = sampled(tmp_path / "rcm-0-4" / "report" / "1-of-1", "images", 1.0, per_task=1)
    for prompt in folder.iterdir():
        file = prompt / "metadata.jsonl"
        said = json.loads(file.read_text()) | {"prompt": r"$\frac{ $x_ \undefined ^ %s {}"}
        file.write_text(json.dumps(said) + "\n")
    assert figure_samples([folder], prompts=1)


def test_figures_refuse_what_shows_nothing(scores: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples"):
        figure_samples([])
    bare = [{**score, "metrics": {"shapeeval.overall": {"value": 1.0}}} for score in scores["images"]]
    with pytest.raises(UserError, match="diversity"):
        figure_quality_diversity(bare)
    with pytest.raises(UserError, match="metrics"):
        figure_training([tmp_path / "metrics.jsonl"])
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "role": "student", "update": 1}\n')
    with pytest.raises(UserError, match="no losses"):
        figure_training([tmp_path / "metrics.jsonl"])
