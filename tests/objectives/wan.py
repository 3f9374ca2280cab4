"""A Wan transformer of a few thousand weights with random ones, none zero."""

import torch
from torch import Tensor, nn

from rcm import networks

WIDTH = 16
SIZES = {
    "kind": "wan",
    "width": WIDTH,
    "mlp_width": 24,
    "layers": 3,
    "heads": 2,
    "in_channels": 2,
    "out_channels": 2,
    "text_width": 4,
    "time_width": 8,
    "time_scale": 10.0,
}


def wan(seed: int = 0, **changes: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = networks.build(SIZES | changes).double()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
        return network


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
