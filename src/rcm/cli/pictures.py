"""Pictures and clips as files; frames are uint8 (T, H, W, 3), T = 1 for a picture.

A comment, such as the settings that a clip was made with, goes into PNG's text `Comment`, GIF's comment or MP4's tag.
"""

import io
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rcm.artefact import UserError

FRAMES_PER_SECOND = 6.0  # of the tiny world
SUFFIXES = (".png", ".gif", ".mp4", ".npy")
_QUALITY = 8  # of 10, of H.264: hardly to be told from the frames


def write(path: Path, pieces: Iterable[np.ndarray], *, rate: float = FRAMES_PER_SECOND, comment: str = "") -> None:
    """Write frames, which come in pieces (T, H, W, 3) one after another, in the format that the suffix names.

    .png (animated where there are several frames) and .npy are lossless, and only those may be scored. A film is
    written as its frames come; the other formats need all of them first. `comment` is ASCII; .npy has no place for it.
    """
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        _mp4(path, pieces, rate, comment)
        return
    frames = np.concatenate(list(pieces))
    if suffix == ".npy":
        with path.open("wb") as file:  # given a name, numpy would append the suffix to .NPY
            np.save(file, frames)
    else:
        path.write_bytes((png if suffix == ".png" else gif)(frames, rate, comment))


def encode(frames_THWC: np.ndarray, suffix: str, *, rate: float = FRAMES_PER_SECOND) -> bytes:
    """Frames as the bytes of a file, by suffix; see `write`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"encoded{suffix}"
        write(path, [frames_THWC], rate=rate)
        return path.read_bytes()


def frame_rate(codec: Mapping[str, Any]) -> float:
    """Frames per second of what a codec's models make: 16 for those of Wan."""
    return FRAMES_PER_SECOND if codec["kind"] == "cells" else 16.0


def check_suffix(path: Path) -> str:
    """The suffix of an output, if `write` knows it and can write it here; UserError otherwise."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"cannot write {str(path)!r}: the suffix must be one of {', '.join(SUFFIXES)}")
    if suffix == ".mp4":
        _check_ffmpeg()
    return suffix


def make_room(path: Path) -> None:
    """Make the folder of an output; UserError or OSError where the output cannot be written."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, but a file is to be written there; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()


def png(frames_THWC: np.ndarray, rate: float = FRAMES_PER_SECOND, comment: str = "") -> bytes:
    """A PNG, animated where there are several frames, every one of which can be read back."""
    images = [Image.fromarray(frame) for frame in frames_THWC]
    text = PngInfo()
    if comment:
        text.add_text("Comment", comment, zip=len(comment) > 1000)
    # Pillow merges equal neighbours unless something differs; for opaque pixels the two blend operations are equal
    animated = {
        "save_all": True,
        "append_images": images[1:],
        "duration": round(1000 / rate),
        "blend": [k % 2 for k in range(len(images))],
        "disposal": 0,
        "loop": 0,
    }
    buffer = io.BytesIO()
    images[0].save(buffer, "PNG", pnginfo=text, **(animated if len(images) > 1 else {}))
    return buffer.getvalue()


def gif(frames_THWC: np.ndarray, rate: float = FRAMES_PER_SECOND, comment: str = "") -> bytes:
    """A looping GIF of at most 256 colours a frame; equal neighbours become one frame that lasts longer."""
    images = [Image.fromarray(frame) for frame in frames_THWC]
    options = {"comment": comment.encode("ascii")} if comment else {}
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / rate), loop=0, **options
    )
    return buffer.getvalue()


def _check_ffmpeg() -> None:
    """Raise UserError where there is no ffmpeg."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise UserError(".mp4 needs ffmpeg: `pip install imageio-ffmpeg`, or choose .png or .gif") from None


def _mp4(path: Path, pieces: Iterable[np.ndarray], rate: float, comment: str) -> None:
    """An H.264 film, lossy; it needs even sides, so an odd last row or column is cut."""
    _check_ffmpeg()
    import imageio_ffmpeg

    writer = None
    for piece in pieces:
        even = piece[:, : piece.shape[1] // 2 * 2, : piece.shape[2] // 2 * 2]
        if writer is None:
            writer = imageio_ffmpeg.write_frames(
                str(path),
                (even.shape[2], even.shape[1]),
                fps=rate,
                quality=_QUALITY,
                macro_block_size=2,
                ffmpeg_log_level="error",
                output_params=["-metadata", f"comment={comment}"] if comment else [],
            )
            writer.send(None)
        for frame in even:
            writer.send(np.ascontiguousarray(frame))
    if writer is not None:
        writer.close()


def enlarged(frames_THWC: np.ndarray, factor: int) -> np.ndarray:
    """Frames with every pixel `factor` times as high and wide."""
    return frames_THWC.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(rows_NKTHWC: np.ndarray, gap: int = 2) -> np.ndarray:
    """Lay N x K pictures or clips out as a grid: uint8 (T, height, width, 3)."""
    n, k, t, h, w, c = rows_NKTHWC.shape
    padded = np.full((n, k, t, h + gap, w + gap, c), 255, dtype=np.uint8)
    padded[:, :, :, :h, :w] = rows_NKTHWC
    return padded.transpose(2, 0, 3, 1, 4, 5).reshape(t, n * (h + gap), k * (w + gap), c)[:, :-gap, :-gap]
