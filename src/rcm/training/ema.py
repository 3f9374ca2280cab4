"""Power-function exponential moving average of weights (Karras et al. 2024, arXiv 2312.02696, section 3.1)."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from .sharded import local


def exponent(length: float) -> float:
    """gamma of the profile t^gamma whose standard deviation is the share `length` of the training so far.

    The largest real root of gamma^3 + 7 gamma^2 + (16 - length^-2) gamma + 12 - length^-2 = 0. Raises ValueError
    where there is no profile: `length` must lie in (0, 12^-1/2), the deviation of equal weights.
    """
    if not 0 < length < 12**-0.5:
        raise ValueError(f"the length of the EMA must lie between 0 and {12**-0.5:.4f}, got {length}")
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real[np.abs(roots.imag) < 1e-9].max())


class PowerEMA:
    """Average of a network's parameters over its updates, `decay(k) = (1 - 1 / (k + 1))^(gamma + 1)` at update k.

    Unrolled, the weights before the first update (m = 0) and after update m enter the average after update k with
    ((m + 1)^(gamma + 1) - m^(gamma + 1)) / (k + 1)^(gamma + 1).
    """

    def __init__(self, network: nn.Module, length: float):
        self.exponent = exponent(length)
        self.parameters = dict(network.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    def decay(self, update: int) -> float:
        return (1 - 1 / (update + 1)) ** (self.exponent + 1)

    @torch.no_grad()
    def step(self, update: int) -> None:
        """Take in the weights after update number `update`, counted from 1."""
        average, now = ([local(x) for x in tensors.values()] for tensors in (self.average, self.parameters))
        torch._foreach_lerp_(average, now, 1 - self.decay(update))

    @torch.no_grad()
    def copy_to_network(self) -> None:
        """Give the network the averaged weights."""
        for name, parameter in self.parameters.items():
            local(parameter).copy_(local(self.average[name]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network carries the averaged weights inside the `with` block, its own again behind it."""
        own = [local(p).clone() for p in self.parameters.values()]
        self.copy_to_network()
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters.values(), own, strict=True):
                local(parameter).copy_(value)
