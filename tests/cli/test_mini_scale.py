"""Every stage of a scale of real models, in miniature: from files as they are published to samples of the student."""

import json
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from rcm.checkpoints import load_dcp, open_state, read_settings
from rcm.cli import main
from rcm.cli.config import compose
from rcm.cli.evaluators import ALL
from rcm.data.shards import read_shards
from rcm.text import Embeddings

from .mini_scale import NAMES, PROMPTS, write


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mini"))


@pytest.fixture(autouse=True)
def tree(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCM_CONFIG_DIR", str(config))


def run(*words: Any) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize("name", ["mini-wan-clips", pytest.param("mini-cosmos-images", marks=pytest.mark.slow)])
def test_from_published_files_to_samples(name: str, tmp_path: Path) -> None:
    experiment, media = f"experiment={name}", name.rpartition("-")[2]
    names = {name: given for name, given in compose([experiment])["checkpoints"].items() if name not in ALL}
    files = {name: tmp_path / f"{name}{Path(names[name]['source']).suffix}" for name in names}
    for name, path in files.items():
        run("download", experiment, "--name", name, "--out", path)
    large = "synthesizer" if media == "clips" else "transformer"
    for role, name in {
        "network": "transformer",
        **({"synthesizer": "synthesizer"} if media == "clips" else {}),
    }.items():
        run("convert", experiment, "--network", role, "--checkpoint", files[name], "--out", tmp_path / f"{name}.dcp")
    source, converted = open_state(files[large]), load_dcp(tmp_path / f"{large}.dcp")
    assert converted.keys() == source.keys()
    assert all(torch.equal(converted[name], source[name]) for name in source)

    text, prompts = {}, {}
    for suite in ("train", "dev", "report"):
        prompts[suite], text[suite] = tmp_path / f"{suite}.jsonl", tmp_path / f"{suite}.safetensors"
        source = ["--source", files["prompts_train"]] if suite != "report" else []
        if suite == "report" and media == "clips":
            source = ["--source", files["prompts_report"], "--names", files["prompts_names"]]
            source += ["--info", files["prompts_info"]]
        run("prompts", experiment, f"suite={suite}", *source, "--out", prompts[suite])
        encode = ("--encoder", files["text"], "--tokenizer", files["tokenizer"])
        run("embed", experiment, "--prompts", prompts[suite], *encode, "--out", text[suite])
    assert Embeddings(text["train"]).prompts[:4] == PROMPTS[:4]

    shard = tmp_path / "1-of-1.tar"
    teacher = ("--teacher", tmp_path / f"{large}.dcp", "--prompts", prompts["train"], "--text", text["train"])
    run("synthesize", experiment, *teacher, "--shard", "1-of-1", "--out", shard)
    data = read_shards([shard])
    assert len(data) == 4 and data.samples[0].latents_CTHW.shape == (4, 2 if media == "clips" else 1, 4, 6)

    made = tmp_path / "student"
    outputs = {"out": "dcp", "raw": "raw", "metrics": "metrics.jsonl", "previews": "previews", "resume": "resume"}
    named = [word for option, file in outputs.items() for word in (f"--{option}", made / file)]
    given = (
        "--teacher",
        tmp_path / "transformer.dcp",
        "--data",
        shard,
        "--codec",
        files["codec"],
        "--text",
        text["dev"],
    )
    run("distill", experiment, "objective=rcm", *given, *named)
    student, raw = load_dcp(made / "dcp"), load_dcp(made / "raw")
    assert all(value.isfinite().all() for value in student.values())
    assert any(not torch.equal(student[name], raw[name]) for name in raw)  # averaged, and as the last step left it
    with Image.open(made / "previews" / "000002.png") as image:
        assert image.width >= 48

    exported = made / "student.safetensors"
    run("export", experiment, "objective=rcm", "--student", made / "dcp", "--out", exported)
    assert read_settings(exported)["height"] == 32
    common = ("--codec", files["codec"], "--prompts", prompts["report"], "--text", text["report"], "--part", "1-of-1")
    for steps, checkpoint in ((2, tmp_path / "transformer.dcp"), (1, exported)):
        out = tmp_path / f"samples-{steps}"
        run("sample", experiment, "--checkpoint", checkpoint, *common, "--steps", steps, "--out", out)
        frames = [read(path) for path in sorted(out.glob("*/samples/*"))]
        # GenEval's six tasks, or two of VBench's prompts, one of which is still
        assert len(frames) == (3 if media == "clips" else 6)
        assert {f.shape for f in frames} == {(5 if media == "clips" else 1, 32, 48, 3)}
        metadata = json.loads((out / "00001/metadata.jsonl").read_text())
        assert metadata.get("name") == (NAMES[1] if media == "clips" else None)


@pytest.mark.parametrize("model", ["mini-wan", "mini-cosmos", "mini-student"])
def test_one_command_from_nothing(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # below which downloads go
    out = tmp_path / ("out.png" if model == "mini-cosmos" else "out.mp4")
    words = ["generate", "--model", model, "--prompt", "a red circle", "--out", str(out), "--steps", "2"]
    words += [] if model == "mini-student" else ["--teacher"]
    assert main(words) == 2  # nothing is there
    run(*words, "--download")
    made = read(out)
    assert made.shape[-3:] == (32, 48, 3) or made.shape[-3] == 8 * 32  # small pictures are enlarged
    again = main(words)  # all is there
    assert again == 0 and np.array_equal(read(out), made)
    (codec,) = (tmp_path / "data" / model / "checkpoints").glob("codec.pth")
    codec.write_bytes(codec.read_bytes()[:-1] + b"x")
    assert main([*words, "--download"]) == 2  # it has changed since


def read(path: Path) -> np.ndarray:
    """Frames (T, H, W, 3) of a picture or a film."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path).convert("RGB"))[None]
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])
