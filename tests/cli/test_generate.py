"""`rcm generate`: any prompt, four formats."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from rcm.cli import generate

from .conftest import Mini, Run

HOSTILE = {
    "empty": "",
    "blank": "  \t ",
    "long": "circle " * 1_430,
    "one long word": "x" * 10_000,
    "emoji": "a photo of a 🔴 and a 🟦 👩‍👩‍👧",
    "slashes": "../../etc/passwd \\\\server\\share C:\\x",
    "newlines": "a photo\nof a\r\nred circle\x0b\x00",
    "leading dash": "-x",
    "braces and quotes": "{prompts} ${seed} $(id) `id` 'a' \"b\" %s",
    "right to left": "صورة دائرة حمراء \u202e",
    "combining": "a\u0301" * 50,
    "html": "<script>alert(1)</script>",
}


@pytest.mark.parametrize("prompt", HOSTILE.values(), ids=HOSTILE)
def test_hostile_prompts(prompt: str, mini: Mini, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    said = run("generate", "--prompt", prompt, "--checkpoint", mini.student, "--codec", mini.codec, "--out", out)
    frames = np.load(out)
    assert frames.shape == (1, 48, 48, 3) and frames.dtype == np.uint8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy"]
    assert all(line.startswith("rcm generate: note: ") and len(line) < 300 for line in said.splitlines())


def test_bytes_that_are_no_text(mini: Mini, fail: Run, tmp_path: Path) -> None:
    prompt = b"a \xff circle".decode("utf-8", "surrogateescape")  # as Python gets it from the shell
    out = tmp_path / "x.png"
    said = fail("generate", "--prompt", prompt, "--checkpoint", mini.student, "--codec", mini.codec, "--out", out)
    assert "not valid UTF-8" in said


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("a photo of a red circle", ""),
        ("a photo of three stars", ""),
        ("", "has no words"),
        ("🔴", "has no words"),
        ("a corgi on a skateboard", "knows only shapes (circle, square, triangle, star, cross) and colours (red,"),
        ("red " * 2_500, "only its first 12 of 2500 words"),
        ("a photo of the " + "red " * 12, ""),  # filler words take no room
        ("red " * 13, "only its first 12 of 13 words"),
    ],
)
def test_notes(prompt: str, note: str, mini: Mini, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    said = run("generate", "--prompt", prompt, "--checkpoint", mini.student, "--codec", mini.codec, "--out", out)
    assert note in said and bool(said) == bool(note)


def test_the_output_follows_from_prompt_and_seed(mini: Mini, run: Run, tmp_path: Path) -> None:
    def made(prompt: str, seed: int) -> np.ndarray:
        paths = "--checkpoint", mini.student, "--codec", mini.codec, "--out", tmp_path / "x.npy"
        run("generate", "--prompt", prompt, "--seed", seed, *paths)
        return np.load(tmp_path / "x.npy")

    red = made("a red circle", 0)
    assert np.array_equal(red, made("a red circle", 0))
    assert not np.array_equal(red, made("a red circle", 1))
    assert not np.array_equal(red, made("a blue star", 0))


@pytest.mark.parametrize("suffix", [".png", ".gif", ".mp4", ".npy", ".PNG"])
@pytest.mark.parametrize(("kind", "count"), [("student", 1), ("clips", 9)])
def test_formats(suffix: str, kind: str, count: int, mini: Mini, run: Run, tmp_path: Path) -> None:
    out = tmp_path / f"x{suffix}"
    run(
        "generate", "--prompt", "a red circle", "--checkpoint", getattr(mini, kind), "--codec", mini.codec, "--out", out
    )
    if suffix == ".npy":
        assert np.load(out).shape == (count, 48, 48, 3)
    elif suffix == ".mp4":
        import imageio_ffmpeg

        reader = imageio_ffmpeg.read_frames(str(out))
        assert next(reader)["size"] == (384, 384)
        assert len(list(reader)) == count
    else:
        with Image.open(out) as image:
            assert image.size == (384, 384)
            assert len(list(ImageSequence.Iterator(image))) == count


def test_the_samples_of_a_suite_come_again(mini: Mini, run: Run, tmp_path: Path) -> None:
    """Sample s of prompt p, whatever the part it was drawn in."""
    suite = ("suite=dev", "suites.dev.per_task=1", "suites.dev.samples=2", "suites.dev.seed=7")
    prompts, models = tmp_path / "prompts.jsonl", ("--checkpoint", mini.student, "--codec", mini.codec, "--steps", 2)
    run("prompts", *suite, "--out", prompts)
    run("sample", *suite, *models, "--prompts", prompts, "--part", "2-of-2", "--out", tmp_path / "samples")
    run("generate", *models, "--prompts", prompts, "--samples", 2, "--seed", 7, "--out", tmp_path / "x.npy")
    found = sorted((tmp_path / "samples").glob("*/samples/*.png"))
    assert len(found) >= 2
    for path in found:
        prompt, sample = int(path.parts[-3]), int(path.stem)
        with Image.open(path) as image:
            assert np.array_equal(np.load(tmp_path / f"x-{2 * prompt + sample}.npy")[0], np.array(image))


def test_a_comment_holds_no_more_of_a_prompt_than_ffmpeg_takes(mini: Mini, run: Run, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("\U0001f534" * 50_000, encoding="utf-8")
    models = ("--checkpoint", mini.student, "--codec", mini.codec, "--steps", 1)
    run("generate", *models, "--prompts", tmp_path / "long.txt", "--out", tmp_path / "x.mp4")
    assert (tmp_path / "x.mp4").stat().st_size > 60_000  # 12 bytes for each of the 5,000 characters


def test_more_frames_than_fit_in_memory_make_no_grid(
    mini: Mini, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "_GRID", 48 * 48 * 3 * 3)
    models = ("--checkpoint", mini.student, "--codec", mini.codec, "--steps", 1, "--prompt", "a red circle")
    run("generate", *models, "--samples", 3, "--out", tmp_path / "x.npy")
    said = run("generate", *models, "--samples", 4, "--out", tmp_path / "y.npy")
    assert "4 samples are too many for a grid" in said
    assert sorted(path.stem for path in tmp_path.glob("*.npy")) == [
        *("x", "x-0", "x-1", "x-2"),
        *("y-0", "y-1", "y-2", "y-3"),
    ]
