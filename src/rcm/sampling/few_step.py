"""The few steps of a consistency function, in training and for inference alike.

Shapes: K steps, B samples.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rcm.flow import per_sample


def few_step_times(
    sigma_max: float, mid_times: Sequence[float], steps: int, eight_mid_times: Sequence[float] | None = None
) -> list[float]:
    """The first `steps` of the TrigFlow times atan(sigma_max), *mid_times; for 8 steps *eight_mid_times, where given.

    Raises ValueError where there are no times for so many steps, or where they rise.
    """
    lists = dict.fromkeys(range(1, len(mid_times) + 2), mid_times)
    allowed = f"1 to {len(lists)}"
    if eight_mid_times is not None:
        if len(eight_mid_times) != 7:
            raise ValueError(f"eight_mid_times has {len(eight_mid_times)} times, must have 7")
        lists[8], allowed = eight_mid_times, f"{allowed} and 8"
    if steps not in lists:
        raise ValueError(f"{steps} steps asked for, the sampler has times for {allowed}")
    times = [math.atan(sigma_max), *lists[steps]]
    if (highest := max(times)) > times[0]:
        raise ValueError(
            f"the sampling time {highest} lies above the first, atan(sigma_max) = {times[0]:.4g}: "
            f"sigma_max is {sigma_max}, must be at least {math.tan(highest):.4g}"
        )
    if not all(a >= b for a, b in pairwise(times)):
        raise ValueError(f"sampling times must not increase, they are {times}")
    return times[:steps]


def consistency_sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    times: Tensor | Sequence[float],
    noises: Tensor | Sequence[Tensor],
    *,
    ode: bool = False,
    grad_last: bool = False,
) -> Tensor:
    """x0 of shape (B, …), float64: denoise, add fresh noise, denoise again (Song et al. 2023, algorithm 1).

        x = ε_1;   x0 = f(x, t_k);   x = cos(t_k+1) x0 + sin(t_k+1) ε_k+1

    The start is x = ε also at t_1 < π/2, where x = sin(t_1) ε would be as good (the public code's): 8e-5 less at
    t_1 = atan(80).

    Args:
        denoise: f(x, t_B) -> x0.
        times: decreasing TrigFlow times, (K,) for all samples alike or (K, B).
        noises: ε, (K, B, …); the first alone for `ode`.
        ode: keep the noise that x0 leaves in x, (x - cos(t_k) x0) / sin(t_k), in the place of a fresh one. That is an
            Euler step of the flow, in rectified-flow time x ← x - (r - r') v: sharper but less robust, for I2V.
        grad_last: keep the graph of the last call (and of no other).
    """
    x = noises[0].double()
    times_KB = torch.as_tensor(times, dtype=torch.float64, device=x.device).view(len(times), -1).expand(-1, len(x))
    last = len(times_KB) - 1
    for k, t_B in enumerate(times_KB):
        with torch.set_grad_enabled(grad_last and k == last):
            x0 = denoise(x, t_B)
        if k < last:
            t, following = per_sample(t_B, x0), per_sample(times_KB[k + 1], x0)
            noise = (x - t.cos() * x0) / t.sin() if ode else noises[k + 1]
            x = following.cos() * x0 + following.sin() * noise
    return x0
