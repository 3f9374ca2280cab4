"""What `rcm sample` makes, and says of it; its samples are those of `rcm generate`, see test_generate.py."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rcm.artefact import content_sha256, sha256_file
from rcm.cli.config import compose
from rcm.cli.models import decoded
from rcm.codecs import CellCodec
from rcm.data.prompts import colors
from rcm.evaluation.samples import read_sampling

from .conftest import SMALL, Mini, Run

SUITE = ["suite=report", "suites.report.samples=2", "suites.report.seed=7"]


@pytest.mark.parametrize(("kind", "together"), [("wan", [1, 1, 1, 1, 1]), ("cells", [5])])
def test_only_the_tiny_codec_decodes_a_batch_at_once(kind: str, together: list[int]) -> None:
    """Eight images of 1360 x 768 at once are 42 GiB; the samples of published tables were decoded at once."""
    batches = []

    class Codec:
        def decode(self, latents_BCTHW: Tensor) -> Tensor:
            batches.append(len(latents_BCTHW))
            return latents_BCTHW.clamp(-1, 1)

    class Cells(Codec, CellCodec):
        pass

    latents = torch.linspace(-1.2, 1.2, 90).reshape(5, 3, 1, 2, 3)
    frames = decoded(Codec() if kind == "wan" else Cells(channels=1, cell=1, stride=1), latents)
    assert batches == together
    expected = ((latents.clamp(-1, 1).numpy().transpose(0, 2, 3, 4, 1) + 1) * 127.5).round()
    assert np.array_equal(frames, expected.astype(np.uint8))


def write(path: Path, *prompts: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


def test_a_prompt_may_say_how_many_samples_it_has(mini: Mini, run: Run, tmp_path: Path) -> None:
    """The others have as many as the suite says, and all of them are those that they would be without it."""
    more = {"samples": 4, "name": "a car", "dimension": ["color"], "auxiliary_info": {"color": "red"}}
    prompts = [colors("circle", "red"), {**colors("star", "blue"), **more}, colors("square", "green")]
    made = {}
    for name, items in (("own", prompts), ("same", [*prompts[:1], colors("star", "blue"), *prompts[2:]])):
        file = write(tmp_path / f"{name}.jsonl", *items)
        common = ("--control", "oracle", "--codec", mini.codec, "--prompts", file, "--steps", 0, "--part", "1-of-1")
        run("sample", *SUITE, *common, "--out", tmp_path / name)
        found = sorted((tmp_path / name).glob("*/samples/*.png"))
        made[name] = {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in found}
    assert [name[:5] for name in made["own"]] == ["00000"] * 2 + ["00001"] * 4 + ["00002"] * 2
    assert len(made["same"]) == 6 and made["same"].items() <= made["own"].items()
    assert [json.loads((tmp_path / f"own/{k:05d}/metadata.jsonl").read_text()) for k in range(3)] == prompts


@pytest.mark.parametrize("wrong", ["3", 0, 2.0, True, None])
def test_a_number_of_samples_that_is_none(mini: Mini, fail: Run, tmp_path: Path, wrong: Any) -> None:
    file = write(tmp_path / "x.jsonl", colors("circle", "red"), {**colors("star", "blue"), "samples": wrong})
    common = ("--control", "oracle", "--codec", mini.codec, "--prompts", file, "--steps", 0, "--part", "1-of-1")
    said = fail("sample", *SUITE, *common, "--out", tmp_path / "out")
    assert f"x.jsonl, prompt 2: 'samples' is {wrong!r}; expected a whole number" in said


def test_how_samples_were_made_lies_beside_them(mini: Mini, run: Run, tmp_path: Path) -> None:
    file, teacher = write(tmp_path / "x.jsonl", colors("circle", "red"), colors("star", "blue")), tmp_path / "teacher"
    run("convert", *SMALL, "--checkpoint", mini.transformer, "--out", teacher)
    common = ("--codec", mini.codec, "--prompts", file)
    suite = ("sample", *SUITE, *SMALL, "teacher.steps=3", "teacher.sigma_max=70")
    parts = [tmp_path / name for name in ("1-of-2", "2-of-2")]
    for part in parts:
        run(*suite, "--checkpoint", mini.student, *common, "--steps", 3, "--part", part.name, "--out", part)
    run(*suite, "--checkpoint", teacher, *common, "--steps", 3, "--part", "1-of-1", "--out", tmp_path / "slow")
    run(*suite, "--control", "oracle", *common, "--steps", 0, "--part", "1-of-1", "--out", tmp_path / "true")

    config = compose(["teacher.steps=3", "teacher.sigma_max=70"])
    alike = {"seed": 7, "precision": "float32", "device": "cpu", "suite": "report", "width": 48, "height": 48}
    alike |= {"prompts_sha256": sha256_file(file), "frames": 1}
    assert read_sampling(parts) == alike | {
        "checkpoint_sha256": sha256_file(mini.student),
        "sampler": config["sampler"],
        "sigma_max": 80.0,
        "times": [math.atan(80.0), 1.3, 1.0],
        "steps": 3,
    }
    assert [json.loads((part / "sampling.json").read_text())["part"] for part in parts] == ["1-of-2", "2-of-2"]
    assert read_sampling([tmp_path / "slow"]) == alike | {
        "checkpoint_sha256": content_sha256(teacher),
        "sampler": config["teacher"],
        "sigma_max": 70,
        "times": None,
        "steps": 3,
    }
    nothing = dict.fromkeys(("checkpoint_sha256", "sampler", "sigma_max", "times"))
    assert read_sampling([tmp_path / "true"]) == alike | nothing | {"steps": 0}


def test_a_checkpoint_is_hashed_once(mini: Mini, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash of many gigabytes takes a minute."""
    hashed: list[str] = []
    monkeypatch.setattr("rcm.artefact.sha256_file", lambda path: hashed.append(Path(path).name) or sha256_file(path))
    file = write(tmp_path / "x.jsonl", colors("circle", "red"))
    common = ("--codec", mini.codec, "--prompts", file, "--steps", 1, "--part", "1-of-1")
    run("sample", *SUITE, "--checkpoint", mini.student, *common, "--out", tmp_path / "out")
    assert hashed.count(mini.student.name) == 1
    inputs = json.loads((tmp_path / "out.prov.json").read_text())["inputs"]
    assert [entry["sha256"] for entry in inputs] == [sha256_file(path) for path in (mini.student, mini.codec, file)]
