"""Mistakes and damage: one sentence that names the file or key, exit status 2, nothing written."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from rcm.artefact import sha256_file
from rcm.cli import main

from .conftest import SMALL, Mini, Run


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink()


DAMAGE = [truncated, flipped, missing]


def copied(source: Path, folder: Path) -> Path:
    copy = folder / source.name
    copy.write_bytes(source.read_bytes())
    return copy


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(damage: Callable[[Path], None], mini: Mini, fail: Run, tmp_path: Path) -> None:
    checkpoint = copied(mini.transformer, tmp_path)
    damage(checkpoint)
    assert str(checkpoint) in fail("convert", *SMALL, "--checkpoint", checkpoint, "--out", tmp_path / "dcp")
    assert not (tmp_path / "dcp").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_student(damage: Callable[[Path], None], mini: Mini, fail: Run, tmp_path: Path) -> None:
    student = copied(mini.student, tmp_path)
    damage(student)
    out = tmp_path / "out.png"
    said = fail("generate", "--prompt", "x", "--checkpoint", student, "--codec", mini.codec, "--out", out)
    assert str(student) in said
    assert not out.exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_teacher_and_shard(
    damage: Callable[[Path], None], mini: Mini, run: Run, fail: Run, tmp_path: Path
) -> None:
    teacher, prompts, shard = tmp_path / "teacher", tmp_path / "train.jsonl", tmp_path / "1-of-1.tar"
    run("convert", *SMALL, "--checkpoint", mini.transformer, "--out", teacher)
    run("prompts", "suite=train", "suites.train.prompts=2", "--out", prompts)
    synthesize = ("synthesize", *SMALL, "teacher.steps=1", "--teacher", teacher, "--prompts", prompts)
    run(*synthesize, "--shard", "1-of-1", "--out", shard)
    damage(shard)
    rest = {f"--{name}": tmp_path / name for name in ("resume", "out", "metrics", "previews")}
    distill = ("distill", *SMALL, "--teacher", teacher, "--codec", mini.codec, *sum(rest.items(), ()))
    assert str(shard) in fail(*distill, "--data", shard)
    damage(next(teacher.glob("*.distcp")))
    assert str(teacher) in fail(*synthesize, "--shard", "1-of-1", "--out", tmp_path / "again.tar")
    assert not any(path.exists() for path in rest.values())


def test_wrong_kinds_of_files(mini: Mini, fail: Run, tmp_path: Path) -> None:
    generate = ("generate", "--prompt", "x", "--out", tmp_path / "x.png")
    assert "safetensors" in fail(*generate, "--checkpoint", mini.transformer, "--codec", mini.codec)
    assert "does not fit the CellCodec" in fail(*generate, "--checkpoint", mini.student, "--codec", mini.transformer)
    said = fail("convert", "--checkpoint", mini.transformer, "--out", tmp_path / "dcp")  # the full-sized network
    assert "does not fit the WanTransformer of this configuration" in said


def test_download_of_the_wrong_file(mini: Mini, run: Run, fail: Run, tmp_path: Path) -> None:
    out = tmp_path / "codec.pth"
    source = f"checkpoints.codec.source={mini.codec}"
    said = fail("download", source, f"checkpoints.codec.sha256={'0' * 64}", "--name", "codec", "--out", out)
    assert sha256_file(mini.codec) in said and not out.exists()
    run("download", source, f"checkpoints.codec.sha256={sha256_file(mini.codec)}", "--name", "codec", "--out", out)
    assert sha256_file(out) == sha256_file(mini.codec)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teacher.guidence=3", "did you mean 'teacher.guidance'?"),
        ("teacher.steps=many", "'teacher.steps' is \"many\"; allowed: an integer"),
        ("experiment=tiny-imges", "tiny-images"),
        ("suite=reports", "report"),
        ("network.heads=3", "network"),
        ("network.width=[", "network.width=["),
        ("=3", "=3"),
    ],
)
def test_configuration(override: str, said: str, fail: Run, tmp_path: Path) -> None:
    assert said in fail("prompts", override, "--out", tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())


def test_impossible_numbers_of_steps(mini: Mini, fail: Run, tmp_path: Path) -> None:
    generate = ("generate", "--prompt", "x", "--checkpoint", mini.student, "--codec", mini.codec)
    for steps in (0, 5, 10**6):
        assert "1 to 4" in fail(*generate, "--steps", steps, "--out", tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.png.exe"])
def test_formats(name: str, mini: Mini, fail: Run, tmp_path: Path) -> None:
    generate = ("generate", "--prompt", "x", "--checkpoint", mini.student, "--codec", mini.codec)
    assert ".png, .gif, .mp4, .npy" in fail(*generate, "--out", tmp_path / name)


def test_film_without_ffmpeg(mini: Mini, fail: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    generate = ("generate", "--prompt", "x", "--checkpoint", mini.clips, "--codec", mini.codec)
    assert "pip install imageio-ffmpeg" in fail(*generate, "--out", tmp_path / "x.mp4")


def test_a_place_that_cannot_be_written(mini: Mini, fail: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    generate = ("generate", "--prompt", "x", "--checkpoint", mini.student, "--codec", mini.codec)
    fail(*generate, "--out", tmp_path / "file" / "x.png")
    (tmp_path / "x.png").mkdir()
    fail(*generate, "--out", tmp_path / "x.png")


def test_a_fault_of_the_system_without_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rcm.cli.data.compose", full)
    assert main(["prompts", "--out", str(tmp_path / "x.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("rcm prompts: error: the disk is full (")


def test_samples_that_cannot_be(mini: Mini, fail: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"tag": "single_object", "include": [{"class": "bear", "count": 1}], "prompt": "a bear"}\n')
    common = ("--codec", mini.codec, "--prompts", prompts, "--part", "1-of-1", "--out", tmp_path / "out")
    assert "the tiny world has no 'bear'" in fail("sample", "--control", "oracle", "--steps", 0, *common)
    said = fail("sample", "codec.stride=2", "--checkpoint", mini.student, "--steps", 1, *common)
    assert "was made for the codec" in said and '"stride": 2' in said


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rcm.cli.data.compose", interrupted)
    assert main(["prompts", "--out", str(tmp_path / "x.jsonl")]) == 130
    said = capsys.readouterr().err.strip()
    assert said.startswith("rcm prompts: interrupted") and "\n" not in said
