"""The Cosmos-Predict2 transformer: positions, tangents, and what it says of inputs that do not fit."""

import math

import pytest
import torch
from torch import Tensor, nn

from rcm import dual, networks
from rcm.flow import Wrapped
from rcm.networks import build, cosmos

SIZES = {"kind": "cosmos", "width": 96, "mlp_width": 160, "layers": 2, "heads": 4, "text_width": 40, "adaln_width": 16}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomised(network: nn.Module) -> nn.Module:
    for seed, parameter in enumerate(network.parameters()):
        parameter.data = random(*parameter.shape, seed=seed, dtype=parameter.dtype) * 0.1
    return network


@pytest.mark.parametrize("heads", [1, 4])
def test_rotary_frequencies_have_the_published_base(heads: int) -> None:
    """10000 · scale^(d / (d - 2)) to the power of -2 k / d, with d channels for the axis: a third of the head."""
    size, scale = 96 // heads, (1.0, 4.0, 2.0)
    rows = size // 6 * 2
    angles = cosmos.stretched_angles(1, 2, 1, size, scale, torch.device("cpu"))[1]
    base = 10000 * 4 ** (rows / (rows - 2))
    expected = [base ** (-2 * k / rows) for k in range(rows // 2)]
    assert angles[(size - 2 * rows) // 2 :][: rows // 2].tolist() == pytest.approx(expected, rel=1e-12)
    assert angles[: (size - 2 * rows) // 2].abs().max() == angles[-(rows // 2) :].abs().max() == 0


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v


@pytest.fixture
def tiny() -> nn.Module:
    return randomised(
        build({**SIZES, "width": 32, "mlp_width": 48, "heads": 2, "in_channels": 3, "out_channels": 3}).double()
    )


@pytest.mark.parametrize("per_frame", [False, True])
def test_dual_pass_is_func_jvp_with_plain_attention(
    tiny: nn.Module, per_frame: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, text = random(2, 3, 3, 4, 4, seed=0), random(2, 5, 40, seed=1)
    time = random(2, 3 if per_frame else 1, seed=2).abs()
    tangents = random(2, 3, 3, 4, 4, seed=3), random(*time.shape, seed=4)
    result = dual.jvp(lambda x, t: tiny(x, t, text), (latents, time), tangents)
    monkeypatch.setattr(cosmos.Attention, "attend", staticmethod(plain_attention))
    expected = torch.func.jvp(lambda x, t: tiny(x, t, text), (latents, time), tangents)
    for value, exact in zip(result, expected, strict=True):
        assert exact.norm() > 0.1
        assert (value - exact).norm() < 1e-10 * exact.norm()


def test_tangent_is_a_finite_difference(tiny: nn.Module) -> None:
    """Of the wrapped network, along state and time together, against central differences."""
    wrapped, h = Wrapped(tiny), 1e-5
    x, tx, text = random(2, 3, 1, 4, 4, seed=0), random(2, 3, 1, 4, 4, seed=3), random(2, 5, 40, seed=1)
    t, tt = torch.tensor([0.4, 1.5], dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64)
    _, tangent = dual.jvp(lambda x, t: wrapped.velocity(x, t, text), (x, t), (tx, tt))
    with torch.no_grad():
        ahead, behind = (wrapped.velocity(x + s * tx, t + s * tt, text) for s in (h, -h))
    difference = (ahead - behind) / (2 * h)
    assert (tangent - difference).norm() < 1e-7 * difference.norm()


@pytest.mark.parametrize("part", ["t_embedder", "t_embedding_norm", "blocks.1.adaln_modulation_mlp"])
def test_the_time_reaches_a_rounded_network_unrounded(tiny: nn.Module, part: str) -> None:
    """bfloat16 tokens, float32 time: the modulation changes with it as in float64, though bfloat16 sees one time."""
    for parameter in tiny.parameters():
        parameter.data = parameter.data.bfloat16().double()
    x, text, times = random(1, 3, 1, 4, 4, seed=0), random(1, 5, 40, seed=1), torch.tensor([[0.75], [0.7501]])
    assert times.bfloat16().unique().numel() == 1
    outputs: list[Tensor] = []
    tiny.get_submodule(part).register_forward_hook(lambda _, inputs, output: outputs.append(output.double()))
    for dtype in (torch.float64, torch.bfloat16):
        for name, module in tiny.named_children():
            module.to(torch.float32 if name in tiny.precise and dtype == torch.bfloat16 else dtype)
        assert all(tiny(x, t[None], text).dtype == dtype for t in times)
    exact, rounded = outputs[1] - outputs[0], outputs[3] - outputs[2]
    assert (rounded - exact).norm() < 1e-2 * exact.norm()  # a difference of 1e-4 of float32 values


@pytest.mark.parametrize("change", [{"heads": 5}, {"width": 36, "heads": 4}])
def test_impossible_sizes_are_named(change: dict[str, int]) -> None:
    sizes = {**SIZES, **change}
    with pytest.raises(ValueError, match=f"width {sizes['width']} does not split into {sizes['heads']} heads"):
        networks.build(sizes)


def test_inputs_that_do_not_fit_are_named(tiny: nn.Module) -> None:
    text = torch.zeros(1, 2, 40)
    with pytest.raises(ValueError, match="do not divide into patches"):
        tiny(torch.zeros(1, 3, 1, 5, 4), torch.zeros(1, 1), text)
    with pytest.raises(ValueError, match="time must be"):
        tiny(torch.zeros(1, 3, 3, 4, 4), torch.zeros(1, 2), text)
