"""Samplers: few steps of a consistency function (in training and for inference alike), and Euler for the teacher.

Shapes: K steps, B samples. The state is float64; the noise is an argument, so that a sample depends on nothing else.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from rcm.flow import per_sample, shifted, sigma_to_rf


def few_step_times(sigma_max: float, mid_times: Sequence[float], steps: int) -> list[float]:
    """The first `steps` of the TrigFlow times atan(sigma_max), *mid_times; ValueError where there are fewer."""
    times = [math.atan(sigma_max), *mid_times]
    if not 1 <= steps <= len(times):
        raise ValueError(f"{steps} steps asked for, the sampler has times for 1 to {len(times)}")
    if times != sorted(times, reverse=True):
        raise ValueError(f"sampling times must not increase, they are {times}")
    return times[:steps]


def consistency_sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    times: Tensor | Sequence[float],
    noises: Tensor | Sequence[Tensor],
    *,
    grad_last: bool = False,
) -> Tensor:
    """x0 of shape (B, …), float64: denoise, add fresh noise, denoise again (Song et al. 2023, algorithm 1).

        x = ε_1;   x0 = f(x, t_k);   x = cos(t_k+1) x0 + sin(t_k+1) ε_k+1

    Args:
        denoise: f(x, t_B) -> x0.
        times: decreasing TrigFlow times, (K,) for all samples alike or (K, B).
        noises: ε, (K, B, …).
        grad_last: keep the graph of the last call (and of no other).
    """
    x = noises[0].double()
    times_KB = torch.as_tensor(times, dtype=torch.float64, device=x.device).view(len(times), -1).expand(-1, len(x))
    last = len(times_KB) - 1
    for k, t_B in enumerate(times_KB):
        with torch.set_grad_enabled(grad_last and k == last):
            x0 = denoise(x, t_B)
        if k < last:
            t = per_sample(times_KB[k + 1], x0)
            x = t.cos() * x0 + t.sin() * noises[k + 1]
    return x0


@torch.no_grad()
def euler_sample(
    velocity_rf: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int,
    shift: float,
    sigma_max: float,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """x0 by Euler steps of the probability flow dx/dr = v(x, r) from r = sigma_max / (1 + sigma_max) to 0, float64.

    The grid is even in u, with r = shift · u / (1 + (shift - 1) u).

    Args:
        velocity_rf: v(x, r_B), guidance included.
        noise: (B, …).
        progress: wraps the steps, e.g. `tqdm`.
    """
    r_max = sigma_to_rf(sigma_max)
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64) * shifted(r_max, 1 / shift)
    grid = shifted(u, shift).tolist()
    x = noise.double()
    for k in progress(range(steps)) if progress else range(steps):
        r_B = x.new_full((len(x),), grid[k])
        x = x + (grid[k + 1] - grid[k]) * velocity_rf(x, r_B)
    return x
