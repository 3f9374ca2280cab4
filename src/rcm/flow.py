"""TrigFlow times and networks: conversions, wrapping of a rectified-flow network, time distributions; all in float64.

    TrigFlow         x_t = cos(t) x0 + sin(t) ε      t in [0, π/2]    data of unit standard deviation
    rectified flow   x_r = (1 - r) x0 + r ε          r in [0, 1]
    σ                x_σ = x0 + σ ε                  σ in [0, ∞]

Two times belong together where the ratio of noise to signal is the same: tan t = r / (1 - r) = σ.
Shapes: B samples, C channels, T frames, H × W; `text` is (B, L, D).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

Time = Tensor | float


def _float64(x: Time) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def trig_to_rf(t: Time) -> Tensor:
    """r = sin t / (cos t + sin t)."""
    t = _float64(t)
    return t.sin() / (t.cos() + t.sin())


def rf_to_trig(r: Time) -> Tensor:
    """t = atan(r / (1 - r))."""
    r = _float64(r)
    return torch.atan2(r, 1 - r)


def trig_to_sigma(t: Time) -> Tensor:
    """σ = tan t."""
    return _float64(t).tan()


def sigma_to_trig(sigma: Time) -> Tensor:
    """t = atan σ."""
    return _float64(sigma).atan()


def rf_to_sigma(r: Time) -> Tensor:
    """σ = r / (1 - r)."""
    r = _float64(r)
    return r / (1 - r)


def sigma_to_rf(sigma: Time) -> Tensor:
    """r = σ / (1 + σ), infinity included."""
    return 1 / (1 + 1 / _float64(sigma))


def per_sample(t_B: Tensor, like: Tensor) -> Tensor:
    """Times (B,) as float64 (B, 1, 1, …), to multiply samples shaped as `like` with."""
    return t_B.double().view(-1, *(1,) * (like.ndim - 1))


@dataclass(frozen=True)
class Wrapped:
    """A rectified-flow network seen as a TrigFlow network, by matching signal-to-noise ratios.

    With C = cos t, S = sin t, b = 1 / (C + S), r = S b and the network's velocity v = v(b x, r):

        F(x, t) = (C - S) b x + b v         TrigFlow velocity, dx/dt along the probability flow
        f(x, t) = C x - S F = b x - r v     denoiser, and consistency function of a student

    The network computes in its own precision; all else, the time it is given included, is float64.
    """

    network: nn.Module

    def velocity(self, x_BCTHW: Tensor, t_B: Tensor, text: Tensor, s_B: Tensor | None = None) -> Tensor:
        """F(x, t), float64; F(x, t, s) of a network of two times, where s is given."""
        x, t = x_BCTHW.double(), per_sample(t_B, x_BCTHW)
        cos, sin = t.cos(), t.sin()
        b = 1 / (cos + sin)
        x_rf = b * x
        second = None if s_B is None else trig_to_rf(s_B)
        return (cos - sin) * x_rf + b * self.rf_velocity(x_rf, (sin * b).view(-1), text, second)

    def denoise(self, x_BCTHW: Tensor, t_B: Tensor, text: Tensor) -> Tensor:
        """f(x, t), float64."""
        x, t = x_BCTHW.double(), per_sample(t_B, x_BCTHW)
        cos, sin = t.cos(), t.sin()
        b = 1 / (cos + sin)
        x_rf, r = b * x, sin * b
        return x_rf - r * self.rf_velocity(x_rf, r.view(-1), text)

    def rf_velocity(self, x_BCTHW: Tensor, r_B: Tensor, text: Tensor, second_B: Tensor | None = None) -> Tensor:
        """v(x, r) = E[ε - x0 | x_r = x], the network itself, float64; `second_B`: for one that takes a second time."""
        dtype = next((p.dtype for p in self.network.parameters()), torch.float64)
        scale = cast(float, self.network.time_scale)
        time_B1, *second_B1 = (r.double()[:, None] * scale for r in (r_B, second_B) if r is not None)
        return self.network(x_BCTHW.to(dtype), time_B1, text.to(dtype), *second_B1).double()


def guided(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_BCTHW: Tensor,
    time_B: Tensor,
    text: Tensor,
    null_text: Tensor,
    guidance: float,
    form: str = "unconditional",
) -> Tensor:
    """Classifier-free guidance v_u + s (v_c - v_u) in one batched call; v_c alone where the scale s is 1.

    The form "conditional" is v_c + s (v_c - v_u), the same with s + 1 for s. `velocity(x, time, text)` may be of either
    parameterisation; `null_text` is (B, L, D) or (1, L, D).
    """
    if form not in ("unconditional", "conditional"):
        raise ValueError(f"form of guidance is {form!r}, must be unconditional or conditional")
    if form == "conditional":
        guidance += 1
    if guidance == 1:
        return velocity(x_BCTHW, time_B, text)
    x, time = torch.cat([x_BCTHW, x_BCTHW]), torch.cat([time_B, time_B])
    unconditional, conditional = velocity(x, time, torch.cat([null_text.expand_as(text), text])).chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def guided_velocity(
    teacher: Wrapped,
    x_BCTHW: Tensor,
    t_B: Tensor,
    text: Tensor,
    null_text: Tensor,
    guidance: float,
    form: str = "unconditional",
) -> Tensor:
    """F*, the guided TrigFlow velocity of a teacher; see `guided`."""
    return guided(teacher.velocity, x_BCTHW, t_B, text, null_text, guidance, form)


class TimeDistribution(Protocol):
    """A distribution of TrigFlow times, by its inverse distribution function."""

    def quantile(self, u: Time) -> Tensor:
        """The time t in [0, π/2] below which the share u in [0, 1] of all times lies, float64."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """ln tan t ~ N(mean, std²)."""

    mean: float
    std: float

    def quantile(self, u: Time) -> Tensor:
        return sigma_to_trig(torch.exp(self.mean + self.std * torch.special.ndtri(_float64(u))))


@dataclass(frozen=True)
class ShiftedUniform:
    """Rectified-flow time r = shift · u / (1 + (shift - 1) u) with u ~ U(0, 1)."""

    shift: float

    def quantile(self, u: Time) -> Tensor:
        return rf_to_trig(shifted(_float64(u), self.shift))


def shifted(u: Tensor, shift: float) -> Tensor:
    """Rectified-flow times u moved towards noise: shift · u / (1 + (shift - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def time_distribution(config: Mapping[str, Any]) -> TimeDistribution:
    """{name: lognormal, mean, std} or {name: shifted_uniform, shift}; raises ValueError for another name."""
    kinds = {"lognormal": LogNormal, "shifted_uniform": ShiftedUniform}
    parameters = {str(key): value for key, value in config.items() if key != "name"}
    if config["name"] not in kinds:
        raise ValueError(f"time distribution is {config['name']!r}, must be one of {', '.join(kinds)}")
    return kinds[config["name"]](**parameters)
