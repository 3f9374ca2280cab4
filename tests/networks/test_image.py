"""Image-to-video: where condition and image go, and how a sampler gets such a network."""

import pytest
import torch
from torch import Tensor, nn

from rcm.flow import Wrapped, guided
from rcm.networks import Conditioned, build

SIZES = {
    "kind": "wan",
    "width": 32,
    "mlp_width": 48,
    "layers": 2,
    "heads": 2,
    "in_channels": 8,
    "out_channels": 3,
    "text_width": 6,
    "time_width": 16,
    "image_width": 10,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def network() -> nn.Module:
    built = build(SIZES).double()
    for seed, parameter in enumerate(built.parameters()):
        parameter.data = random(*parameter.shape, seed=seed) * 0.3
    return built.requires_grad_(False)


LATENTS, TEXT, TIME = random(2, 3, 2, 4, 4), random(2, 5, 6, seed=1), torch.tensor([[300.0], [900.0]])
CONDITION, IMAGE = random(2, 5, 2, 4, 4, seed=2), random(2, 7, 10, seed=3)


def test_the_condition_is_behind_the_latents(network: nn.Module) -> None:
    velocity = network(LATENTS, TIME, TEXT, condition_BCTHW=CONDITION, image_BLD=IMAGE)
    whole = network(torch.cat([LATENTS, CONDITION], dim=1), TIME, TEXT, image_BLD=IMAGE)
    assert velocity.shape == LATENTS.shape
    assert torch.equal(velocity, whole)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_guided_batch_has_its_conditions_twice(network: nn.Module, samples: int) -> None:
    condition, image = CONDITION[:samples], IMAGE[:samples]
    wrapped = Wrapped(Conditioned(network, condition_BCTHW=condition, image_BLD=image))
    r, null = torch.tensor([0.3, 0.9], dtype=torch.float64), random(1, 5, 6, seed=4)
    found = guided(wrapped.rf_velocity, LATENTS, r, TEXT, null, 5.0)
    every = [condition.expand(2, -1, -1, -1, -1), image.expand(2, -1, -1)]
    with_text, without = (
        network(LATENTS, r[:, None] * 1000, text, None, *every) for text in (TEXT, null.expand(2, -1, -1))
    )
    torch.testing.assert_close(found, without + 5 * (with_text - without), rtol=1e-12, atol=1e-12)


def test_conditions_are_no_weights(network: nn.Module) -> None:
    conditioned = Conditioned(network, condition_BCTHW=CONDITION)
    assert conditioned.time_scale == 1000
    assert conditioned.state_dict().keys() == {f"network.{name}" for name in network.state_dict()}


def test_conditions_that_do_not_fit_are_named(network: nn.Module) -> None:
    plain = build({**SIZES, "image_width": None}).double()
    with pytest.raises(ValueError, match="latents and condition have 3 channels, the network takes 8"):
        network(LATENTS, TIME, TEXT, image_BLD=IMAGE)
    with pytest.raises(ValueError, match="the network takes the features of an image"):
        network(LATENTS, TIME, TEXT, condition_BCTHW=CONDITION)
    with pytest.raises(ValueError, match="the network takes no features of an image"):
        plain(LATENTS, TIME, TEXT, condition_BCTHW=CONDITION, image_BLD=IMAGE)
    with pytest.raises(ValueError, match="a batch of 3 samples cannot share conditions of 2"):
        Conditioned(plain, condition_BCTHW=CONDITION)(random(3, 3, 2, 4, 4), TIME[:1].expand(3, 1), TEXT[:1])
