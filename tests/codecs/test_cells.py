"""The cell codec keeps what the world shows."""

import numpy as np
import pytest
import torch

from rcm.codecs import CellCodec, build, from_pixels, to_pixels
from rcm.data import prompts, world
from rcm.training.pretrain import pictures


def scenes(number: int, media: str, seed: int) -> torch.Tensor:
    weights = dict.fromkeys(prompts.TASKS, 1.0)
    metadatas = prompts.training_suite(prompts.TINY, seed=seed, number=number, weights=weights, media=media)
    return pictures(metadatas, seed, world.CLIP_FRAMES if media == "clips" else 1)


@pytest.fixture(scope="module")
def codec() -> CellCodec:
    fitted = CellCodec(channels=24, cell=16, stride=4)
    fitted.fit(scenes(1000, "images", 0)[:, :, 0])
    return fitted


@pytest.mark.parametrize("media", ["images", "clips"])
def test_decoding_gives_back_fresh_scenes(codec, media):
    video = scenes(60, media, 1)
    error = (to_pixels(codec.decode(codec.encode(video))).astype(float) - to_pixels(video)) ** 2
    assert np.sqrt(error.mean()) < 2.5  # grey levels
    assert np.sqrt(error.mean((1, 2, 3, 4))).max() < 6


def test_latents_have_unit_variance_and_the_shape_of_the_grid(codec):
    latents = codec.encode(scenes(300, "clips", 2))
    assert latents.shape == (300, 24, 3, 3, 3)
    images = codec.encode(scenes(1000, "images", 0))
    assert images.square().mean().item() == pytest.approx(1, abs=0.01)
    assert images.mean((0, 2, 3, 4)).abs().max() < 0.01


def test_components_are_those_of_the_covariance(codec):
    """numpy's SVD as the oracle."""
    cells = codec._cells(scenes(1000, "images", 0)).reshape(-1, 768).double().numpy()
    _, _, right = np.linalg.svd(cells - cells.mean(0), full_matrices=False)
    overlap = np.abs((codec.basis.double().numpy() * right[:24]).sum(1))
    assert overlap.min() > 0.99


def test_a_shape_that_moves_slides_and_another_that_appears_fades(codec):
    things = (world.Thing("circle", "red", (1, 0)),)
    slid = to_pixels(codec.decode(codec.encode(from_pixels(world.render(world.Scene(things, 50.0, "right"), 9)[None]))))
    red = slid[0, ..., 0].astype(int) - slid[0, ..., 2] > 100
    columns = [np.argwhere(frame)[:, 1].mean() for frame in red]
    assert np.allclose(np.diff(columns), 4, atol=0.3)
    empty = world.render(world.Scene((), 50.0))
    shown = world.render(world.Scene(things, 50.0))
    kept = from_pixels(np.concatenate([empty] * 4 + [shown])[None])
    faded = to_pixels(codec.decode(codec.encode(kept)))[0, :, 24, 8, 0].astype(float)
    assert np.allclose(np.diff(faded), (faded[-1] - faded[0]) / 4, atol=1.5)


def test_a_video_comes_to_the_device_of_the_codec():
    with torch.device("meta"):
        there = CellCodec(channels=24, cell=16, stride=4)
    assert there.encode(torch.zeros(1, 3, 5, 48, 48)).device.type == "meta"


def test_sizes_that_do_not_divide_are_named(codec):
    with pytest.raises(ValueError, match="need 1 \\+ 4k frames"):
        codec.encode(torch.zeros(1, 3, 4, 48, 48))
    with pytest.raises(ValueError, match="unknown codec kind 'vae'"):
        build({"kind": "vae"})
