"""Samplers of a teacher against the exact probability flow of normal and mixture data; diffusers: tests/parity."""

import math
from typing import Any

import pytest
import scipy.integrate
import torch
from tests.objectives.closed_forms import NORMAL, TWO_MODES, Mixture, Teacher, text
from torch import Tensor

from rcm.flow import Wrapped
from rcm.sampling import teacher_sample
from rcm.sampling.teacher import _corrector

COSMOS = {"sampler": "cosmos", "shift": 1.0, "sigma_max": 80.0}


def noise(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, 1, 1, 1, dtype=torch.float64, generator=generator)


def sample(data: Mixture, batch: int, **settings: Any) -> Tensor:
    teacher = Wrapped(Teacher(data))
    return teacher_sample(lambda x, r: teacher.rf_velocity(x, r, text(batch)), noise(batch), **settings)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_euler_grid_is_that_of_the_reference() -> None:
    """r_max = σ / (1 + σ), u = linspace(r_max / (s - (s - 1) r_max), 0), r = s u / (1 + (s - 1) u)."""
    seen: list[float] = []

    def velocity(x: Tensor, r: Tensor) -> Tensor:
        assert r.shape == (2,)
        seen.append(r[0].item())
        return torch.ones_like(x)

    start = noise(2)
    x0 = teacher_sample(velocity, start, sampler="euler", steps=4, shift=3.0, sigma_max=5000.0)
    r_max = 5000 / 5001
    u_max = r_max / (3 - 2 * r_max)
    u = [u_max * k / 4 for k in (4, 3, 2, 1)]
    assert seen == pytest.approx([3 * v / (1 + 2 * v) for v in u], abs=1e-14)
    assert seen[0] == pytest.approx(r_max, abs=1e-14)
    torch.testing.assert_close(x0, start - r_max, rtol=1e-13, atol=1e-13)  # the steps add up to r_max: down to 0


@pytest.mark.parametrize(
    ("sampler", "sigma_max", "order"), [("euler", 1e6, 1), ("unipc", 1e6, 2), ("unipc", math.inf, 2)]
)
@pytest.mark.parametrize("data", [NORMAL, TWO_MODES])
def test_convergence_to_the_probability_flow(data: Mixture, sampler: str, sigma_max: float, order: int) -> None:
    exact = data.transport(noise(200), torch.tensor(0.0), torch.tensor(1.0))
    errors = [
        rms(sample(data, 200, sampler=sampler, steps=steps, shift=1.0, sigma_max=sigma_max) - exact)
        for steps in (200, 400)
    ]
    assert errors[1] < (0.01 if order == 1 else 5e-5)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_cosmos_converges_to_the_probability_flow_at_first_order() -> None:
    """Along the flow of N(μ, s²), (x_σ - μ) / √(s² + σ²) stays; it ends at σ = 0.002, not at the data."""
    mean, std = 0.7, 0.6
    spread = math.hypot(std, 0.002) / math.hypot(std, 80)
    exact = mean + (80 * noise(50) - mean) * spread
    errors = [rms(sample(NORMAL, 50, steps=steps, **COSMOS) - exact) for steps in (281, 561)]
    assert errors[1] < 0.005
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)


def test_corrector_is_exact_for_data_of_second_degree() -> None:
    """x / r grows by ∫ e^λ m dλ, with λ = ln((1 - r) / r)."""
    r = [0.9, 0.7, 0.4]
    times = [math.log(1 / v - 1) for v in r]

    def m(time: float) -> float:
        return 1.3 + 0.7 * time - 0.9 * time**2

    integral, _ = scipy.integrate.quad(lambda time: math.exp(time) * m(time), times[1], times[2], epsabs=1e-14)
    h_before, h = times[1] - times[0], times[2] - times[1]
    before, here, after = (m(time) for time in times)
    rho_1, rho_2 = _corrector(h, h_before)
    target = here + rho_1 * (here - before) * h / h_before + rho_2 * (after - here)
    assert target + r[2] / r[1] * (2.0 - target) == pytest.approx(r[2] / r[1] * 2.0 + r[2] * integral, rel=1e-13)


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 5), ("unipc", 5), ("cosmos", 4)])
def test_state_progress_and_graph(sampler: str, calls: int) -> None:
    steps: list[int] = []
    seen = set()
    weight = torch.ones(1, requires_grad=True)

    def velocity(x: Tensor, r: Tensor) -> Tensor:
        seen.add((x.dtype, r.dtype, torch.is_grad_enabled()))
        return x.float() * weight

    x0 = teacher_sample(
        velocity,
        noise(2).float(),
        sampler=sampler,
        steps=5,
        shift=1.0,
        sigma_max=80.0,
        progress=lambda numbers: (steps.append(k) or k for k in numbers),
    )
    assert steps == list(range(calls))
    assert seen == {(torch.float64, torch.float64, False)}
    assert x0.dtype == torch.float64
    assert not x0.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "heun"}, "sampler is 'heun', must be euler, unipc or cosmos"),
        ({"sampler": "unipc", "steps": 0}, "0 steps asked for, the sampler unipc takes at least 1"),
        ({"steps": 1}, "1 steps asked for, the sampler cosmos takes at least 2"),
        ({"shift": 3.0}, r"shift is 3\.0, must be 1 for the sampler cosmos"),
        ({"sampler": "euler", "shift": 0.0}, r"shift is 0\.0 and sigma_max is 80\.0, both must be above 0"),
        ({"sampler": "euler", "sigma_max": 0.0}, r"sigma_max is 0\.0, both must be above 0"),
        ({"sigma_max": 0.001}, r"sigma_max is 0\.001, must be finite and above 0\.002"),
        ({"sigma_max": math.inf}, "sigma_max is inf, must be finite"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher_sample(lambda x, r: x, noise(1), **{**COSMOS, "steps": 35, **settings})
