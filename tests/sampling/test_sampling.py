"""Samplers against normal and mixture data, for which the exact answer is known."""

import math

import pytest
import scipy.stats
import torch
from tests.objectives.closed_forms import NORMAL, TWO_MODES, Exact, Mixture, Mlp, Teacher, text
from torch import Tensor

from rcm.flow import Wrapped
from rcm.sampling import consistency_sample, euler_sample, few_step_times

MID_TIMES = [1.3, 1.0, 0.6]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def denoiser(network: torch.nn.Module):  # type: ignore[no-untyped-def]
    return lambda x, t: Wrapped(network).denoise(x, t, text(len(x)))


def test_few_step_times_are_the_first_of_the_list() -> None:
    assert few_step_times(80, MID_TIMES, 4) == [math.atan(80), 1.3, 1.0, 0.6]
    assert few_step_times(80, MID_TIMES, 1) == [math.atan(80)]
    with pytest.raises(ValueError, match="5 steps asked for, the sampler has times for 1 to 4"):
        few_step_times(80, MID_TIMES, 5)
    with pytest.raises(ValueError, match="must not increase"):
        few_step_times(80, [1.0, 1.3], 2)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_consistency_function_of_a_normal_gives_its_moments(steps: int) -> None:
    """The sample is affine in the noises: mean at zero noise, variance the squared norm of its gradient; both exact."""
    times = [math.pi / 2, *MID_TIMES][:steps]
    noises = torch.zeros(steps, 1, 1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    denoise = denoiser(Exact(NORMAL))
    x0 = consistency_sample(denoise, times, noises.detach())
    assert x0.item() == pytest.approx(0.7, abs=1e-9)
    responses = [consistency_sample(denoise, times, row.view_as(noises)) - x0 for row in torch.eye(steps).double()]
    assert torch.stack(responses).square().sum().sqrt().item() == pytest.approx(0.6, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 4])
def test_exact_consistency_function_of_a_mixture_gives_its_distribution(steps: int) -> None:
    x0 = consistency_sample(denoiser(Exact(TWO_MODES)), few_step_times(1e6, MID_TIMES, steps), noise(steps, 4000, 1))
    result = scipy.stats.kstest(x0.flatten().numpy(), lambda x: TWO_MODES.cdf(torch.from_numpy(x), 1.0, 0.0).numpy())
    assert result.pvalue > 0.01


def test_sampler_in_rf_form() -> None:
    """x ← (1 - r') (x - r v) + r' ε with x_rf = x / (cos t + sin t): the form of the inference script."""
    network, noises = Mlp(2), noise(3, 5, 2)
    times = torch.tensor([1.5, 1.0, 0.6], dtype=torch.float64)
    r = (times.tan() / (1 + times.tan())).tolist()
    x = noises[0] / (times[0].cos() + times[0].sin())
    for k in range(3):
        time = torch.full((5, 1), r[k] * 1000, dtype=torch.float64)
        x0 = x - r[k] * network(x, time, text(5)).detach()
        if k < 2:
            x = (1 - r[k + 1]) * x0 + r[k + 1] * noises[k + 1]
    torch.testing.assert_close(consistency_sample(denoiser(network), times, noises), x0, rtol=1e-12, atol=1e-12)


def test_times_per_sample() -> None:
    noises, denoise = noise(3, 2, 2), denoiser(Mlp(2))
    times = torch.tensor([[1.5, 1.4], [1.0, 0.9], [0.2, 0.6]], dtype=torch.float64)
    together = consistency_sample(denoise, times, noises)
    apart = [consistency_sample(denoise, times[:, i], noises[:, i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-13, atol=1e-13)


def test_state_is_float64_whatever_the_network() -> None:
    seen = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return x.float()

    consistency_sample(denoise, [1.5, 1.0], noise(2, 3, 1).float())
    assert seen == [(torch.float64, torch.float64)] * 2


def test_only_the_last_call_has_a_graph() -> None:
    network, noises, times = Mlp(2), noise(3, 4, 2), [1.5, 1.0, 0.6]
    enabled, states = [], []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        enabled.append(torch.is_grad_enabled())
        states.append(x)
        return denoiser(network)(x, t)

    weights = list(network.layers.parameters())
    x0 = consistency_sample(denoise, times, noises, grad_last=True)
    assert enabled == [False, False, True]
    assert not any(x.requires_grad for x in states)
    gradients = torch.autograd.grad(x0.square().sum(), weights)
    last = denoiser(network)(states[-1], torch.full((4,), times[-1], dtype=torch.float64))
    for gradient, exact in zip(gradients, torch.autograd.grad(last.square().sum(), weights), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-12)
    assert not consistency_sample(denoise, times, noises).requires_grad


def test_euler_grid_is_that_of_the_reference() -> None:
    """r_max = σ / (1 + σ), u = linspace(r_max / (s - (s - 1) r_max), 0), r = s u / (1 + (s - 1) u)."""
    seen: list[float] = []

    def velocity(x: Tensor, r: Tensor) -> Tensor:
        assert r.shape == (2,)
        seen.append(r[0].item())
        return torch.ones_like(x)

    start = noise(2, 1)
    x0 = euler_sample(velocity, start, 4, 3.0, 5000.0)
    r_max = 5000 / 5001
    u_max = r_max / (3 - 2 * r_max)
    u = [u_max * k / 4 for k in (4, 3, 2, 1)]
    assert seen == pytest.approx([3 * v / (1 + 2 * v) for v in u], abs=1e-14)
    assert seen[0] == pytest.approx(r_max, abs=1e-14)
    torch.testing.assert_close(x0, start - r_max, rtol=1e-13, atol=1e-13)  # the steps add up to r_max: down to 0


@pytest.mark.parametrize("data", [NORMAL, TWO_MODES])
def test_euler_converges_to_the_probability_flow_at_first_order(data: Mixture) -> None:
    start, sigma_max = noise(200, 1), 1e6
    exact = data.transport(start, torch.tensor(0.0), torch.tensor(1.0))
    teacher = Wrapped(Teacher(data))
    errors = [
        (euler_sample(lambda x, r: teacher.rf_velocity(x, r, text(200)), start, steps, 1.0, sigma_max) - exact)
        .square()
        .mean()
        .sqrt()
        .item()
        for steps in (200, 400)
    ]
    assert errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.25)


def test_euler_reports_its_progress() -> None:
    steps: list[int] = []
    euler_sample(lambda x, r: x, noise(1, 1), 5, 1.0, 80.0, progress=lambda it: (steps.append(k) or k for k in it))
    assert steps == [0, 1, 2, 3, 4]
