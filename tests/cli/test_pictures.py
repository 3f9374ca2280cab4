"""Pictures as files."""

import io

import numpy as np
import pytest
from PIL import Image, ImageSequence

from rcm.cli.pictures import enlarged, grid, png


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
    assert enlarged(frames[0, 0], 9).shape == (1, 8, 8, 3)
    assert enlarged(frames[0, 0], 1).shape == (1, 2, 2, 3)
