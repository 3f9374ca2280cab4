"""Pictures and clips as bytes; frames are uint8 (T, H, W, 3), T = 1 for a picture."""

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from rcm.artefact import UserError

FRAMES_PER_SECOND = 6
SUFFIXES = (".png", ".gif", ".mp4", ".npy")


def encode(frames_THWC: np.ndarray, suffix: str) -> bytes:
    """Encode by suffix; .png and .npy are lossless, and only those may be scored."""
    if suffix == ".png":
        return png(frames_THWC)
    if suffix == ".gif":
        return gif(frames_THWC)
    if suffix == ".mp4":
        return mp4(frames_THWC)
    buffer = io.BytesIO()
    np.save(buffer, frames_THWC)
    return buffer.getvalue()


def check_suffix(path: Path) -> str:
    """The suffix of an output, if `encode` knows it and can write it here; UserError otherwise."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"cannot write {str(path)!r}: the suffix must be one of {', '.join(SUFFIXES)}")
    if suffix == ".mp4":
        _ffmpeg()
    return suffix


def png(frames_THWC: np.ndarray) -> bytes:
    """A PNG, animated where there are several frames, every one of which can be read back."""
    images = [Image.fromarray(frame) for frame in frames_THWC]
    buffer = io.BytesIO()
    if len(images) == 1:
        images[0].save(buffer, "PNG")
    else:
        # Pillow merges equal neighbours unless something differs; for opaque pixels the two blend operations are equal
        blend = [k % 2 for k in range(len(images))]
        duration = round(1000 / FRAMES_PER_SECOND)
        images[0].save(
            buffer, "PNG", save_all=True, append_images=images[1:], duration=duration, blend=blend, disposal=0, loop=0
        )
    return buffer.getvalue()


def gif(frames_THWC: np.ndarray) -> bytes:
    """A looping GIF of at most 256 colours a frame."""
    images = [Image.fromarray(frame) for frame in frames_THWC]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / FRAMES_PER_SECOND), loop=0
    )
    return buffer.getvalue()


def _ffmpeg() -> str:
    """The path of ffmpeg; UserError where there is none."""
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise UserError(".mp4 needs ffmpeg: `pip install imageio-ffmpeg`, or choose .png or .gif") from None


def mp4(frames_THWC: np.ndarray) -> bytes:
    """An H.264 film, lossy; it needs even sides."""
    _ffmpeg()
    import imageio_ffmpeg

    even = frames_THWC[:, : frames_THWC.shape[1] // 2 * 2, : frames_THWC.shape[2] // 2 * 2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path),
            (even.shape[2], even.shape[1]),
            fps=FRAMES_PER_SECOND,
            macro_block_size=2,
            ffmpeg_log_level="error",
        )
        writer.send(None)
        for frame in even:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return path.read_bytes()


def enlarged(frames_THWC: np.ndarray, size: int = 384) -> np.ndarray:
    """Small frames enlarged by whole factors to about `size` pixels, for people to look at."""
    factor = max(1, size // max(frames_THWC.shape[1:3]))
    return frames_THWC.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(rows_NKTHWC: np.ndarray, gap: int = 2) -> np.ndarray:
    """Lay N x K pictures or clips out as a grid: uint8 (T, height, width, 3)."""
    n, k, t, h, w, c = rows_NKTHWC.shape
    padded = np.full((n, k, t, h + gap, w + gap, c), 255, dtype=np.uint8)
    padded[:, :, :, :h, :w] = rows_NKTHWC
    return padded.transpose(2, 0, 3, 1, 4, 5).reshape(t, n * (h + gap), k * (w + gap), c)[:, :-gap, :-gap]
