"""Tangents through the ordinary network: dual tensors against `torch.func.jvp` with plain attention, in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from rcm import dual, networks
from rcm.flow import Wrapped
from rcm.networks import wan

SIZES = {
    "kind": "wan",
    "width": 32,
    "mlp_width": 48,
    "layers": 2,
    "heads": 2,
    "in_channels": 3,
    "out_channels": 3,
    "text_width": 6,
    "time_width": 16,
    "time_scale": 10.0,
}


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v


def build(**changes: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.build(SIZES | changes).double()
        nn.init.normal_(network.head.head.weight, std=0.3)  # zero at the start of a training: nothing to compare
        return network


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "changes",
    [
        {"patch": (1, 2, 2)},
        {"patch": (1, 1, 1), "positions": (3, 4, 4)},
        {"in_channels": 8, "image_width": 10},
        {"in_channels": 8},
    ],
    ids=["official layout", "absolute positions", "Wan2.1 image-to-video", "Wan2.2 image-to-video"],
)
@pytest.mark.parametrize("per_frame", [False, True])
def test_dual_pass_is_func_jvp_with_plain_attention(
    changes: dict[str, object], per_frame: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build(**changes)
    latents, text = random(2, 3, 3, 4, 4), random(2, 5, 6, seed=1)
    time = random(2, 3 if per_frame else 1, seed=2).abs()
    image = random(2, 7, 10, seed=6) if "image_width" in changes else None
    given = [None, random(2, 5, 3, 4, 4, seed=5), image] if "in_channels" in changes else []
    tangents = random(2, 3, 3, 4, 4, seed=3), random(*time.shape, seed=4)
    result = dual.jvp(lambda x, t: network(x, t, text, *given), (latents, time), tangents)
    monkeypatch.setattr(wan.Attention, "attend", staticmethod(plain_attention))
    expected = torch.func.jvp(lambda x, t: network(x, t, text, *given), (latents, time), tangents)
    for value, exact in zip(result, expected, strict=True):
        assert exact.norm() > 0.1
        assert (value - exact).norm() < 1e-10 * exact.norm()


def test_derivative_in_time_is_a_finite_difference() -> None:
    """The wrapped network at float64 against central differences in t alone: the time reaches it unrounded."""
    wrapped, h = Wrapped(build()), 1e-5
    x, text = random(2, 3, 1, 4, 4), random(2, 5, 6, seed=1)
    t = torch.tensor([0.4, 1.5], dtype=torch.float64)
    _, derivative = dual.jvp(lambda t: wrapped.velocity(x, t, text), (t,), (torch.ones_like(t),))
    with torch.no_grad():
        difference = (wrapped.velocity(x, t + h, text) - wrapped.velocity(x, t - h, text)) / (2 * h)
    assert (derivative - difference).norm() < 1e-7 * difference.norm()


def test_float32_network_keeps_the_tangent_to_single_precision() -> None:
    network = build()
    x, text = random(2, 3, 1, 4, 4), random(2, 5, 6, seed=1)
    t, tangents = torch.tensor([0.4, 1.5], dtype=torch.float64), (random(2, 3, 1, 4, 4, seed=3), torch.ones(2).double())
    _, exact = dual.jvp(lambda x, t: Wrapped(network).velocity(x, t, text), (x, t), tangents)
    network.float()
    _, derivative = dual.jvp(lambda x, t: Wrapped(network).velocity(x, t, text), (x, t), tangents)
    assert (derivative - exact).norm() < 1e-5 * exact.norm()


def test_gradients_after_a_dual_pass_are_untouched() -> None:
    network = build()
    x, time, text = random(2, 3, 1, 4, 4), random(2, 1, seed=2).abs(), random(2, 5, 6, seed=1)
    weights = list(network.parameters())
    before = torch.autograd.grad(network(x, time, text).square().sum(), weights)
    _, tangent = dual.jvp(lambda x, t: network(x, t, text), (x, time), (x, time))
    after = torch.autograd.grad(network(x, time, text).square().sum(), weights)
    assert not tangent.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
