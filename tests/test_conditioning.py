"""Conditions of image-to-video networks, against diffusers' pipeline and autoencoder; experts and their boundary."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rcm.cli.models import home
from rcm.conditioning import Experts, first_frame_condition
from rcm.networks import Conditioned


class DiffusersCodec:
    """diffusers' autoencoder with the interface of a codec here."""

    stride = 4

    def __init__(self) -> None:
        from diffusers import AutoencoderKLWan

        torch.manual_seed(0)
        self.vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=16).eval()

    @torch.no_grad()
    def encode(self, video_B3FHW: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return (self.vae.encode(video_B3FHW).latent_dist.mode() - mean) / std


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_the_condition_is_that_of_diffusers(frames: int) -> None:
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

    codec = DiffusersCodec()
    pipeline = WanImageToVideoPipeline(None, None, codec.vae, UniPCMultistepScheduler())
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    ours = first_frame_condition(codec, image, frames)
    with torch.no_grad():
        _, theirs = pipeline.prepare_latents(image, 1, 16, 32, 48, frames, torch.float32, torch.device("cpu"))
    assert ours.shape == (1, 20, 1 + (frames - 1) // 4, 4, 6)
    assert torch.equal(ours[:, :4], theirs[:, :4])
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


class Constant(nn.Module):
    """A network that answers with a number."""

    time_scale = 1000.0

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(
        self, latents: Tensor, time: Tensor, text: Tensor, *_: Tensor | None, condition: Tensor | None = None
    ) -> Tensor:
        return latents * 0 + self.value + (0 if condition is None else condition)


def test_the_expert_follows_from_the_time() -> None:
    experts = Experts(Constant(2.0), Constant(1.0), boundary=0.9)
    x, text = torch.zeros(2, 1, 1, 1, 1), torch.zeros(2, 1, 1)
    for time, expected in ((1000, 2), (900.0, 2), (899.99, 1), (0, 1)):
        assert experts(x, torch.full((2, 1), float(time)), text).unique().item() == expected
    assert experts(x, torch.zeros(2, 1), text, condition=torch.ones_like(x)).unique().item() == 2
    with pytest.raises(ValueError, match=r"both sides of the boundary 0\.9"):
        experts(x, torch.tensor([[950.0], [850.0]]), text)


def test_an_expert_waits_on_the_cpu_for_its_turn() -> None:
    """The meta device stands for a GPU; what samples through a pair computes there, whichever expert is there."""
    moves: list[tuple[int, str]] = []

    class Spy(Constant):
        def to(self, device: torch.device | str) -> nn.Module:  # type: ignore[override]
            moves.append((int(self.number), str(device)))
            self.value = nn.Parameter(torch.empty((), device=device))
            return self

    high, low = Spy(2.0), Spy(1.0)
    high.number, low.number = 2, 1
    high.to("meta")
    condition = torch.zeros(1, 1, 1, 1, 1, device="meta")
    pair = Conditioned(Experts(high, low, boundary=0.9), condition_BCTHW=condition)
    x, text = torch.zeros(1, 1, 1, 1, 1, device="meta"), torch.zeros(1, 1, 1)
    moves.clear()
    for time in (990.0, 910.0, 890.0, 10.0, 990.0):
        assert home(pair).type == "meta"
        pair(x, torch.tensor([[time]]), text)
    assert moves == [(2, "cpu"), (1, "meta"), (1, "cpu"), (2, "meta")]


def test_a_wrapped_pair_samples_as_the_original_switches() -> None:
    """Over a sampler's steps: high while r >= 0.9, low afterwards, whatever the parameterisation around it."""
    from rcm.flow import Wrapped, rf_to_trig

    wrapped = Wrapped(Experts(Constant(2.0).double(), Constant(1.0).double(), 0.9))
    x, text = torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1)
    for r in np.linspace(0.999, 0.001, 9):
        velocity = -wrapped.denoise(x, rf_to_trig(r).view(1), text) / r  # f = b x - r v
        assert velocity.item() == pytest.approx(2.0 if r >= 0.9 else 1.0)
