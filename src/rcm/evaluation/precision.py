"""Rounding in a network and in its tangent, as figure 11 of the paper (arXiv 2510.08431) shows it for bfloat16.

The error of a precision is ‖y - y*‖ / ‖y*‖ over the elements of a sample, y* in float64. Two outputs are looked at:
the TrigFlow velocity F, and the tangent C S dF/dt (C = cos t, S = sin t) that the sCM loss takes, along the teacher's
guided velocity. Only the network differs: wrapping, points and directions are float64 and the same for all.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from rcm import dual
from rcm.flow import Wrapped, guided_velocity, per_sample

OUTPUTS = ("output", "tangent")
QUARTILES = {"low": 0.25, "median": 0.5, "high": 0.75}


class TimeInBfloat16(nn.Module):
    """A network whose time is rounded before it is embedded, as the authors' public code casts it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.time_scale = network, network.time_scale

    def forward(self, latents_BCTHW: Tensor, time_BP: Tensor, text_BLD: Tensor) -> Tensor:
        return self.network(latents_BCTHW, time_BP.bfloat16(), text_BLD)


def precise_time(network: nn.Module) -> nn.Module:
    """The network in bfloat16, except for what it computes from its time."""
    names: Any = network.bfloat16().precise
    for name in names:
        getattr(network, name).float()
    return network


PRECISIONS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "float32": lambda network: network.float(),
    "bfloat16, time in float32": precise_time,
    "bfloat16": lambda network: TimeInBfloat16(network.bfloat16()),
}


def middles(count: int) -> list[float]:
    """The middles of equal parts of [0, π/2]: at its ends the tangent is zero, and has no relative error."""
    return [(k + 0.5) * math.pi / 2 / count for k in range(count)]


@torch.no_grad()
def rounding_errors(
    network: nn.Module,
    teacher: nn.Module,
    x0_BCTHW: Tensor,
    noise_BCTHW: Tensor,
    text_BLD: Tensor,
    null_text: Tensor,
    *,
    guidance: float,
    times: list[float],
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Quartiles over the samples at each trig time: {precision: {output | tangent: {low | median | high: [...]}}}.

    Points are C x0 + S noise, on the device of x0, which is that of the networks. `teacher` gives the direction with
    `guidance`, `null_text` (1, L, D) is the empty prompt; `advance` is told of each time that is done.
    """
    noise_BCTHW, text_BLD, null_text = (x.to(x0_BCTHW.device) for x in (noise_BCTHW, text_BLD, null_text))
    exact, guide = (Wrapped(deepcopy(net).double()) for net in (network, teacher))
    rounded = {name: Wrapped(cast(deepcopy(network))) for name, cast in PRECISIONS.items()}
    found: dict[str, dict[str, list[Tensor]]] = {name: {key: [] for key in OUTPUTS} for name in rounded}
    for time in times:
        t_B = torch.full((len(x0_BCTHW),), time, dtype=torch.float64, device=x0_BCTHW.device)
        t = per_sample(t_B, x0_BCTHW)
        x = t.cos() * x0_BCTHW.double() + t.sin() * noise_BCTHW.double()
        direction = t.cos() * t.sin() * guided_velocity(guide, x, t_B, text_BLD, null_text, guidance)
        truth = _outputs(exact, x, t_B, text_BLD, direction)
        for name, net in rounded.items():
            for key, y, y_exact in zip(OUTPUTS, _outputs(net, x, t_B, text_BLD, direction), truth, strict=True):
                found[name][key].append(_norm(y - y_exact) / _norm(y_exact))
        advance(1)
    return {
        name: {
            key: {bound: torch.stack(errors).quantile(q, dim=1).tolist() for bound, q in QUARTILES.items()}
            for key, errors in of_name.items()
        }
        for name, of_name in found.items()
    }


def _outputs(net: Wrapped, x: Tensor, t_B: Tensor, text: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """F and C S dF/dt."""
    return dual.jvp(lambda x, t: net.velocity(x, t, text), (x, t_B), (direction, t_B.cos() * t_B.sin()))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
