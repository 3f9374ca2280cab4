"""Samplers of a teacher: along its probability flow dx/dr = v(x, r), on a grid of falling times.

States and times are those of the rectified flow, x_r = (1 - r) x0 + r ε. Shapes: B samples, N steps.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from rcm.flow import shifted, sigma_to_rf

Velocity = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[Iterable[int]], Iterable[int]]

COSMOS_SIGMA_MIN, COSMOS_RHO = 0.002, 7


def shifted_grid(steps: int, shift: float, sigma_max: float) -> list[float]:
    """N + 1 times r = shift · u / (1 + (shift - 1) u), even in u, from r = sigma_max / (1 + sigma_max) to 0.

    The grid of the authors' code. sigma_max = 999 · shift is that of Wan2.1's own scheduler, which begins at u = 0.999
    (and hands the network 1000 r without its fraction); sigma_max = inf begins at r = 1.
    """
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64) * shifted(sigma_to_rf(sigma_max), 1 / shift)
    return shifted(u, shift).tolist()


def cosmos_grid(steps: int, sigma_max: float) -> list[float]:
    """N times r = σ / (1 + σ), with σ^(1/7) even from sigma_max to 0.002 (Karras et al. 2022, equation 5)."""
    highest, lowest = sigma_max ** (1 / COSMOS_RHO), COSMOS_SIGMA_MIN ** (1 / COSMOS_RHO)
    return sigma_to_rf(torch.linspace(highest, lowest, steps, dtype=torch.float64) ** COSMOS_RHO).tolist()


def _euler(velocity_rf: Velocity, x: Tensor, grid: list[float], steps: Iterable[int]) -> Tensor:
    for k in steps:
        x = x + (grid[k + 1] - grid[k]) * velocity_rf(x, x.new_full((len(x),), grid[k]))
    return x


def _unipc(velocity_rf: Velocity, x: Tensor, grid: list[float], steps: Iterable[int]) -> Tensor:
    """UniPC-2 with B(h) = e^h - 1 and predicted data (Zhao et al. 2023).

    With m = x - r v, and h the length of a step in ln((1 - r) / r), every step is a straight line towards a target d:

        x' = d + (r' / r) (x - d),   d = m + ρ₁ D + ρ₂ (m' - m),   D = (m - m_before) h / h_before.

    It is predicted with ρ = (1/2, 0) and, once m' is known at the prediction, taken again from the same x with the ρ of
    the corrector; the next step begins there. The first and the last step have no D, the last no corrector.
    """
    signal = (-torch.tensor(grid, dtype=torch.float64).logit()).tolist()
    h = [after - before for before, after in pairwise(signal)]

    def line(k: int, start: Tensor, target: Tensor) -> Tensor:
        return target + grid[k + 1] / grid[k] * (start - target)

    start = data_before = slope = torch.zeros_like(x)
    for k in steps:
        data = x - grid[k] * velocity_rf(x, x.new_full((len(x),), grid[k]))
        if k > 0:
            rho_1, rho_2 = _corrector(h[k - 1], h[k - 2]) if k > 1 else (0.0, 0.5)
            x = line(k - 1, start, data_before + rho_1 * slope + rho_2 * (data - data_before))
        middle = 0 < k < len(h) - 1
        slope = (data - data_before) * (h[k] / h[k - 1]) if middle else torch.zeros_like(x)
        start, data_before, x = x, data, line(k, x, data + slope / 2)
    return x


def _corrector(h: float, h_before: float) -> tuple[float, float]:
    """(ρ₁, ρ₂), exact for m of second degree in ln((1 - r) / r): ρ₁ + ρ₂ = b₁ and -(h_before / h) ρ₁ + ρ₂ = b₂."""
    b_1 = -1 / h - 1 / math.expm1(-h)
    b_2 = -2 * b_1 / h - 1 / math.expm1(-h)
    rho_1 = (b_1 - b_2) / (1 + h_before / h)
    return rho_1, b_1 - rho_1


@torch.no_grad()
def teacher_sample(
    velocity_rf: Velocity,
    noise: Tensor,
    *,
    sampler: str,
    steps: int,
    shift: float,
    sigma_max: float,
    progress: Progress | None = None,
) -> Tensor:
    """x0 (B, …), float64, along the teacher's probability flow from σ = sigma_max.

    euler, as the authors made the synthetic data, and unipc, as Wan2.1's teachers are sampled, begin with x_r = ε on
    `shifted_grid`. cosmos is how diffusers samples Cosmos-Predict2's text-to-image teachers: Euler steps of
    x_σ = x_r / (1 - r) in σ, which are Euler steps of x_r in r, on `cosmos_grid`, from x_σ = sigma_max ε. It ends with
    x_σ at σ = 0.002; the last of its N steps, which goes from there to there, is left out with its call of the network.

    Args:
        velocity_rf: v(x, r_B), guidance included.
        noise: ε, (B, …).
        sampler: euler, unipc or cosmos.
        shift: of the grid; 1 for cosmos, which has none.
        progress: wraps the numbers of the steps, e.g. `tqdm`.

    Raises ValueError for another sampler, too few steps, or a shift or sigma_max that it does not take.
    """
    if sampler not in ("euler", "unipc", "cosmos"):
        raise ValueError(f"sampler is {sampler!r}, must be euler, unipc or cosmos")
    cosmos = sampler == "cosmos"
    if steps < 1 + cosmos:
        raise ValueError(f"{steps} steps asked for, the sampler {sampler} takes at least {1 + cosmos}")
    if not (shift > 0 and sigma_max > 0):
        raise ValueError(f"shift is {shift} and sigma_max is {sigma_max}, both must be above 0")
    if cosmos and shift != 1:
        raise ValueError(f"shift is {shift}, must be 1 for the sampler cosmos, which has none")
    if cosmos and not COSMOS_SIGMA_MIN < sigma_max < math.inf:
        raise ValueError(
            f"sigma_max is {sigma_max}, must be finite and above {COSMOS_SIGMA_MIN} for the sampler cosmos"
        )

    grid = cosmos_grid(steps, sigma_max) if cosmos else shifted_grid(steps, shift, sigma_max)
    start = noise.double() * (grid[0] if cosmos else 1)
    numbers: Iterable[int] = range(len(grid) - 1)
    follow = _unipc if sampler == "unipc" else _euler
    return follow(velocity_rf, start, grid, progress(numbers) if progress else numbers) / (1 - grid[-1])
