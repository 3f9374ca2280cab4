"""The Wan transformer: times, positions, and what it says of inputs that do not fit."""

import pytest
import torch

from rcm.networks import build

SIZES = {"width": 96, "mlp_width": 160, "layers": 2, "heads": 4, "text_width": 40, "time_width": 32}


def randomised(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
    return network


def test_a_time_for_every_frame_equals_one_time_where_all_agree():
    ours = randomised(build({"kind": "wan", **SIZES}), 0)
    latents, text = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 7, 40)
    time = torch.tensor([[100.0], [900.0]])
    assert torch.allclose(ours(latents, time, text), ours(latents, time.expand(-1, 3), text), atol=1e-5)
    mixed = time.expand(-1, 3).clone()
    mixed[:, 1] += 300
    assert not torch.allclose(ours(latents, time, text), ours(latents, mixed, text), atol=1e-3)


def test_absolute_positions_tell_cells_apart_where_the_input_does_not():
    sizes = {**SIZES, "in_channels": 4, "out_channels": 4, "patch": (1, 1, 1)}
    blank, time, text = torch.zeros(1, 4, 1, 3, 3), torch.zeros(1, 1), torch.randn(1, 5, 40)
    plain = randomised(build({"kind": "wan", **sizes}), 2)(blank, time, text)
    placed = randomised(build({"kind": "wan", **sizes, "positions": (1, 3, 3)}), 2)(blank, time, text)
    assert plain.flatten(2).std(-1).max() < 1e-5
    assert placed.flatten(2).std(-1).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 5}, "width 96 does not split into 5 heads"), ({"kind": "unet"}, "unknown network kind 'unet'")],
)
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build({"kind": "wan", **SIZES, **change})


def test_inputs_that_do_not_fit_are_named():
    network = build({"kind": "wan", **SIZES})
    text = torch.zeros(1, 2, 40)
    with pytest.raises(ValueError, match="do not divide into patches"):
        network(torch.zeros(1, 16, 1, 5, 4), torch.zeros(1, 1), text)
    with pytest.raises(ValueError, match="time must be"):
        network(torch.zeros(1, 16, 3, 4, 4), torch.zeros(1, 2), text)
