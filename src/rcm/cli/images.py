"""The image that a clip begins with: any format, mode and size that Pillow reads, as RGB at the size of the clip.

The first frame of animations; turned as EXIF says; transparent parts over white; 16 bits a channel scaled to 8; grey,
palette and CMYK turned into RGB. It is resized (bicubic) to cover the clip and cut about its centre.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rcm.artefact import UserError, reason


def read(path: Path) -> Image.Image:
    """Read an image as RGB, upright; UserError where there is none, or it is damaged or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are welcome, and of odd tags
            with Image.open(path) as image:
                image.load()
                return _over_white(_eight_bits(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError:
        raise UserError(
            f"{path} is not an image of a known format; PNG, JPEG, WebP, GIF, TIFF and others are"
        ) from None
    except Image.DecompressionBombError:
        raise UserError(f"the image {path} has more than 178 million pixels; scale it down first") from None
    except OSError as error:
        if error.errno is not None:  # missing, no permission, a folder
            raise UserError(f"cannot read the image {path}: {error.strerror}") from None
        raise UserError(f"the image {path} is damaged: {reason(error)}") from error
    except Exception as error:  # odd bytes fail in many ways
        raise UserError(f"the image {path} is damaged, or of a kind that cannot be read: {reason(error)}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits as grey of 8: integers are out of 65535, floats out of 1."""
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, dtype=np.float64)
    scaled = np.nan_to_num(values / (1 if image.mode == "F" else 65535)).clip(0, 1)
    return Image.fromarray((scaled * 255).round().astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    shown = image.convert("RGBA")
    white = Image.new("RGBA", shown.size, "white")
    return Image.alpha_composite(white, shown).convert("RGB")


def fitted(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The image as (1, 3, H, W) in [-1, 1] at a size (width, height): resized to cover it, cut about its centre."""
    return whole(ImageOps.fit(image, size, Image.Resampling.BICUBIC))


def whole(image: Image.Image) -> Tensor:
    """The image as it is, (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
