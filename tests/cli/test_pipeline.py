"""All stages one after the other in miniature, with random weights; and what `sample` promises."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rcm.artefact import content_sha256, sha256_file
from rcm.checkpoints import load_dcp, load_pth, read_export, save_dcp
from rcm.cli import main
from rcm.cli.models import noise_of
from rcm.data.shards import manifest_path, read_shards
from rcm.evaluation.geneval import shapeeval
from rcm.training.signals import EXIT_INTERRUPTED

from .conftest import SMALL, Mini, Run

QUICK = [
    *("distillation.student_updates=3", "distillation.batch=4", "distillation.preview_every=3"),
    *("distillation.scm_only=1", "distillation.critic_warmup=1"),
]
SUITE = ["suite=report", "suites.report.per_task=1", "suites.report.samples=2"]


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Every sample of a folder by its name."""
    paths = sorted(folder.glob("*/samples/*.png"))
    return {path.relative_to(folder).as_posix(): np.array(Image.open(path), dtype=int) for path in paths}


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> int:
    assert a.keys() == b.keys()
    return max(int(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.fixture(scope="session")
def prompts(mini: Mini) -> Path:
    path = mini.folder / "report.jsonl"
    assert main(["prompts", *SUITE, "--out", str(path)]) == 0
    return path


def test_from_download_to_scores(mini: Mini, prompts: Path, run: Run, tmp_path: Path) -> None:
    checkpoint, teacher, train = tmp_path / "transformer.pth", tmp_path / "teacher", tmp_path / "train.jsonl"
    source, digest = f"checkpoints.transformer.source={mini.transformer}", sha256_file(mini.transformer)
    run("download", source, f"checkpoints.transformer.sha256={digest}", "--name", "transformer", "--out", checkpoint)
    run("convert", *SMALL, "--checkpoint", checkpoint, "--out", teacher)
    for name, value in load_pth(mini.transformer).items():
        assert torch.equal(load_dcp(teacher)[name], value)

    run("prompts", "suite=train", "suites.train.prompts=8", "--out", train)
    shards = [tmp_path / f"{k}-of-2.tar" for k in (1, 2)]
    for shard in shards:
        part = ("--shard", shard.stem, "--out", shard)
        run("synthesize", *SMALL, "teacher.steps=3", "--teacher", teacher, "--prompts", train, *part)
    captions = [json.loads(line)["prompt"] for line in train.read_text().splitlines()]
    assert [sample.prompt for sample in read_shards(shards).samples] == captions

    resume, student, previews = tmp_path / "resume", tmp_path / "dcp", tmp_path / "previews"
    outputs = ("--out", student, "--metrics", tmp_path / "metrics.jsonl", "--previews", previews)
    distill = ("distill", *SMALL, *QUICK, "--teacher", teacher, "--data", *shards, "--codec", mini.codec)
    run(*distill, "--resume", resume, *outputs)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["role"] == "student" for row in rows) == 3
    assert [path.name for path in previews.iterdir()] == ["000003.png"] and not resume.exists()

    export = tmp_path / "student.safetensors"
    run("export", *SMALL, "--student", student, "--out", export)
    state, settings = read_export(export)
    assert settings["sampler"]["mid_times"] and settings["objective"]["name"] == "rcm"
    for name, value in load_dcp(student).items():
        assert torch.equal(state[name], value) and torch.equal(load_pth(export.with_suffix(".pth"))[name], value)

    samples = tmp_path / "samples" / "rcm-0-4" / "report" / "1-of-1"
    common = ("--codec", mini.codec, "--prompts", prompts, "--part", "1-of-1")
    run("sample", *SUITE, "--checkpoint", export, *common, "--steps", 4, "--out", samples)
    scores, results = tmp_path / "rcm-0-4.json", tmp_path / "results.jsonl"
    written = ("--out", scores, "--results", results, "--metrics", tmp_path / "metrics.json")
    run("evaluate", "--samples", samples, "--diversity", samples, *written)
    score = json.loads(scores.read_text())
    first = json.loads((tmp_path / "metrics.json").read_text())
    assert first["shapeeval.overall"] == score["metrics"]["shapeeval.overall"]["value"] and len(first) < 8
    assert (score["model"], score["steps"], score["media"], score["n_samples"]) == ("rcm-0", 4, "images", 12)
    assert 0 <= score["metrics"]["shapeeval.overall"]["value"] <= 1
    assert len(results.read_text().splitlines()) == 12

    for made in (
        checkpoint,
        teacher,
        train,
        *shards,
        student,
        previews,
        export,
        samples,
        scores,
        tmp_path / "metrics.json",
    ):
        record = json.loads(Path(f"{made}.prov.json").read_text())
        assert record["stage"] in (
            "download",
            "convert",
            "prompts",
            "synthesize",
            "distill",
            "export",
            "sample",
            "evaluate",
        )
        assert str(tmp_path) not in Path(f"{made}.prov.json").read_text().replace(json.dumps(source)[1:-1], "")


def test_distill_repeats_itself_after_an_interruption(
    mini: Mini, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, train, shard = tmp_path / "teacher", tmp_path / "train.jsonl", tmp_path / "1-of-1.tar"
    run("convert", *SMALL, "--checkpoint", mini.transformer, "--out", teacher)
    run("prompts", "suite=train", "suites.train.prompts=4", "--out", train)
    part = ("--shard", "1-of-1", "--out", shard)
    run("synthesize", *SMALL, "teacher.steps=1", "--teacher", teacher, "--prompts", train, *part)

    def arguments(name: str) -> list[str]:
        outputs = {"out": "dcp", "metrics": "metrics.jsonl", "previews": "previews", "resume": "resume"}
        named = [word for option, file in outputs.items() for word in (f"--{option}", tmp_path / name / file)]
        return [str(word) for word in ("distill", *SMALL, *QUICK, "--teacher", teacher, "--data", shard, *named)] + [
            "--codec",
            str(mini.codec),
        ]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # but for the shards, which are hashed once, where they are read
        hashed: list[str] = []
        patch.setattr("rcm.artefact.sha256_file", lambda path: hashed.append(path.name) or sha256_file(path))
        run(*arguments("whole"))
    assert shard.name not in hashed
    inputs = json.loads((tmp_path / "whole/dcp.prov.json").read_text())["inputs"]
    others = [sha256_file(path) for path in (shard, manifest_path(shard), mini.codec)]
    assert [entry["sha256"] for entry in inputs] == [content_sha256(teacher), *others]
    with monkeypatch.context() as patch:
        patch.setattr("rcm.cli.train.save_dcp", interrupted)
        assert main(arguments("broken")) == 130
    assert not (tmp_path / "broken" / "dcp").exists() and (tmp_path / "broken" / "resume").exists()
    with monkeypatch.context() as patch:  # before the loop nothing is lost, behind it all is kept
        patch.setattr("rcm.cli.train.open_networks", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        closed: list[bool] = []
        patch.setattr("rcm.parallel.Mesh.close", lambda _: closed.append(True))
        with pytest.raises(SystemExit) as leaving:
            main(arguments("broken"))
        assert (leaving.value.code, closed) == (EXIT_INTERRUPTED, [True])
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    with monkeypatch.context() as patch:
        save = lambda *options: os.kill(os.getpid(), signal.SIGTERM) or save_dcp(*options)  # noqa: E731
        patch.setattr("rcm.cli.train.save_dcp", save)
        said = run(*arguments("broken"))
        assert said.count("interrupted before the first iteration: nothing is lost") == 1
        assert "goes on after iteration" in said
    for made in ("dcp", "previews", "metrics.jsonl"):
        assert content_sha256(tmp_path / "whole" / made) == content_sha256(tmp_path / "broken" / made)
    runs = [tmp_path / name / "metrics.jsonl.run.json" for name in ("whole", "broken")]
    whole, broken = (json.loads(path.read_text()) for path in runs)
    assert (whole["attempts"], broken["attempts"]) == (1, 3)
    earlier = sum(attempt["wall_seconds"] for attempt in broken["earlier"])
    assert 0 < earlier < broken["wall_seconds"] and broken["gpu_hours"] == 0 < broken["core_hours"]


def test_parts_and_models_share_their_noise(mini: Mini, prompts: Path, run: Run, tmp_path: Path) -> None:
    common = ("sample", *SUITE, "--checkpoint", mini.student, "--codec", mini.codec, "--prompts", prompts, "--steps", 2)
    run(*common, "--part", "1-of-1", "--out", tmp_path / "whole")
    for part in ("1-of-2", "2-of-2"):
        run(*common, "--part", part, "--out", tmp_path / part)
    whole, first, second = (pictures(tmp_path / name) for name in ("whole", "1-of-2", "2-of-2"))
    assert len(whole) == 12 and {name.split("/")[0] for name in first} == {"00000", "00002", "00004"}
    assert difference(whole, first | second) <= 1  # batches of another size may round differently
    metadata = [json.loads((tmp_path / f"whole/{k:05d}/metadata.jsonl").read_text()) for k in range(6)]
    assert metadata == [json.loads(line) for line in prompts.read_text().splitlines()]
    assert torch.equal(noise_of([(3, 1), (4, 0)], (2,), seed=3)[0], noise_of([(3, 1)], (2,), seed=3)[0])


def test_controls(mini: Mini, prompts: Path, run: Run, tmp_path: Path) -> None:
    for control in ("oracle", "codec", "shuffled"):
        common = ("--codec", mini.codec, "--prompts", prompts, "--steps", 0, "--part", "1-of-1")
        run("sample", *SUITE, "--control", control, *common, "--out", tmp_path / control)
    metadata = [json.loads(line) for line in prompts.read_text().splitlines() for _ in range(2)]

    def score(control: str) -> float:
        images = [image.astype(np.uint8) for image in pictures(tmp_path / control).values()]
        return shapeeval(images, metadata)["overall"]

    assert score("oracle") == 1.0
    assert score("shuffled") < 0.4
    oracle, codec = (pictures(tmp_path / control) for control in ("oracle", "codec"))
    assert np.mean([np.abs(oracle[name] - codec[name]).mean() for name in oracle]) < 8  # 24 components of few scenes


def test_a_table_is_refused_where_the_controls_fail(run: Run, fail: Run, tmp_path: Path) -> None:
    def score(model: str, value: float) -> Path:
        overall = {"value": value, "low": value, "high": value, "n_prompts": 1, "kind": "substituted_model"}
        path = tmp_path / f"{model}.json"
        facts = {"model": model.rpartition("-")[0], "steps": int(model[-1]), "media": "images", "n_prompts": 1}
        evaluator = {"version": "1", "prompts_sha256": "0" * 64}
        numbers = {"metrics": {"shapeeval.overall": overall}, "per_prompt": {"shapeeval.overall": [value]}}
        path.write_text(json.dumps({**facts, "n_samples": 1, **numbers, "evaluator": evaluator}))
        return path

    good, blind, lucky = score("oracle-0", 0.99), score("shuffled-0", 0.05), score("rcm-0-4", 0.8)
    table = ("table", "--name", "table1", "--scores", lucky, "--out-dir", tmp_path / "tables")
    table += ("--published", Path(__file__).parents[2] / "config/published/table1.csv", "--controls")
    assert "needs the scores of the control shuffled" in fail(*table, good)
    assert "0.940" in fail(*table, score("oracle-0", 0.94), blind)
    good = score("oracle-0", 0.99)
    assert "0.110" in fail(*table, good, score("shuffled-0", 0.11))
    assert not (tmp_path / "tables").exists()
    run(*table, good, score("shuffled-0", 0.05))
    assert {path.name for path in (tmp_path / "tables").glob("table1.???")} == {"table1.csv", "table1.tex"}
    assert "0.80" in (tmp_path / "tables" / "table1.md").read_text()


def test_clips(mini: Mini, run: Run, tmp_path: Path) -> None:
    clips = ["experiment=tiny-clips", *SUITE]
    prompts = tmp_path / "clips.jsonl"
    run("prompts", *clips, "--out", prompts)
    common = ("sample", *clips, "--codec", mini.codec, "--prompts", prompts, "--part", "2-of-6", "--steps")
    run(*common, 1, "--checkpoint", mini.clips, "--out", tmp_path / "student")
    run(*common, 0, "--control", "codec", "--out", tmp_path / "codec")
    for folder in ("student", "codec"):
        with Image.open(tmp_path / folder / "00001/samples/0001.png") as image:
            assert image.n_frames == 9


def test_precision_of_teacher_and_student(mini: Mini, prompts: Path, run: Run, fail: Run, tmp_path: Path) -> None:
    run("convert", *SMALL, "--checkpoint", mini.transformer, "--out", tmp_path / "teacher")
    few = ["suite=report", "evaluation.precision.times=2", "evaluation.precision.samples=3", "teacher.steps=2"]
    common = ("precision", *SMALL, *few, "--teacher", tmp_path / "teacher", "--prompts", prompts)
    for name, checkpoint in (("teacher", tmp_path / "teacher"), ("rcm-0", mini.student)):
        run(*common, "--checkpoint", checkpoint, "--out", tmp_path / f"{name}.json")
    said = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("teacher", "rcm-0")}
    assert [said[name]["model"] for name in said] == ["teacher", "rcm-0"]
    assert said["teacher"]["errors"] == said["rcm-0"]["errors"]  # both have the weights of the mini network
    assert said["teacher"]["samples"] == 3 and len(said["teacher"]["times"]) == 2
    for of_precision in said["rcm-0"]["errors"].values():
        assert all(0 < value < 1 for found in of_precision.values() for values in found.values() for value in values)
    figure = tmp_path / "figure.png"
    run("figure", "--name", "figure_precision", "--inputs", *tmp_path.glob("*[r0].json"), "--out", figure)
    with Image.open(figure) as image:
        assert image.format == "PNG"
    refused = fail(*common, "--checkpoint", mini.clips, "--out", tmp_path / "clips.json")
    assert "(24, 3, 3, 3), but the experiment (24, 1, 3, 3)" in refused


def test_what_does_not_fit_is_refused(mini: Mini, prompts: Path, run: Run, fail: Run, tmp_path: Path) -> None:
    common = ("--codec", mini.codec, "--prompts", prompts, "--part", "1-of-1", "--out", tmp_path / "out", "--steps")
    assert "9 frames" in fail("sample", *SUITE, "--checkpoint", mini.clips, *common, 1)
    run("convert", *SMALL, "--checkpoint", mini.transformer, "--out", tmp_path / "teacher")
    assert "20 steps" in fail("sample", *SUITE, *SMALL, "--checkpoint", tmp_path / "teacher", *common, 4)
    one = tmp_path / "one.jsonl"
    one.write_text(prompts.read_text().splitlines()[0] + "\n")
    arguments = ("--codec", mini.codec, "--prompts", one, "--part", "1-of-1", "--steps", 0, "--out", tmp_path / "out")
    assert "two different prompts" in fail("sample", *SUITE, "--control", "shuffled", *arguments)
    assert not (tmp_path / "out").exists()
