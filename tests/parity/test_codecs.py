"""The video autoencoder against diffusers' AutoencoderKLWan, whose parameters have other names."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from rcm.codecs import WanVAE, build
from rcm.tree import settings_of

TOLERANCE = 1e-5  # of the largest value, float32
WIDTH = 8


def theirs_of(name: str) -> str:
    """diffusers' name of an official parameter."""
    name = re.sub(r"^conv1\.", "quant_conv.", name)
    name = re.sub(r"^conv2\.", "post_quant_conv.", name)
    name = name.replace("coder.conv1.", "coder.conv_in.").replace(".head.0.", ".norm_out.")
    name = name.replace(".head.2.", ".conv_out.").replace(".middle.1.", ".mid_block.attentions.0.")
    name = re.sub(r"\.middle\.([02])\.", lambda m: f".mid_block.resnets.{int(m[1]) // 2}.", name)
    name = name.replace(".downsamples.", ".down_blocks.")
    name = re.sub(r"\.upsamples\.(\d+)\.re(sample|sidual)\.", _up, name)
    name = re.sub(r"\.upsamples\.(\d+)\.(shortcut|time_conv)\.", _up, name)
    for official, other in (("0", "norm1"), ("2", "conv1"), ("3", "norm2"), ("6", "conv2")):
        name = name.replace(f".residual.{official}.", f".{other}.")
    return name.replace(".shortcut.", ".conv_shortcut.")


def _up(match: re.Match[str]) -> str:
    """Four layers in a row of the decoder, three residual blocks and an upsampler, are a block of diffusers'."""
    block, place = divmod(int(match[1]), 4)
    return f".up_blocks.{block}.{'upsamplers.0' if place == 3 else f'resnets.{place}'}." + match[0].split(".", 3)[3]


def ours_of(name: str) -> str:
    """The official name of diffusers' parameter."""
    name = re.sub(r"^quant_conv\.", "conv1.", name)
    name = re.sub(r"^post_quant_conv\.", "conv2.", name)
    name = re.sub(r"\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f".upsamples.{4 * int(m[1]) + int(m[2])}.", name)
    name = re.sub(r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f".upsamples.{4 * int(m[1]) + 3}.", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda m: f".middle.{2 * int(m[1])}.", name)
    name = name.replace(".mid_block.attentions.0.", ".middle.1.").replace(".down_blocks.", ".downsamples.")
    for official, other in (("0", "norm1"), ("2", "conv1"), ("3", "norm2"), ("6", "conv2")):
        name = name.replace(f".{other}.", f".residual.{official}.")
    for official, other in (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out")):
        name = name.replace(f".{other}.", f".{official}.")
    return name.replace(".conv_shortcut.", ".shortcut.")


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def pair() -> tuple[WanVAE, AutoencoderKLWan]:
    """Ours and theirs with the same weights, small and random, and nothing at its initial value."""
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(base_dim=WIDTH).eval()
    for parameter in theirs.parameters():
        centre = 1.0 if parameter.ndim in (3, 4) and parameter[0].numel() == 1 else 0.0  # gammas
        parameter.data.add_(0.1 * torch.randn_like(parameter)).add_(centre - parameter.data.mean() if centre else 0)
    ours = build(settings_of("codec", "wan2.1-vae") | {"width": WIDTH})
    ours.load_state_dict({ours_of(name): value for name, value in theirs.state_dict().items()})
    return ours, theirs


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < TOLERANCE, f"{error:.1e}"


def test_names_and_shapes_of_the_full_size_map_both_ways():
    with torch.device("meta"):
        ours, theirs = shapes(build("wan2.1-vae")), shapes(AutoencoderKLWan())
    assert {theirs_of(name): shape for name, shape in ours.items()} == theirs
    assert {ours_of(name): shape for name, shape in theirs.items()} == ours
    assert len({theirs_of(name) for name in ours}) == len(ours) == len(theirs) == 194


def test_mean_and_deviation_are_theirs(pair):
    ours, theirs = pair
    assert (ours.mean, ours.std) == (theirs.config.latents_mean, theirs.config.latents_std)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_latents_are_the_normalised_mode_of_their_posterior(pair, frames):
    ours, theirs = pair
    video = torch.rand(2, 3, frames, 40, 24) * 2 - 1
    with torch.no_grad():
        mode = theirs.encode(video).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (theirs.config.latents_mean, theirs.config.latents_std))
    assert_near(ours.encode(video), (mode - mean) / std)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_decoded_video_is_theirs(pair, frames):
    ours, theirs = pair
    latents = torch.randn(2, 16, 1 + (frames - 1) // 4, 5, 3)
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (theirs.config.latents_mean, theirs.config.latents_std))
    with torch.no_grad():
        expected = theirs.decode(latents * std + mean).sample
    decoded = ours.decode(latents)
    assert decoded.shape == (2, 3, frames, 40, 24)
    assert (expected.abs() == 1).float().mean() < 0.5 and expected.std() > 0.1  # not all is clamped, nor constant
    assert_near(decoded, expected)
