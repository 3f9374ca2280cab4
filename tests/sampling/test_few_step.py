"""The few-step sampler against normal and mixture data, for which the exact answer is known."""

import math

import pytest
import scipy.stats
import torch
from tests.objectives.closed_forms import NORMAL, TWO_MODES, Exact, Mlp, text
from torch import Tensor

from rcm.flow import Wrapped
from rcm.sampling import consistency_sample, few_step_times

MID_TIMES = [1.3, 1.0, 0.6]
EIGHT_MID_TIMES = [1.3, 1.0, 1.0, 0.6, 0.6, 0.3, 0.3]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def denoiser(network: torch.nn.Module):  # type: ignore[no-untyped-def]
    return lambda x, t: Wrapped(network).denoise(x, t, text(len(x)))


@pytest.mark.parametrize("mid_times", [MID_TIMES, [1.5, 1.4, 1.0]], ids=["paper", "code"])
def test_few_step_times_are_the_first_of_the_list(mid_times: list[float]) -> None:
    for steps in (1, 2, 3, 4):
        assert few_step_times(80, mid_times, steps) == [math.atan(80), *mid_times][:steps]
        assert few_step_times(80, mid_times, steps, EIGHT_MID_TIMES) == [math.atan(80), *mid_times][:steps]


def test_eight_steps_have_times_of_their_own() -> None:
    assert few_step_times(80, MID_TIMES, 8, EIGHT_MID_TIMES) == [math.atan(80), *EIGHT_MID_TIMES]


@pytest.mark.parametrize(
    ("sigma_max", "mid_times", "steps", "eight", "message"),
    [
        (80, MID_TIMES, 5, None, "5 steps asked for, the sampler has times for 1 to 4"),
        (80, MID_TIMES, 8, None, "8 steps asked for, the sampler has times for 1 to 4"),
        (80, MID_TIMES, 0, None, "0 steps asked for, the sampler has times for 1 to 4"),
        *[(80, MID_TIMES, k, EIGHT_MID_TIMES, f"{k} steps asked .* times for 1 to 4 and 8") for k in (5, 6, 7, 9)],
        (80, MID_TIMES, 4, [1.3, 1.0], "eight_mid_times has 2 times, must have 7"),
        (80, [1.0, 1.3], 2, None, "must not increase"),
        (80, MID_TIMES, 8, [1.3, 1.0, 1.0, 0.6, 0.6, 0.3, 0.4], "must not increase"),
        (3.0, MID_TIMES, 4, None, r"time 1\.3 lies above .* = 1\.249: sigma_max is 3\.0, must be at least 3\.602"),
        (0.5, [0.4], 8, EIGHT_MID_TIMES, r"sigma_max is 0\.5, must be at least 3\.602"),
    ],
)
def test_times_that_are_refused(sigma_max, mid_times, steps, eight, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        few_step_times(sigma_max, mid_times, steps, eight)


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


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_exact_consistency_function_of_a_mixture_gives_its_distribution(steps: int) -> None:
    times = few_step_times(1e6, MID_TIMES, steps, EIGHT_MID_TIMES)
    x0 = consistency_sample(denoiser(Exact(TWO_MODES)), times, noise(steps, 4000, 1))
    result = scipy.stats.kstest(x0.flatten().numpy(), lambda x: TWO_MODES.cdf(torch.from_numpy(x), 1.0, 0.0).numpy())
    assert result.pvalue > 0.01


def script(network: torch.nn.Module, times: list[float], noises: Tensor, ode: bool) -> Tensor:
    """The form of the public inference script: rectified-flow times and states, from x = r_1 ε on."""
    r = [math.tan(t) / (1 + math.tan(t)) for t in times] + [0.0]
    x = r[0] * noises[0]
    for k in range(len(times)):
        v = network(x, torch.full((x.shape[0], 1), r[k] * 1000, dtype=torch.float64), text(len(x))).detach()
        if ode:
            x = x - (r[k] - r[k + 1]) * v
        else:
            x = (1 - r[k + 1]) * (x - r[k] * v) + r[k + 1] * noises[(k + 1) % len(times)]
    return x


@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize("times", [[1.5], [1.5, 1.0, 0.6], [math.atan(80), *EIGHT_MID_TIMES]], ids=len)
def test_sampler_in_rf_form(times: list[float], ode: bool) -> None:
    """Equal but for the start: theirs is sin(t_1) times ours. With ode it is Euler in rectified-flow time."""
    network, noises = Mlp(2), noise(len(times), 5, 2)
    theirs = noises.clone()
    theirs[0] /= math.sin(times[0])
    ours = consistency_sample(denoiser(network), times, noises[:1] if ode else noises, ode=ode)
    torch.testing.assert_close(ours, script(network, times, theirs, ode), rtol=1e-12, atol=1e-12)


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
