"""`rcm arrange`: samples where the official evaluators look for them."""

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcm.cli.pictures import encode
from rcm.data.prompts import colors, counting

from .conftest import Run

IMAGES, CLIPS = "experiment=cosmos-predict2-2b-images", "experiment=wan2.1-1.3b-clips"


@cache
def encoded(level: int, suffix: str) -> bytes:
    return encode(np.full((2 if suffix == ".mp4" else 1, 16, 16, 3), level, np.uint8), suffix)


def part(folder: Path, prompts: Mapping[int, Any], samples: int = 2, suffix: str = ".png") -> Path:
    """A part of a suite; every sample of a prompt has its own content, clips two frames."""
    for index, metadata in prompts.items():
        (folder / f"{index:05d}" / "samples").mkdir(parents=True)
        (folder / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
        for number in range(samples):
            sample = folder / f"{index:05d}" / "samples" / f"{number:04d}{suffix}"
            sample.write_bytes(encoded(20 * number, suffix))
    (folder / "sampling.json").write_text(json.dumps({"frames": 2 if suffix == ".mp4" else 1}))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_geneval(run: Run, tmp_path: Path) -> None:
    red, three = colors("car", "red"), counting("dog", 3)
    parts = [part(tmp_path / "1-of-2", {0: red}), part(tmp_path / "2-of-2", {1: three})]
    out = tmp_path / "official"
    run("arrange", IMAGES, "--samples", *parts, "--out", out)
    assert tree(out) == {
        "00000/metadata.jsonl": json.dumps(red).encode() + b"\n",
        "00000/samples/0000.png": encoded(0, ".png"),
        "00000/samples/0001.png": encoded(20, ".png"),
        "00001/metadata.jsonl": json.dumps(three).encode() + b"\n",
        "00001/samples/0000.png": encoded(0, ".png"),
        "00001/samples/0001.png": encoded(20, ".png"),
    }
    assert (out / "00001/samples/0001.png").samefile(parts[1] / "00001/samples/0001.png")  # no copy
    record = json.loads(Path(f"{out}.prov.json").read_text())
    assert record["stage"] == "arrange" and [entry["path"] for entry in record["inputs"]] == ["1-of-2", "2-of-2"]


def test_vbench(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {
        3: {"prompt": "A long text about a cat.", "name": "a cat, asleep", "dimension": ["color"]},
        14: {"prompt": "猫が走る"},
    }
    samples = part(tmp_path / "all", prompts, samples=11, suffix=".mp4")
    expected = {f"a cat, asleep-{k}.mp4": encoded(20 * k, ".mp4") for k in range(11)}
    expected |= {f"猫が走る-{k}.mp4": encoded(20 * k, ".mp4") for k in range(11)}
    run("arrange", CLIPS, "--samples", samples, "--out", tmp_path / "linked")
    assert tree(tmp_path / "linked") == expected

    def elsewhere(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    run("arrange", CLIPS, "--samples", samples, "--out", tmp_path / "copied")
    assert tree(tmp_path / "copied") == expected
    copy = tmp_path / "copied" / "a cat, asleep-0.mp4"
    assert not copy.samefile(samples / "00003/samples/0000.mp4")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b""), "0001.mp4 is empty"),
        (lambda path: path.write_text("no film"), "cannot read the sample"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "cannot read the sample"),
        (lambda path: (path.parents[2] / "sampling.json").write_text('{"frames": 81}'), "0000.mp4 has 2 frames, expec"),
    ],
)
def test_what_cannot_be_judged(fail: Run, tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    samples = part(tmp_path / "all", {0: {"prompt": "a cat"}}, suffix=".mp4")
    spoil(samples / "00000" / "samples" / "0001.mp4")
    error = fail("arrange", CLIPS, "--samples", samples, "--out", tmp_path / "out")
    assert said in error and ".mp4" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a/b", "the prompt 1, 'a/b', for it holds a slash"),
        ("a\0b", "the prompt 1, 'a.x00b', for it holds a zero byte"),
        ("x" * 250, "for it has 256 bytes, and a file system takes 255; give it a shorter `name`"),
        ("a cat", "the prompts 0 and 1 are both called 'a cat'"),
    ],
)
def test_names_that_no_file_can_have(fail: Run, tmp_path: Path, name: str, said: str) -> None:
    prompts = {0: {"prompt": "a cat"}, 1: {"prompt": "something longer", "name": name}}
    samples = part(tmp_path / "all", prompts, suffix=".mp4")
    error = fail("arrange", CLIPS, "--samples", samples, "--out", tmp_path / "out")
    assert said.replace("'a.x00b'", repr("a\0b")) in error
    assert not (tmp_path / "out").exists()


def test_a_missing_part(fail: Run, tmp_path: Path) -> None:
    samples = part(tmp_path / "1-of-2", {0: {"prompt": "a cat"}})
    assert "2-of-2" in fail("arrange", CLIPS, "--samples", samples, tmp_path / "2-of-2", "--out", tmp_path / "out")
