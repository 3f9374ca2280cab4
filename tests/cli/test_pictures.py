"""Pictures as files."""

import io
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageSequence

from rcm.cli.pictures import encode, enlarged, grid, png, write


@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_every_frame_of_a_png_comes_back(count: int, still: bool) -> None:
    shape = (count, 48, 40, 3)
    rng = np.random.default_rng(0)
    frames = np.full(shape, 7, np.uint8) if still else rng.integers(0, 256, shape, dtype=np.uint8)
    image = Image.open(io.BytesIO(png(frames)))
    back = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    assert np.array_equal(np.stack(back), frames)


def test_grid_and_enlargement() -> None:
    frames = np.arange(2 * 3 * 1 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 3, 1, 2, 2, 3)
    sheet = grid(frames, gap=1)
    assert sheet.shape == (1, 5, 8, 3)
    assert np.array_equal(sheet[0, 3:5, 6:8], frames[1, 2, 0])
    assert (sheet[0, 2] == 255).all()
    assert np.array_equal(enlarged(frames[0, 0], 4)[0, 4:8, :4], np.broadcast_to(frames[0, 0, 0, 1, 0], (4, 4, 3)))
    assert np.array_equal(enlarged(frames[0, 0], 1), frames[0, 0])


@pytest.mark.parametrize("suffix", [".png", ".gif", ".mp4", ".npy"])
def test_pieces_make_the_same_file_as_the_whole(suffix: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    for name, pieces in (("whole", [frames]), ("pieces", [frames[:1], frames[1:5], frames[5:]])):
        write(tmp_path / f"{name}{suffix}", iter(pieces), rate=16)
    whole, pieces = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("whole", "pieces"))
    assert whole == pieces == encode(frames, suffix, rate=16)


def test_a_film_is_written_as_its_frames_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is with ffmpeg before the next one is made, so no more than one is in memory."""
    sent = []
    original = imageio_ffmpeg.write_frames

    def spied(*arguments, **options):
        writer = original(*arguments, **options)
        answer = writer.send(None)
        try:
            while True:
                answer = writer.send((yield answer))
                sent.append(answer)
        finally:
            writer.close()

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", spied)

    def pieces():
        for count in (1, 4, 4):
            before = len(sent)
            yield np.zeros((count, 32, 48, 3), np.uint8)
            assert len(sent) == before + count

    write(tmp_path / "x.mp4", pieces(), rate=16)
    monkeypatch.undo()
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "x.mp4"))
    facts = next(reader)
    assert (facts["fps"], facts["size"], len(list(reader))) == (16.0, (48, 32), 9)


@pytest.mark.parametrize(("suffix", "seconds"), [(".png", 0.062), (".gif", 0.06)])
def test_frames_last_as_the_rate_says(suffix: str, seconds: float) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode(frames, suffix, rate=16))) as image:
        assert [frame.info["duration"] for frame in ImageSequence.Iterator(image)] == [
            pytest.approx(1000 * seconds)
        ] * 5


def test_films_of_odd_sides_lose_a_row(tmp_path: Path) -> None:
    write(tmp_path / "x.mp4", [np.zeros((2, 33, 49, 3), np.uint8)])
    assert next(imageio_ffmpeg.read_frames(str(tmp_path / "x.mp4")))["size"] == (48, 32)
