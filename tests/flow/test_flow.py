"""Each identity of TrigFlow, the wrapping and the time distributions; the oracles are closed forms and scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from tests.objectives.closed_forms import NORMAL, TWO_MODES, Mixture, Mlp, Network, Teacher, text
from torch import Tensor, nn

from rcm import flow
from rcm.flow import LogNormal, ShiftedUniform, Wrapped

TIMES = torch.linspace(0, math.pi / 2, 33, dtype=torch.float64)
INNER = TIMES[1:-1]


def points(batch: int = 31, size: int = 2) -> Tensor:
    return torch.randn(batch, size, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def column(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1, 1)


def close(x: Tensor, y: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("to", "back"),
    [
        (flow.trig_to_rf, flow.rf_to_trig),
        (flow.trig_to_sigma, flow.sigma_to_trig),
        (lambda t: flow.rf_to_sigma(flow.trig_to_rf(t)), lambda s: flow.rf_to_trig(flow.sigma_to_rf(s))),
    ],
)
def test_conversions_invert_each_other(to, back) -> None:  # type: ignore[no-untyped-def]
    close(back(to(INNER)), INNER)


def test_times_that_belong_together_have_one_ratio_of_noise_to_signal() -> None:
    r, sigma = flow.trig_to_rf(INNER), flow.trig_to_sigma(INNER)
    close(r / (1 - r), INNER.sin() / INNER.cos())
    close(sigma, INNER.sin() / INNER.cos())
    close(flow.rf_to_sigma(r), sigma)


@pytest.mark.parametrize(
    ("t", "r"),
    [
        (math.atan(80), 0.98765),
        (math.atan(1600), 0.99938),
        (1.5, 0.93378),
        (1.3, 0.78271),
        (1.0, 0.60898),
        (0.3, 0.23625),
    ],
)
def test_rf_times_of_the_published_sampling_times(t: float, r: float) -> None:
    assert flow.trig_to_rf(t).item() == pytest.approx(r, abs=6e-6)


def test_the_ends_of_time_are_exact() -> None:
    assert flow.trig_to_rf(0.0) == 0
    assert flow.trig_to_rf(math.pi / 2) == 1
    assert flow.rf_to_trig(1.0) == math.pi / 2
    assert flow.sigma_to_rf(math.inf) == 1
    assert flow.sigma_to_rf(0.0) == 0
    assert flow.sigma_to_trig(math.inf) == math.pi / 2


def test_conversions_compute_in_float64() -> None:
    t = torch.tensor([1.2345], dtype=torch.float32)
    for convert in (flow.trig_to_rf, flow.rf_to_trig, flow.trig_to_sigma, flow.sigma_to_trig, flow.rf_to_sigma):
        assert convert(t).dtype == torch.float64


def test_wrapping_is_snr_matching() -> None:
    """f(x, t) = f_raw(√(α² + σ²) x, s) and F = (C x - f) / S, with α = 1 - r, σ = r, f_raw(x, r) = x - r v(x, r)."""
    network = Mlp(2)
    x, words = points(), text(31)
    r = column(flow.trig_to_rf(INNER))
    x_raw = ((1 - r) ** 2 + r**2).sqrt() * x
    f = x_raw - r * network(x_raw, r.view(-1, 1) * network.time_scale, words)
    wrapped = Wrapped(network)
    close(wrapped.denoise(x, INNER, words), f)
    close(wrapped.velocity(x, INNER, words), (column(INNER).cos() * x - f) / column(INNER).sin())


@pytest.mark.parametrize("data", [NORMAL, TWO_MODES])
def test_wrapped_teacher_is_the_posterior_mean_in_trigflow(data: Mixture) -> None:
    x, words, t = points(33), text(33), column(TIMES)
    x0, noise = data.posterior(x, t.cos(), t.sin())
    teacher = Wrapped(Teacher(data))
    close(teacher.denoise(x, TIMES, words), x0)
    close(teacher.velocity(x, TIMES, words), t.cos() * noise - t.sin() * x0)
    r = torch.rand(33, dtype=torch.float64)
    x0, noise = data.posterior(x, 1 - column(r), column(r))
    close(teacher.rf_velocity(x, r, words), noise - x0)


def test_derivative_of_the_consistency_function_in_rf_terms() -> None:
    """df/dt = b² (V - v - r J), with V the teacher's and v the student's velocity, J = dv/dr along V (float64)."""
    student, teacher = Mlp(2), Teacher(TWO_MODES)
    x, words, t = points(), text(31), INNER
    wrapped = Wrapped(student)
    direction = Wrapped(teacher).velocity(x, t, words)
    _, derivative = torch.func.jvp(lambda x, t: wrapped.denoise(x, t, words), (x, t), (direction, torch.ones_like(t)))
    b, r = 1 / (column(t).cos() + column(t).sin()), column(flow.trig_to_rf(t))
    v_teacher = teacher.rf(b * x, r, words)
    v, j = torch.func.jvp(lambda x, r: student.rf(x, r, words), (b * x, r), (v_teacher, torch.ones_like(r)))
    close(derivative, b**2 * (v_teacher - v - r * j))


class Recorder(Network):
    """Notes what it is called with; its parameter sets the precision."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        self.calls.append((x, time, text))
        return x * self.weight * text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)


def test_network_computes_in_its_precision_and_sees_an_exact_time() -> None:
    network = Recorder(torch.bfloat16)
    words = torch.ones(31, 2, 3)
    velocity = Wrapped(network).velocity(points().float(), INNER, words)
    (x, time, seen), *_ = network.calls
    assert x.dtype == seen.dtype == torch.bfloat16
    assert time.shape == (31, 1)
    assert velocity.dtype == torch.float64
    close(time[:, 0].double(), 1000 * flow.trig_to_rf(INNER))


def test_time_at_pure_noise_is_the_whole_time_scale() -> None:
    network = Recorder(torch.float32)
    Wrapped(network).velocity(points(1), torch.tensor([math.pi / 2]), torch.ones(1, 2, 3))
    assert network.calls[0][1].item() == pytest.approx(1000, rel=1e-7)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guided_velocity(guidance: float) -> None:
    """F_u + s (F_c - F_u), in one call of the network, and without the unconditional half where s = 1."""
    network = Recorder(torch.float64)
    wrapped = Wrapped(network)
    x, words, null = points(), torch.full((31, 2, 3), 0.7), torch.full((1, 2, 3), 0.2)
    conditional = wrapped.velocity(x, INNER, words)
    unconditional = wrapped.velocity(x, INNER, null.expand(31, 2, 3))
    network.calls.clear()
    close(
        flow.guided_velocity(wrapped, x, INNER, words, null, guidance),
        unconditional + guidance * (conditional - unconditional),
    )
    assert [len(x) for x, _, _ in network.calls] == [31 if guidance == 1 else 62]
    network.calls.clear()
    close(
        flow.guided_velocity(wrapped, x, INNER, words, null, guidance - 1, "conditional"),
        conditional + (guidance - 1) * (conditional - unconditional),
    )
    assert [len(x) for x, _, _ in network.calls] == [31 if guidance == 1 else 62]


def test_a_second_time_reaches_the_network_in_the_unit_of_the_first() -> None:
    seen: list[tuple[Tensor, ...]] = []

    class TwoTimes(nn.Module):
        time_scale = 10.0

        def forward(self, x: Tensor, time: Tensor, text: Tensor, *second: Tensor) -> Tensor:
            seen.append((time, *second))
            return x

    wrapped, s = Wrapped(TwoTimes()), INNER / 2
    wrapped.velocity(points(), INNER, text(31), s)
    wrapped.velocity(points(), INNER, text(31))
    close(seen[0][1], (10 * s.sin() / (s.cos() + s.sin()))[:, None])
    assert [len(times) for times in seen] == [2, 1]
    assert torch.equal(seen[0][0], seen[1][0])


U = np.array([1e-6, 0.01, 0.2, 0.5, 0.77, 0.999, 1 - 1e-9])


@pytest.mark.parametrize(("mean", "std"), [(-0.8, 1.6), (0.0, 1.6), (0.7, 1.6)])
def test_lognormal_quantiles_are_those_of_scipy(mean: float, std: float) -> None:
    expected = np.arctan(scipy.stats.lognorm(s=std, scale=math.exp(mean)).ppf(U))
    np.testing.assert_allclose(LogNormal(mean, std).quantile(torch.from_numpy(U)).numpy(), expected, rtol=1e-9)


def test_lognormal_with_mean_shifted_by_the_number_of_frames() -> None:
    """atan(√T z) with ln z ~ N(-0.8, 1.6²) at T = 20 latent frames is LogNormal(0.7, 1.6) to two digits."""
    z = scipy.stats.lognorm(s=1.6, scale=math.exp(-0.8)).ppf(U)
    quantiles = LogNormal(-0.8 + math.log(20) / 2, 1.6).quantile(torch.from_numpy(U)).numpy()
    np.testing.assert_allclose(quantiles, np.arctan(math.sqrt(20) * z), rtol=1e-9)
    assert -0.8 + math.log(20) / 2 == pytest.approx(0.70, abs=0.005)


def test_shifted_uniform_quantiles() -> None:
    """r = 5u / (1 + 4u), t = atan(r / (1 - r)); the two ends are 0 and π/2."""
    r = 5 * U / (1 + 4 * U)
    np.testing.assert_allclose(
        ShiftedUniform(5).quantile(torch.from_numpy(U)).numpy(), np.arctan(r / (1 - r)), rtol=1e-7
    )
    assert ShiftedUniform(5).quantile(torch.tensor([0.0, 1.0])).tolist() == [0, math.pi / 2]


def test_lognormal_ends_are_finite() -> None:
    assert LogNormal(0.0, 1.6).quantile(torch.tensor([0.0, 1.0])).tolist() == [0, math.pi / 2]


def test_time_distribution_from_its_configuration() -> None:
    assert flow.time_distribution({"name": "lognormal", "mean": -0.8, "std": 1.6}) == LogNormal(-0.8, 1.6)
    assert flow.time_distribution({"name": "shifted_uniform", "shift": 5}) == ShiftedUniform(5)
    with pytest.raises(ValueError, match="'uniform', must be one of lognormal, shifted_uniform"):
        flow.time_distribution({"name": "uniform"})
