"""The stage `plan`: what it prints, writes and refuses."""

import json
import math
from pathlib import Path

import pytest

from rcm.cli import main
from rcm.cli.parser import size


def test_it_prints_proposals_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    arguments = ["plan", "experiment=cosmos-predict2-2b-images", "--gpus", "8", "--json", str(path), "--count", "2"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "1,956,405,248 parameters, latents 16 x 1 x 96 x 170, 4,080 tokens, batch 512" in text
    assert text.count("  parallel.replicate=") == 2
    written = json.loads(path.read_text(encoding="utf-8"))
    first = written["proposals"][0]
    layout = first["parallel"]
    assert layout["replicate"] * layout["shard"] * layout["context"] == 8
    assert first["bytes"] == max(sum(sizes.values()) for sizes in first["peaks"].values())
    seconds = {name: step["seconds"] for name, step in first["steps"].items()}
    # every fifth iteration is the student's, and there is no warm-up
    assert first["hours"] == pytest.approx((6000 * seconds["joint"] + 24000 * seconds["critic"]) / 3600)


def test_stated_settings_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    stated = ["parallel.context=2", "parallel.recompute=blocks", "parallel.offload_teacher=false"]
    assert main(["plan", "experiment=wan2.1-1.3b-clips", *stated, "--gpus", "16"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "  parallel.replicate=" in line]
    assert lines and all(word in line for line in lines for word in stated)


def test_the_tiny_experiment_has_a_plan_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=tiny-images", "--gpus", "1", "--memory", "2GiB"]) == 0
    assert "latents 24 x 1 x 3 x 3, 9 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "32", "parallel.context=10"], "32 GPUs do not divide as stated: parallel.context=10"),
        (["--gpus", "12"], "--gpus 12 is no multiple of --gpus-per-node 8"),
        (["--gpus", "8", "--memory", "10GiB"], "nothing fits 8 GPUs: the least a rank needs is"),
        (["--gpus", "8", "--memory", "much"], "'much' is no size; expected something like 80GiB"),
        (
            ["--gpus", "8", "network.in_channels=4"],
            "'network.in_channels' is 4; allowed: codec.channels",
        ),
        (["--gpus", "8", "distillation.ema=0.5"], "configuration key 'distillation.ema' is 0.5; allowed: a number"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=wan2.1-14b-clips", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rcm plan: error: ") and sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(("text", "bytes_"), [("80GiB", 80 * 2**30), ("80GB", 80e9), ("1.5e9", 1.5e9), ("2TiB", 2**41)])
def test_sizes(text: str, bytes_: float) -> None:
    assert math.isclose(size(text), bytes_)
