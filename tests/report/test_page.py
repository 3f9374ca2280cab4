"""The page is whole: it needs no network, embeds what it shows, and says what the files say."""

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcm.artefact import UserError, sha256_json
from rcm.cli.score import _configuration
from rcm.report.figures import figure_quality_diversity, figure_samples
from rcm.report.legends import LEGENDS
from rcm.report.page import _animated, _belongs, _media, _reduced, report_page
from rcm.report.scores import CONTROLS
from rcm.report.tables import make_table

PAPER = Path(__file__).parents[2] / "config" / "published"
VOID = {"meta", "img", "source", "br", "link"}
HOSTILE = "a photo of <script>alert('&')</script> {{ 7 * 7 }}"


class Reader(HTMLParser):
    """Collects addresses, text and tags; fails where tags do not match."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "poster")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def record(root: Path, path: str, stage: str, *inputs: str, seconds: float = 3.0, facts: Any = None) -> None:
    """Provenance of an artefact whose content is named by its path."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)

    def sha(name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()

    said = {"artefact": path, "sha256": sha(path), "stage": stage, "code_sha256": "c0de" * 16, "seed": 0}
    said |= {"config": {}, "config_sha256": sha256_json({})}
    said |= {"inputs": [{"path": name, "sha256": sha(name)} for name in inputs]}
    target.with_name(target.name + ".prov.json").write_text(json.dumps(said))
    run = {"artefact": path, "sha256": sha(path), "stage": stage, "started": "2025-01-01T00:00:00+00:00"}
    run |= {
        "wall_seconds": seconds,
        "facts": facts or {},
        "peak_mib": 812.0,
        "host": {"system": "Linux", "cpu": "a processor", "cores": 2},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": {"commit": "c0ffee" * 6, "dirty": stage == "sample"},
        "gpu_hours": 0.5,
    }
    target.with_name(target.name + ".run.json").write_text(json.dumps(run))


@pytest.fixture(scope="module")
def tree(
    tmp_path_factory: pytest.TempPathFactory,
    scores: dict[str, list[dict[str, Any]]],
    image_samples: list[Path],
    sampled: Callable[..., Path],
) -> Path:
    """Results, data and logs as the workflow leaves them, small."""
    root = tmp_path_factory.mktemp("tree")
    results = root / "results"
    for media, found in scores.items():
        (results / media / "scores").mkdir(parents=True)
        for score in found:
            path = f"results/{media}/scores/{score['model']}-{score['steps']}.json"
            (root / path).write_text(json.dumps(score))
            samples = f"data/{media}/samples/{score['model']}-{score['steps']}/report/1-of-1"
            record(root, path, "evaluate", samples)
            record(root, samples, "sample", "data/images/rcm-0/student.safetensors")
    for model, seconds in (("teacher-20", 8.0), ("rcm-0-4", 2.0)):
        for part in ("1-of-2", "2-of-2"):
            path = f"data/images/samples/{model}/report/{part}"
            record(root, path, "sample", facts={"samples": 100, "sampling_seconds": seconds})
    record(root, "data/images/rcm-0/student.safetensors", "distill", "data/checkpoints/transformer.pth", seconds=300)
    (results / "tables").mkdir()
    for name, media in (("table1", "images"), ("table2", "clips")):
        models = [s for s in scores[media] if s["model"] not in CONTROLS]
        controls = [s for s in scores[media] if s["model"] in CONTROLS]
        (results / "tables" / f"{name}.csv").write_text(
            make_table(name, models, controls, PAPER / f"{name}.csv")["csv"]
        )
    (results / "figures").mkdir()
    (results / "figures" / "figure_samples.png").write_bytes(figure_samples(image_samples, prompts=2))
    (results / "figures" / "figure_quality_diversity.png").write_bytes(figure_quality_diversity(scores["images"]))
    for run in ("teacher-20", "rcm-0-4", "oracle-0"):
        folder = sampled(root / "data/clips/samples" / run / "report/1-of-1", "clips", 1.0, per_task=1)
        first = folder / "00000/metadata.jsonl"
        first.write_text(json.dumps(json.loads(first.read_text()) | {"prompt": HOSTILE}) + "\n")
    for part, seconds in (("1-of-2", 70.5), ("2-of-2", 71.5)):
        path = root / f"logs/benchmarks/synthesize/images-{part}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"s\th:m:s\tmax_rss\tmax_vms\n{seconds}\t0:01:10\t901.5\t-\n")
    return root


def shown(tree: Path, pattern: str = "*") -> list[Any]:
    found = sorted((tree / "results").glob(f"*/scores/{pattern}.json"))
    return [json.loads(path.read_text()) for path in found if path.name.count(".") == 1]


def page_of(tree: Path) -> str:
    configuration = [("Configuration", "seed: 0\nobjective: {name: rcm}\n")]
    return report_page(shown(tree), [tree / "results", tree / "data", tree / "logs"], configuration=configuration)


@pytest.fixture(scope="module")
def page(tree: Path) -> str:
    return page_of(tree)


@pytest.fixture(scope="module")
def read(page: str) -> Reader:
    return Reader(page)


def test_nothing_comes_from_outside(page: str, read: Reader) -> None:
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in read.addresses)
    style = re.sub(r"data:[^\"]*", "", page)
    assert not re.search(r"https?:|@import|url\(|<script|<link|<iframe", style)


def test_every_anchor_leads_somewhere(read: Reader) -> None:
    assert {address[1:] for address in read.addresses if address.startswith("#")} <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))


def test_figures_are_embedded_as_they_are(tree: Path, read: Reader) -> None:
    for path in (tree / "results/figures").glob("*.png"):
        assert "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() in read.addresses


def test_clips_move_and_have_a_still_for_paper(read: Reader) -> None:
    images = [Image.open(io.BytesIO(base64.b64decode(a.partition(",")[2]))) for a in read.addresses if "data:" in a]
    counts = [getattr(image, "n_frames", 1) for image in images if image.size == (48, 48)]
    assert max(counts) == 9
    assert len(counts) == 2 * 6 * 2  # moving and still of six prompts and two models; the control is not shown


def test_prompts_are_text(page: str, read: Reader) -> None:
    assert HOSTILE in read.text
    assert "<script>" not in page
    assert "script" not in read.tags


def test_numbers_are_those_of_the_files(tree: Path, read: Reader) -> None:
    score = json.loads((tree / "results/images/scores/rcm-0-4.json").read_text())
    entry = score["metrics"]["shapeeval.overall"]
    assert f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]" in read.text
    assert "GenEval, as printed in Table 1 of the rCM paper" in read.text


def test_findings_are_told(read: Reader) -> None:
    assert "With four steps, rCM is more diverse than DMD." in read.text
    assert re.search(r"(not )?shown|contradicted", read.text)


def test_times_come_from_benchmarks_and_else_from_runs(read: Reader) -> None:
    assert "synthesize 2 142.0 s 71.5 s 902" not in read.text  # more than two minutes are given in minutes
    assert "synthesize 2 2.4 min 71.5 s 902" in read.text
    assert "distill 1 5.0 min 5.0 min 812" in read.text
    assert "2 cores of a processor" in read.text


def test_speed_is_told_beside_the_teacher(read: Reader) -> None:
    assert "images Teacher 20 80.0 images rCM 4 20.0 4.0 ×" in read.text


def test_each_score_is_followed_to_the_checkpoint(read: Reader) -> None:
    chain = read.text.partition("images/scores/rcm-0-4.json from")[2]
    checkpoint = hashlib.sha256(b"data/checkpoints/transformer.pth").hexdigest()[:12]
    names = ["results/images/scores/rcm-0-4.json", "data/images/samples/rcm-0-4/", "student.safetensors", checkpoint]
    found = [chain.index(name) for name in names]
    assert found == sorted(found)


def test_each_row_of_the_tables_has_its_origins_and_its_cost(tree: Path, read: Reader, tmp_path: Path) -> None:
    """evaluate and sample took 3 s each, of which one on a changed tree, distill 300 s, half a GPU-hour each."""
    checkpoint = hashlib.sha256(b"data/checkpoints/transformer.pth").hexdigest()[:8]
    row = f"rCM, 4 {checkpoint} {sha256_json({})[:8]} 0 c0dec0de "
    assert row + "c0ffeec0, c0ffeec0 + changes 5.1 min 812 1.5" in read.text
    assert "All ran on a processor with python 3.11.7, torch 2.13.0." in read.text
    assert re.search(r"rcm why results/(images|clips)/scores/rcm-0-4.json", read.text)
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy)
    (copy / "data/images/rcm-0/student.safetensors.run.json").write_text("{")  # nothing rests on it
    text = Reader(page_of(copy)).text
    assert row + "c0ffeec0, c0ffeec0 + changes ≥ 6.0 s ≥ 812 ≥ 1" in text and "of some of them no .run.json" in text
    for path in copy.rglob("*.run.json"):  # as after `dvc pull`
        path.unlink()
    assert row + "not known here: no .run.json" in Reader(page_of(copy)).text
    (copy / "data/images/rcm-0/student.safetensors.prov.json").write_text("{}")
    with pytest.raises(UserError, match=r"student\.safetensors\.prov\.json is damaged"):
        page_of(copy)


def test_same_files_same_page(tree: Path, page: str) -> None:
    assert page_of(tree) == page


def test_a_page_of_little_is_still_a_page(tmp_path: Path, tree: Path) -> None:
    Reader(report_page([], [tmp_path]))
    assert "There are no scores" in Reader(report_page(shown(tree, "rcm-0-4"), [tmp_path])).text


def test_the_page_is_about_the_given_scores_only(tree: Path) -> None:
    images = [s for s in shown(tree) if s["media"] == "images" and s["model"] != "rcm-0"]
    page = Reader(report_page(images, [tree / "results", tree / "data", tree / "logs"]))
    assert not page.text.count("rcm-0-4")  # neither a chain of provenance
    assert "images Teacher 20 80.0" in page.text and "rCM 4 20.0" not in page.text  # nor a speed
    assert {"images", "table1"} <= set(page.ids) and not {"clips", "table2"} & set(page.ids)


def test_the_page_of_a_real_scale_names_its_evaluators(
    genevals: list[dict[str, Any]], vbenches: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "tables").mkdir()
    for name, found in (("table1", genevals), ("table2", vbenches), ("table3", [])):
        made = make_table(name, found, [], PAPER / f"{name}.csv")["csv"]
        (tmp_path / f"tables/{name}.csv").write_text(made)
    page = Reader(report_page([*genevals, *vbenches], [tmp_path]))
    assert not re.search("ShapeEval|ShapeBench|coloured shapes|ground truth", page.text, re.IGNORECASE)
    assert "GenEval (HF Mask2Former) overall, interval 0.806 to 0.846" in page.text  # the teacher's tile
    assert "rCM, 4 steps 0.842 VBench (official code) total, interval 0.822 to 0.862" in page.text
    assert (
        "Images: DMD2 at 4 steps and rCM at 1 and 4 steps beside the teacher, 553 prompts, 2212 samples;" in page.text
    )
    assert "944 prompts, 6220 samples" in page.text
    assert "not reproduced: the TI2V network is not part of this version" in page.text
    assert "Prompts: SHA-256 5c48e0813e81 as they were scored, from evaluation_metadata.jsonl" in page.text
    assert {"table1", "table2", "table3"} <= set(page.ids)


def test_totals_of_vbench_have_a_scale_of_their_own(vbenches: list[dict[str, Any]]) -> None:
    (overview,) = _media(vbenches)[0]["overviews"]
    assert overview["axis"] == ["0.75", "0.9"]  # intervals reach from 0.790 to 0.8621
    assert overview["place"](0.825) == "50.00"


def test_scores_that_cannot_be_compared_have_overviews_of_their_own(genevals: list[dict[str, Any]]) -> None:
    official = [s | {"evaluator": s["evaluator"] | {"name": "GenEval (mmdet)"}} for s in genevals]
    (images,) = _media([*genevals, *official])
    assert [(o["name"], len(o["marks"])) for o in images["overviews"]] == [
        *(("GenEval (HF Mask2Former) overall", 4), ("GenEval (mmdet) overall", 4))
    ]
    native = [s | {"metrics": {"vbench_native.subject_consistency": {"value": 0.9}}} for s in genevals]
    assert _media(native)[0]["overviews"] == []  # nothing sums them up


def test_a_second_sigma_max_is_a_second_overview(genevals: list[dict[str, Any]]) -> None:
    def at(start: float, score: dict[str, Any]) -> dict[str, Any]:
        sampling = score["evaluator"]["sampling"] | {"sigma_max": start}
        return score | {"evaluator": score["evaluator"] | {"sampling": sampling}}

    teacher, *students = genevals
    scores = [teacher, *students, *(at(80.0, score) for score in students)]
    (images,) = _media(scores)
    assert [[mark.name for mark in o["marks"]] for o in images["overviews"]] == 2 * [
        ["Teacher, 35", "DMD2, 4", "rCM, 1", "rCM, 4"]
    ]
    assert [overview["apart"] for overview in images["overviews"]] == ["σ_max 1600", "σ_max 80"]
    assert "which differ in what is here: σ_max 1600." in Reader(report_page(scores, [])).text


def test_tiles_are_of_all_seeds(scored: Callable[..., dict[str, Any]]) -> None:
    group = [scored("teacher", 20, "images", 0.9), *(scored(f"rcm-{s}", 4, "images", 0.8, seed=s) for s in (0, 1))]
    (overview,) = _media(group)[0]["overviews"]
    values = [score["metrics"]["shapeeval.overall"]["value"] for score in group]
    (tile,) = overview["students"]
    assert tile.overall.value == pytest.approx(np.mean(values[1:])) and values[1] != values[2]
    assert tile.share.value == pytest.approx(np.mean(values[1:]) / values[0])
    assert "rCM, 4 steps, 2 seeds" in Reader(report_page(group, [])).text


def test_ablations_are_no_part_of_what_is_said_first(genevals: list[dict[str, Any]]) -> None:
    variants = [{**genevals[2], "model": f"{name}-0"} for name in ("rcm-lambda-0.1", "dmd-random-rollout")]
    lead = Reader(report_page([*genevals, *variants], [])).text.partition("Every number")[0]
    assert "DMD2 at 4 steps and rCM at 1 and 4 steps beside the teacher" in lead
    assert "λ" not in lead and "random" not in lead


def test_every_figure_stands_on_the_page_once_with_scores_or_without(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    names = ("samples", "clips", "quality_diversity", "steps", "lambda", "rollout", "training", "precision", "own")
    for index, name in enumerate(names):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"figures/figure_{name}.png")
    images = [s for s in shown(tree) if s["media"] == "images"]
    for scores in ([], images, shown(tree)):
        ids = [name for name in Reader(report_page(scores, [tmp_path])).ids if name.startswith("figure_")]
        assert sorted(ids) == sorted(f"figure_{name}" for name in names)
    assert all(f"figure_{name}" in LEGENDS for name in names[:-1])
    assert "λ = 0 is sCM alone" in LEGENDS["figure_lambda"]
    assert "ground" not in LEGENDS["figure_quality_diversity"]  # which only the tiny world has


def test_big_clips_are_reduced() -> None:
    clip = np.zeros((81, 480, 832, 3), dtype=np.uint8)
    clip[-1] = 200
    reduced = _reduced(clip)
    assert reduced.shape == (16, 152, 264, 3)
    assert reduced[-1].min() == 200 and reduced[0].max() == 0  # the first frame and the last
    with Image.open(io.BytesIO(_animated(reduced, exact=False))) as made:
        assert (made.format, made.size, made.is_animated) == ("WEBP", (264, 152), True)


@pytest.mark.parametrize(
    ("stage", "path", "belongs"),
    [
        ("sample", "images-rcm-0-4-report-1-of-2.tsv", True),
        ("sample", "images-rcm-0-2-report-1-of-2.tsv", False),
        ("sample", "clips-rcm-0-4-report-1-of-2.tsv", False),
        ("sample", "images-oracle-report-1-of-2.tsv", True),
        ("sample", "/data/images/samples/rcm-0-4/report/1-of-2", True),
        ("sample", "data/tiny/images/samples/rcm-1-4/report/1-of-2", False),
        ("evaluate", "results/tiny/images/scores/rcm-0-4.json", True),
        ("evaluate", "images-rcm-0-40.tsv", False),
        ("distill", "images-rcm-0.tsv", True),
        ("distill", "data/tiny/images/rcm-00/dcp", False),
        ("synthesize", "images-1-of-2.tsv", True),
        ("measure", "images-rcm-0-4-report-1-of-2.tsv", True),
        ("measure", "results/big/images/measured/rcm-1-4/report/1-of-2.jsonl", False),
        ("evaluate", "results/big/images/text/rcm-0-4.json", True),
        ("official", "results/big/images/official/rcm-0-2.jsonl", False),
        ("throughput", "results/big/images/throughput/rcm-0-4.json", True),
    ],
)
def test_what_is_of_other_models_is_left_out(stage: str, path: str, belongs: bool) -> None:
    scores = [{"media": "images", "model": model, "steps": steps} for model, steps in (("rcm-0", 4), ("oracle", 0))]
    assert _belongs(stage, path, scores) == belongs


def test_samples_in_folders_of_other_names_have_no_speed(tree: Path, tmp_path: Path) -> None:
    for path in ("mine", "a/b/c/d", "images/samples/rcm-0/report/1-of-2"):
        record(tmp_path, path, "sample", facts={"samples": 1, "sampling_seconds": 1.0})
    report_page(shown(tree), [tmp_path])


def test_the_configuration_is_of_both_media_and_all_methods() -> None:
    scores = [{"model": model} for model in ("teacher", "dmd-0", "rcm-0", "oracle")]
    built, images, clips = _configuration("tiny", ["teacher.steps=7"], scores).values()
    assert built["scale"] == "tiny"
    assert (images["frames"], images["teacher"]["steps"]) == (1, 7)
    assert [objective["name"] for objective in images["objectives"].values()] == ["dmd", "rcm"]
    assert clips["frames"] == 9 and "teacher" not in clips


def test_a_folder_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        report_page([], [tmp_path / "nowhere"])
