"""The derivative of a network along the teacher's trajectory: exact, or by finite differences (paper, section 3.3)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rcm import dual
from rcm.flow import per_sample
from rcm.objectives.loss import check

DERIVATIVES = ("exact", "semi_continuous", "discrete")


def along_trajectory(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_BCTHW: Tensor,
    t_B: Tensor,
    direction_BCTHW: Tensor,
    rate_B: Tensor,
    *,
    derivative: str = "exact",
    step: float = 1e-4,
    graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """F(x, t) and rate · dF/dt, where x moves with dx/dt = direction = F*; both float64, shaped as x.

        exact            one forward-mode pass along (rate F*, rate) in space and time
        semi_continuous  forward mode in space alone, and (cos δ F(x, t) - F(x, t - δ)) / sin δ in time; two passes
        discrete         (cos δ F(x, t) - F(x', t - δ)) / sin δ with x' = cos δ x - sin δ F*; two plain passes

    The finite differences have an error of first order in the step δ (radians): -δ/2 (d²F/dt² + F) to leading order, in
    `discrete` with d²x/dt² = -x, as x' has it. To this comes the rounding of F over δ: the network must see its time in
    float32 or better.

    Args:
        velocity: F(x, t_B).
        rate_B: what the derivative is multiplied by, and what keeps the tangents small.
        graph: F(x, t) carries a graph; the derivative never does.
    """
    check("derivative", derivative, DERIVATIVES)
    x, t_B, rate = x_BCTHW.double(), t_B.double(), per_sample(rate_B, x_BCTHW)
    if derivative == "exact":
        return dual.jvp(velocity, (x, t_B), (rate * direction_BCTHW, rate_B), graph=graph)
    cos, sin = math.cos(step), math.sin(step)
    past = x if derivative == "semi_continuous" else cos * x - sin * direction_BCTHW
    with torch.no_grad():
        before = velocity(past, t_B - step)
    if derivative == "semi_continuous":
        now, in_space = dual.jvp(velocity, (x, t_B), (rate * direction_BCTHW, None), graph=graph)
    else:
        with torch.set_grad_enabled(graph):
            now, in_space = velocity(x, t_B), torch.zeros_like(x)
    return now, in_space + rate * (cos * now.detach() - before) / sin
