"""Rounding errors of networks whose rounding is known beforehand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rcm import networks
from rcm.evaluation.precision import PRECISIONS, middles, rounding_errors

TEXT = torch.zeros(1, 1, 1)
Errors = dict[str, dict[str, dict[str, list[float]]]]


class Toy(nn.Module):
    """v = a x + b r', r' the time that the network is given; `b` belongs to the path of the time."""

    time_scale = 1000.0
    precise = ("time",)

    def __init__(self, a: float, b: float):
        super().__init__()
        self.tokens, self.time = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for layer, value in ((self.tokens, a), (self.time, b)):
            nn.init.constant_(layer.weight, value)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.tokens(x.to(self.tokens.weight.dtype)[..., None])[..., 0]
        return x + self.time(time.to(self.time.weight.dtype)).view(-1, 1, 1, 1, 1)


def errors(network: nn.Module, x0: Tensor, times: list[float], guidance: float = 1.0) -> Errors:
    return rounding_errors(network, network, x0, torch.zeros_like(x0), TEXT, TEXT, guidance=guidance, times=times)


def in_bfloat16(x: np.ndarray) -> np.ndarray:
    """To the nearest number with eight significant bits, ties to even: float32 without its lower half."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(float)


def test_middles() -> None:
    assert middles(2) == pytest.approx([math.pi / 8, 3 * math.pi / 8], abs=1e-15)
    assert len(middles(100)) == 100 and middles(100)[0] > 0 and middles(100)[-1] < math.pi / 2


def test_output_error_is_that_of_rounding_the_latents() -> None:
    x0 = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = errors(Toy(1.0, 0.0), x0, [math.pi / 4])  # there C = S, so F = b v
    x = x0.flatten(1).numpy() / 2  # b C x0, b = 1 / (C + S)
    expected = np.linalg.norm(in_bfloat16(x) - x, axis=1) / np.linalg.norm(x, axis=1)
    for name in ("bfloat16", "bfloat16, time in float32"):
        got = found[name]["output"]
        quartiles = np.quantile(expected, [0.25, 0.5, 0.75])
        assert [got["low"][0], got["median"][0], got["high"][0]] == pytest.approx(quartiles.tolist(), rel=1e-6)
    assert found["float32"]["output"]["high"][0] < 1e-7


def test_a_rounded_time_is_that_of_the_public_code() -> None:
    sigma = 80.0  # 1000 r = 987.654..., whose neighbours in bfloat16 are 984 and 988
    found = errors(Toy(0.0, 1.0), torch.zeros(2, 1, 1, 1, 1), [math.atan(sigma)])
    exact = 1000 * sigma / (1 + sigma)
    assert found["bfloat16"]["output"]["median"][0] == pytest.approx((988 - exact) / exact, rel=1e-6)
    assert found["bfloat16, time in float32"]["output"]["median"][0] < 1e-7


def test_tangent_error_is_that_of_a_rounded_weight() -> None:
    a = 1 + 2**-9  # halfway between two numbers of bfloat16, goes to 1
    found = errors(Toy(a, 0.0), torch.ones(2, 1, 1, 1, 1), [math.pi / 4])
    # F = ((C - S) b + a b²) x with b = 1 / (C + S); at π/4 b² = 1/2, d(b²)/dt = 0 and d((C - S) b)/dt = -1, so that
    # C S dF/dt = (a/2 F* - x) / 2 with F* = F = a/2 x. The network is given b C S F* = F* / (2 √2), rounded.
    x, given = math.cos(math.pi / 4), a / 2 * math.cos(math.pi / 4) / (2 * math.sqrt(2))
    rounded = float(in_bfloat16(np.array(given)))
    expected = abs(rounded - a * given) / math.sqrt(2) / abs((a * given) / math.sqrt(2) - x / 2)
    assert found["bfloat16"]["tangent"]["median"][0] == pytest.approx(expected, rel=1e-5)


def test_all_comes_to_the_device_of_the_networks() -> None:
    """Noise and texts are made on the CPU; the meta device stands for a GPU, until numbers are read."""

    class Reading(Toy):
        def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            return super().forward(x, time, text) + text[..., None, None]

    class Done(Exception):
        pass

    def done(count: int) -> None:
        raise Done

    network, texts = Reading(1.0, 1.0).to("meta"), (torch.zeros(2, 1, 1), TEXT)
    with pytest.raises(Done):
        x0, noise = torch.zeros(2, 1, 1, 1, 1, device="meta"), torch.zeros(2, 1, 1, 1, 1)
        rounding_errors(network, network, x0, noise, *texts, guidance=2.0, times=[1.0], advance=done)


def test_a_transformer_in_every_precision() -> None:
    sizes = {"width": 16, "mlp_width": 16, "layers": 1, "heads": 2, "in_channels": 4, "out_channels": 4}
    rest = {"text_width": 8, "time_width": 8, "patch": [1, 1, 1], "time_scale": 1000.0, "positions": None}
    torch.manual_seed(0)
    network = networks.build({"kind": "wan", **sizes, **rest})
    nn.init.normal_(network.head.head.weight, std=0.1)
    x0, noise = torch.randn(2, 2, 4, 1, 3, 3).unbind()
    text = torch.randn(2, 3, 8)
    done: list[int] = []
    found = rounding_errors(
        network, network, x0, noise, text, torch.zeros(1, 3, 8), guidance=2.0, times=[0.5, 1.2], advance=done.append
    )
    assert done == [1, 1] and list(found) == list(PRECISIONS)
    worst = {name: max(of["tangent"]["high"]) for name, of in found.items()}
    assert worst["float32"] < 1e-4 < worst["bfloat16, time in float32"] < worst["bfloat16"] < 10
    assert {p.dtype for p in network.parameters()} == {torch.float32}  # the network itself is left alone
