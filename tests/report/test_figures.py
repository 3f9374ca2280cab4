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
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image

from rcm.artefact import UserError
from rcm.report.figures import (
    chosen_prompts,
    figure_clips,
    figure_lambda,
    figure_precision,
    figure_quality_diversity,
    figure_rollout,
    figure_samples,
    figure_steps,
    figure_training,
    sample_runs,
)
from rcm.report.look import color_of, strokes
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


# --- Big samples ---------------------------------------------------------------------------------------------------


def big(folder: Path, metadata: dict[str, Any], frames: int, size: tuple[int, int]) -> Path:
    """A prompt with one sample, an image or a clip, whose frames get brighter with time."""
    target = folder / "00000" / "samples"
    target.mkdir(parents=True)
    (target.parent / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
    first, *rest = (Image.new("RGB", size, (0, 50, 4 * index)) for index in range(frames))
    first.save(target / "0000.png", save_all=bool(rest), append_images=rest)
    return folder


def test_big_pictures_are_scaled_down_and_keep_their_shape(tmp_path: Path) -> None:
    include = [{"class": "bench", "count": 1}]
    metadata = {"tag": "single_object", "include": include, "prompt": "a photo of a bench"}
    folder = big(tmp_path / "rcm-0-4" / "report" / "1-of-1", metadata, 1, (1360, 768))
    figure = pixels(figure_samples([folder]))
    rows, columns = np.nonzero((figure == (0, 50, 0)).all(axis=2))
    width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
    assert 240 <= width < figure.shape[1]
    assert abs(width / height - 1360 / 768) < 0.01


def test_long_clips_are_nine_frames_from_first_to_last(tmp_path: Path) -> None:
    metadata = {"prompt": "a boat " * 90, "name": "a boat", "dimension": ["scene"]}  # VBench's: no task, and long
    folder = big(tmp_path / "rcm-0-4" / "report" / "1-of-1", metadata, 49, (832, 480))
    figure = pixels(figure_clips([folder]))
    shown = np.unique(figure[(figure[..., :2] == (0, 50)).all(axis=2)][:, 2])
    assert shown.tolist() == [4 * index for index in range(0, 49, 6)]
    assert figure.shape[0] < 480


def test_prompts_of_vbench_take_turns_by_dimension(tmp_path: Path) -> None:
    folder = tmp_path / "rcm-0-4" / "report" / "1-of-1"
    for index, dimension in enumerate(("scene", "scene", "color", "scene")):
        metadata = {"prompt": f"prompt {index}", "dimension": [dimension]}
        big(tmp_path / "one", metadata, 1, (16, 16))
        shutil.move(tmp_path / "one" / "00000", folder / f"{index:05d}")
    assert chosen_prompts(sample_runs([folder]), 2) == [0, 2]
    assert chosen_prompts(sample_runs([folder]), 3) == [0, 1, 2]


# --- Steps, lambda and rollouts ------------------------------------------------------------------------------------

MEASURES = {"diversity.clip_distance": 0.2, "diversity.dino_distance": 0.3, "diversity.vbench2": 0.4}
PUBLISHED = Path(__file__).parents[2] / "config" / "published"


def stored(folder: Path, model: str, steps: int, value: float, **changes: Any) -> Path:
    """A score of GenEval as a file, of 30 prompts; `changes` are of its evaluator."""
    noise = np.random.default_rng(3).normal(0, 0.1, 30)
    values = {"geneval.overall": value + noise, **{key: x * value + noise / 5 for key, x in MEASURES.items()}}
    metrics = {
        key: {"value": x.mean(), "low": x.mean() - 0.02, "high": x.mean() + 0.02, "kind": "official"}
        for key, x in values.items()
    }
    per_prompt = {"tag": ["counting"] * 30, **{key: x.tolist() for key, x in values.items()}}
    evaluator = {"name": "GenEval (mmdet)", "version": "1", "prompts_sha256": "ab" * 32, "paper": "2B", **changes}
    score = {"model": model, "steps": steps, "media": "images", "n_prompts": 30, "n_samples": 120}
    path = folder / f"{model}-{steps}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**score, "metrics": metrics, "evaluator": evaluator, "per_prompt": per_prompt}))
    return path


def trained(folder: Path, model: str, balance: float | None, updates: int = 5) -> Path:
    """Metrics of a student as a file: DMD joins at its third update."""
    rows = [
        {"role": "student", "update": update, **({"balance": balance} if balance and update > 2 else {})}
        for update in range(1, updates + 1)
    ]
    path = folder / "images" / model / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"role": "critic", "update": 99}]))
    return path


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that is written on the figures that are drawn."""
    found: list[str] = []
    draw = Text.draw

    def noting(self: Text, *arguments: Any, **options: Any) -> None:
        if self.get_visible():
            found.append(self.get_text())
        draw(self, *arguments, **options)

    monkeypatch.setattr(Text, "draw", noting)
    return found


@pytest.fixture
def students(tmp_path: Path) -> list[Path]:
    """Scores of the teacher and of two students at 1, 2 and 4 steps."""
    made = [stored(tmp_path, f"{m}-0", k, 0.6 + 0.05 * k) for m in ("dmd2", "rcm") for k in (1, 2, 4)]
    return [*made, stored(tmp_path, "teacher", 35, 0.9)]


def test_steps_names_the_teacher_the_evaluator_and_what_the_paper_printed(
    students: list[Path], words: list[str]
) -> None:
    png = figure_steps(students, PUBLISHED / "table1.csv")
    assert {"GenEval (mmdet)\noverall", "CLIP distance", "VBench-2.0 diversity", "Teacher, 35 steps"} <= {*words}
    assert {"As printed in the paper", "GenEval overall", "35×2\nteacher", "0.6B", "2B", "14B"} <= {*words}
    assert figure_steps(students[::-1], PUBLISHED / "table1.csv") == png
    assert {0xCC79A7, 0x009E73} <= colours(png)
    words.clear()
    figure_steps(students)
    assert "As printed in the paper" not in words


def test_steps_of_tiny_show_the_vendi_score_alone(
    scores: dict[str, list[dict[str, Any]]], tmp_path: Path, words: list[str]
) -> None:
    paths = []
    for score in [*scores["images"], *scores["clips"]]:
        paths.append(tmp_path / str(score["media"]) / f"{score['model']}-{score['steps']}.json")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_text(json.dumps(score))
    figure_steps(paths)
    assert {"Images", "Clips", "ShapeEval overall", "Vendi"} <= {*words}
    assert not {"Cell entropy", "Ground truth"} & {*words}


def test_steps_refuse_what_does_not_compare(students: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="about clips"):
        figure_steps(students, PUBLISHED / "table2.csv")
    with pytest.raises(UserError, match="column 'group'"):
        figure_steps(students, PUBLISHED / "figure7.csv")
    with pytest.raises(UserError, match="scores of students"):
        figure_steps([students[-1]])
    with pytest.raises(UserError, match=r"two scores of rcm-0 at 4 steps"):
        figure_steps([*students, stored(tmp_path / "again", "rcm-0", 4, 0.8)])
    other = stored(tmp_path / "other", "scm-0", 4, 0.7, name="GenEval (HF Mask2Former)")
    with pytest.raises(UserError, match=r"HF Mask2Former.*mmdet"):
        figure_steps([*students, other])
    with pytest.raises(UserError, match=r"in prompts.*cdcdcdcdcdcd"):
        figure_steps([*students, stored(tmp_path / "prompts", "scm-0", 4, 0.7, prompts_sha256="cd" * 32)])
    with pytest.raises(UserError, match=r"what is missing.*0003.png; nothing"):
        figure_steps([*students, stored(tmp_path / "part", "scm-0", 4, 0.7, missing=["00001/samples/0003.png"])])
    with pytest.raises(UserError, match=r"neither a score"):
        figure_steps([tmp_path / "picture.png"])


def test_sigma_max_is_named_and_must_be_one(tmp_path: Path, words: list[str]) -> None:
    low, high = ({"sampling": {"sigma_max": value}} for value in (80.0, 1600.0))
    teacher = stored(tmp_path, "teacher", 35, 0.9, sampling={"sigma_max": 5000.0})  # its sampler's, not the students'
    first = stored(tmp_path, "rcm-0", 4, 0.8, **low)
    figure_steps([teacher, first])
    assert any("= 80" in word for word in words)
    with pytest.raises(UserError, match="σ_max and cannot be compared: 1600; 80"):
        figure_steps([teacher, first, stored(tmp_path, "dmd2-0", 4, 0.8, **high)])


@pytest.fixture
def sweep(tmp_path: Path) -> list[Path]:
    """Scores and metrics of figure_lambda; λ√D is 7.35 for rCM."""
    values = {"scm-0": 0.6, "rcm-lambda-0.1-0": 0.7, "rcm-0": 0.8, "rcm-lambda-10-0": 0.81}
    balances = {"scm-0": None, "rcm-lambda-0.1-0": 0.735, "rcm-0": 7.35, "rcm-lambda-10-0": 73.5}
    made = [stored(tmp_path, model, 4, value) for model, value in values.items()]
    return [*made, *(trained(tmp_path, model, balance) for model, balance in balances.items())]


def test_lambda_is_drawn_on_what_training_noted(sweep: list[Path], words: list[str]) -> None:
    png = figure_lambda(sweep, PUBLISHED / "figure7.csv")
    assert {"0\npure\nsCM", "0.1×\n0.735", "1×\n7.35", "10×\n73.5"} <= {*words}
    assert {"As printed in the paper", "VBench total, %", "0.001", "GenEval (mmdet)\noverall"} <= {*words}
    assert figure_lambda(sweep[::-1], PUBLISHED / "figure7.csv") == png
    words.clear()
    figure_lambda(sweep)
    assert "VBench total, %" not in words


def test_lambda_has_a_panel_a_measure_with_the_teacher_across(
    sweep: list[Path], tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[float] = []
    monkeypatch.setattr(Axes, "axhspan", lambda _, low, high, **__: spans.append(high - low))
    png = figure_lambda([*sweep, stored(tmp_path, "teacher", 35, 0.9)])
    assert spans == pytest.approx([0.04] * 4)  # quality, CLIP, DINO and VBench-2.0
    assert {"CLIP distance", "DINO distance", "VBench-2.0 diversity", "Teacher, 35 steps", "sCM", "rCM"} <= {*words}
    assert {0x0072B2, 0x009E73} <= colours(png) and not {0xD55E00, 0xCC79A7} & colours(png)  # sCM, rCM; DMD, DMD2


def test_lambda_says_what_is_missing(sweep: list[Path], tmp_path: Path) -> None:
    def without(name: str) -> list[Path]:
        return [path for path in sweep if name not in str(path.relative_to(tmp_path))]

    with pytest.raises(UserError, match=r"rcm-lambda-10 is not known: none of the inputs is .*/images/rcm-lambda-10-"):
        figure_lambda(without("rcm-lambda-10-0/metrics"))
    with pytest.raises(UserError, match="needs scores of rcm for images"):
        figure_lambda(without("rcm-0"))
    with pytest.raises(UserError, match="of images there are 2, 4"):
        figure_lambda([*sweep, stored(tmp_path, "rcm-0", 2, 0.8)])
    with pytest.raises(UserError, match="figure_lambda needs scores"):
        figure_lambda([path for path in sweep if path.suffix == ".jsonl"])
    with pytest.raises(UserError, match="lacks the column 'lambda'"):
        figure_lambda(sweep, PUBLISHED / "table2.csv")


def test_rollouts_print_paired_differences(tmp_path: Path, words: list[str]) -> None:
    values = {"rcm-0": 0.8, "rcm-fixed-rollout-0": 0.75, "dmd-0": 0.7, "dmd-random-rollout-0": 0.68}
    paths = [stored(tmp_path, model, 4, value) for model, value in values.items()]
    paths += [trained(tmp_path, model, None, 7) for model in ("rcm-0", "rcm-fixed-rollout-0")]
    figure_rollout(paths)
    assert {"4\n+0.050\n[+0.050, +0.050]", "4\n−0.020\n[−0.020, −0.020]"} <= {*words}  # noise by prompt is the same
    assert {"rCM, 7 student updates", "DMD"} <= {*words}
    assert {"Random rollout times", "Fixed rollout times", "CLIP distance"} <= {*words}


def test_no_difference_of_rollouts_has_no_sign(tmp_path: Path, words: list[str]) -> None:
    values = {"rcm-0": 0.8 - 1e-7, "rcm-fixed-rollout-0": 0.8}
    figure_rollout([stored(tmp_path, model, 4, value) for model, value in values.items()])
    assert "4\n0.0000\n[0.0000, 0.0000]" in words


def test_rollouts_without_values_by_prompt_are_not_paired(tmp_path: Path, words: list[str]) -> None:
    paths = [stored(tmp_path, model, 4, value) for model, value in (("rcm-0", 0.8), ("rcm-fixed-rollout-0", 0.7))]
    for path in paths:
        score = json.loads(path.read_text())
        path.write_text(json.dumps({**score, "per_prompt": {"tag": score["per_prompt"]["tag"]}}))
    figure_rollout(paths)
    assert "4\n+0.100\n[+0.072, +0.128]\nnot paired" in words  # 0.02 √2 to both sides


def test_rollouts_are_compared_at_equal_updates(tmp_path: Path) -> None:
    models = ("rcm-0", "rcm-fixed-rollout-0")
    paths = [stored(tmp_path, model, 4, 0.8) for model in models]
    with pytest.raises(UserError, match=r"rcm has \[5\] and rcm-fixed-rollout has \[6\] student updates"):
        figure_rollout([*paths, *(trained(tmp_path, model, None, 5 + i) for i, model in enumerate(models))])
    with pytest.raises(UserError, match="rcm and rcm-fixed-rollout or of dmd-random-rollout and dmd"):
        figure_rollout(paths[:1])


def test_quality_and_diversity_leaves_variants_out_and_names_the_measure(sweep: list[Path], words: list[str]) -> None:
    read = [json.loads(path.read_text()) for path in sweep if path.suffix == ".json"]
    png = figure_quality_diversity(read)
    assert "GenEval (mmdet)\noverall" in words and "rCM (10 λ)" not in words
    assert png == figure_quality_diversity([score for score in read if "lambda" not in score["model"]])


def test_quality_and_diversity_take_seeds_together(tmp_path: Path, words: list[str], points: list[Any]) -> None:
    paths = [stored(tmp_path, f"rcm-{seed}", 4, 0.7 + 0.1 * seed) for seed in (0, 1)]
    read = [json.loads(path.read_text()) for path in [*paths, stored(tmp_path, "rcm-0", 1, 0.6)]]
    figure_quality_diversity(read)
    means = [np.mean([score["metrics"]["geneval.overall"]["value"] for score in some]) for some in (read[2:], read[:2])]
    assert [(y, size) for _, y, size in points[:2]] == [(pytest.approx(means[0]), 3.2), (pytest.approx(means[1]), 6.4)]
    assert len(points) == 2 * len(MEASURES)
    assert {"1 step", "4 steps"} <= {*words} and not {"1", "4"} & {*words}


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Place and size of every point with intervals that is drawn."""
    found: list[Any] = []
    draw = Axes.errorbar

    def noting(self: Axes, x: Any, y: Any, **options: Any) -> Any:
        found.append((x, y, options["markersize"]))
        return draw(self, x, y, **options)

    monkeypatch.setattr(Axes, "errorbar", noting)
    return found


def test_variants_have_the_colour_of_their_method_and_a_line_of_their_own(metrics: list[Path], tmp_path: Path) -> None:
    names = ["dmd", "dmd-random-rollout", "rcm-lambda-0.1", "rcm", "rcm-lambda-10", "rcm-lambda-100"]
    names.append("rcm-fixed-rollout")
    lines = strokes(names)
    assert lines["dmd"] == lines["rcm"] == "-"
    assert len({str(lines[name]) for name in names if name.startswith("rcm")}) == 5
    assert color_of("rcm-lambda-10") == color_of("rcm") and color_of("dmd-random-rollout") == color_of("dmd")
    (rcm,) = (path for path in metrics if path.parent.name == "rcm-0")
    variant = tmp_path / "rcm-lambda-10-0" / "metrics.jsonl"
    variant.parent.mkdir()
    shutil.copy(rcm, variant)
    assert figure_training([variant]) != figure_training([rcm])
    assert 0x009E73 in colours(figure_training([variant]))


def test_files_that_are_no_scores_or_metrics_are_named(sweep: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "rcm-0-4.json"
    broken.write_text('{"model": "rcm-0", "steps": 4}')
    with pytest.raises(UserError, match=r"rcm-0-4\.json holds no score"):
        figure_steps([broken])
    path = next(path for path in sweep if path.suffix == ".jsonl")
    path.write_text("[1, 2]\n")
    for draw in (figure_lambda, figure_rollout, figure_training):
        with pytest.raises(UserError, match=r"line 1 of the metrics .*metrics\.jsonl is no JSON object"):
            draw([path] if draw is figure_training else [other for other in sweep if other != broken])
