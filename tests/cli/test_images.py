"""Images of any format, mode and size as the first frame; sizes of clips."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcm.artefact import UserError
from rcm.cli import sizes
from rcm.cli.images import fitted, read
from rcm.tree import settings_of

RED, TEAL = (255, 0, 0), (0, 128, 128)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def halves(mode: str, left: object, right: object, size: tuple[int, int] = (8, 4)) -> Image.Image:
    """An image of two colours, side by side."""
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def colors(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The colours in the middle of the left and the right half."""
    image = read(path)
    assert image.mode == "RGB"
    width, height = image.size
    return image.getpixel((width // 4, height // 2)), image.getpixel((3 * width // 4, height // 2))


def near(found: object, expected: object, by: float = 0) -> None:
    assert np.abs(np.subtract(found, expected)).max() <= by, (found, expected)


@pytest.mark.parametrize(
    ("suffix", "by"), [("png", 0), ("bmp", 0), ("tiff", 0), ("gif", 0), ("ppm", 0), ("jpg", 3), ("webp", 12)]
)
def test_formats(suffix: str, by: int, tmp_path: Path) -> None:
    near(colors(saved(halves("RGB", RED, TEAL, (64, 32)), tmp_path / f"x.{suffix}")), (RED, TEAL), by)


def test_modes(tmp_path: Path) -> None:
    palette = halves("RGB", RED, TEAL).quantize(4)
    near(colors(saved(palette, tmp_path / "palette.png")), (RED, TEAL))
    near(colors(saved(halves("L", 10, 200), tmp_path / "grey.png")), ((10,) * 3, (200,) * 3))
    near(colors(saved(halves("1", 0, 1), tmp_path / "bits.png")), ((0,) * 3, (255,) * 3))
    cmyk = saved(halves("CMYK", (0, 255, 255, 0), (255, 0, 0, 0), (64, 32)), tmp_path / "cmyk.jpg")
    near(colors(cmyk), ((255, 0, 0), (0, 255, 255)), 4)


def test_transparent_parts_lie_on_white(tmp_path: Path) -> None:
    half = halves("RGBA", (255, 0, 0, 128), (0, 0, 0, 0))
    near(colors(saved(half, tmp_path / "x.png")), ((255, 127, 127), (255, 255, 255)))
    near(colors(saved(halves("LA", (0, 255), (0, 0)), tmp_path / "grey.png")), ((0,) * 3, (255,) * 3))
    palette = halves("P", 1, 0)
    palette.putpalette([0, 0, 0, *RED])
    near(colors(saved(palette, tmp_path / "palette.gif", transparency=0)), (RED, (255, 255, 255)))
    near(colors(saved(halves("RGB", RED, TEAL), tmp_path / "key.png", transparency=TEAL)), (RED, (255, 255, 255)))


@pytest.mark.parametrize(
    ("kind", "mode", "top"), [(np.uint16, "I;16", 65535), (np.int32, "I", 65535), (np.float32, "F", 1)]
)
def test_deep_greys_are_scaled(kind: type, mode: str, top: int, tmp_path: Path) -> None:
    values = np.repeat([[0.8 * top, 0.2 * top]], 4, axis=1).astype(kind)
    image = Image.fromarray(values.repeat(4, axis=0))
    assert image.mode == mode
    near(colors(saved(image, tmp_path / "x.tiff")), ((204,) * 3, (51,) * 3))


def test_sixteen_bits_a_channel(tmp_path: Path) -> None:
    """A PNG of 16-bit RGB, which Pillow cannot write; cv2 takes blue first."""
    import cv2

    values = np.zeros((4, 8, 3), np.uint16)
    values[:, :4, 2], values[:, 4:, 0] = 65535, 0x8000
    cv2.imwrite(str(tmp_path / "x.png"), values)
    near(colors(tmp_path / "x.png"), ((255, 0, 0), (0, 0, 128)))


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns(turn: int, tmp_path: Path) -> None:
    """The camera's image is turned back: red lies where the tag says that the first rows and columns are."""
    image = halves("RGB", RED, TEAL, (64, 32))
    exif = Image.Exif()
    exif[0x0112] = turn
    upright = read(saved(image, tmp_path / "x.png", exif=exif))
    assert upright.size == ((64, 32) if turn < 5 else (32, 64))
    place = {1: (0, 0), 2: (63, 0), 3: (63, 0), 4: (0, 0), 5: (0, 0), 6: (0, 0), 7: (0, 63), 8: (0, 63)}[turn]
    assert upright.getpixel(place) == RED


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 4), color) for color in (RED, TEAL)]
    for suffix in ("gif", "png", "webp"):
        path = saved(frames[0], tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
        near(colors(path)[0], RED, 6)


def test_damage_and_other_files(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "gif", "tiff"):
        whole = saved(noise, tmp_path / f"x.{suffix}").read_bytes()
        for share in (0.0, 0.01, 0.5):
            (tmp_path / "cut").write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(UserError, match=r"cut .*(is not an image|damaged)|cut is (not an image|damaged)"):
                read(tmp_path / "cut")
    for name, content in (("x.svg", b"<svg/>"), ("x.txt", b"hello"), ("zeros.png", bytes(1000))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is not an image of a known format"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"cannot read the image .*No such file"):
        read(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"cannot read the image .*Is a directory"):
        read(tmp_path)


def test_a_bomb_is_refused_and_large_images_are_not(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    with pytest.raises(UserError, match="more than 178 million pixels"):
        read(tmp_path / "bomb.png")
    assert read(saved(Image.new("L", (10_000, 100)), tmp_path / "wide.png")).size == (10_000, 100)


def test_fitting_cuts_about_the_centre_and_keeps_the_ratio() -> None:
    """Three stripes, of which a square keeps the middle one; a picture of the right size stays as it is."""
    stripes = Image.new("RGB", (96, 32), RED)
    stripes.paste(TEAL, (32, 0, 64, 32))
    square = ((fitted(stripes, (16, 16)) + 1) * 127.5).round()
    assert square.shape == (1, 3, 16, 16)
    near(square[0, :, 2:14, 2:14].mean((1, 2)).tolist(), TEAL, 1)
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    same = fitted(Image.fromarray(noise), (48, 32))
    assert np.array_equal(((same[0] + 1) * 127.5).round().permute(1, 2, 0).numpy(), noise)
    assert fitted(Image.new("RGB", (1, 1), RED), (48, 32))[0, 0].unique().tolist() == [1.0]


# --- Sizes -----------------------------------------------------------------------------------------------------------


def settings(network: str, media: str = "clips") -> dict[str, object]:
    return {"media": media, "network": settings_of("network", network), "codec": settings_of("codec", "wan2.1-vae")}


@pytest.mark.parametrize(("kind", "network"), [("wan", "wan2.1-t2v-14b"), ("cosmos", "cosmos-predict2-t2i-2b")])
def test_every_named_size_fits_patch_and_codec(kind: str, network: str) -> None:
    media, frames = ("clips", 81) if kind == "wan" else ("images", 1)
    for resolution in sizes.RESOLUTIONS:
        for aspect in sizes.ASPECTS:
            width, height = sizes.named(kind, resolution, aspect)
            sizes.check(settings(network, media), (width, height), frames)
            wanted = int(aspect.split(":")[0]) / int(aspect.split(":")[1])
            assert width / height == pytest.approx(wanted, rel=0.03)
            assert sizes.named(kind, resolution, ":".join(reversed(aspect.split(":")))) == (height, width)


def test_published_sizes() -> None:
    """Wan2.1's SUPPORTED_SIZES and rCM's table; the paper's 1360 x 768 of Cosmos-Predict2."""
    assert [sizes.named("wan", r, "16:9") for r in sizes.RESOLUTIONS] == [(832, 480), (1280, 720)]
    assert sizes.named("wan", "480p", "3:4") == (480, 640) and sizes.named("wan", "720p", "1:1") == (960, 960)
    assert sizes.named("cosmos", "720p", "16:9") == (1360, 768)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((832, 480), (832, 480)),  # exactly the area: nothing is lost to rounding
        ((1920, 1080), (832, 464)),  # √(832 · 480 · 16 / 9) = 842.6, √(832 · 480 · 9 / 16) = 473.9
        ((1080, 1920), (464, 832)),
        ((1, 1), (624, 624)),  # 631.9
        ((4000, 3000), (720, 544)),  # 729.7, 547.3
    ],
)
def test_sizes_of_images_are_those_of_wan(image: tuple[int, int], expected: tuple[int, int]) -> None:
    steps = sizes.multiples(settings("wan2.1-i2v-14b"))
    assert sizes.of_image(image, 832 * 480, steps) == expected


def test_an_image_like_a_line_has_no_size() -> None:
    with pytest.raises(UserError, match=r"the image is 10000 x 1 pixels, too narrow .* say --aspect"):
        sizes.of_image((10_000, 1), 832 * 480, (16, 16))


def test_a_network_with_learned_positions_says_its_limit() -> None:
    tiny = {
        "media": "images",
        "network": {"patch": [1, 1, 1], "positions": [3, 3, 3]},
        "codec": settings_of("codec", "cells"),
    }
    sizes.check(tiny, (48, 48), 1)
    with pytest.raises(
        UserError, match=r"1 frames of 64 x 48 pixels are \[1, 3, 4\] tokens .* positions for \[3, 3, 3\]"
    ):
        sizes.check(tiny, (64, 48), 1)
