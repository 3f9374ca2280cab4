"""The derivative along a trajectory: exact against `torch.func.jvp`, finite differences by their leading error."""

import math

import pytest
import torch
from tests.objectives.closed_forms import Mlp, text
from torch import Tensor

from rcm import dual
from rcm.flow import Wrapped
from rcm.objectives.derivative import along_trajectory

BATCH = 6
TIMES = torch.linspace(0.1, 1.5, BATCH, dtype=torch.float64)
RATE = torch.linspace(0.5, 2.0, BATCH, dtype=torch.float64)
X, DIRECTION = torch.randn(2, BATCH, 2, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return Wrapped(NETWORK).velocity(x, t, text(BATCH))


NETWORK = Mlp(2)


def column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1, 1)


def exact() -> Tensor:
    _, derivative = torch.func.jvp(velocity, (X, TIMES), (DIRECTION, torch.ones_like(TIMES)))
    return column(RATE) * derivative.detach()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("derivative", ["exact", "semi_continuous", "discrete"])
def test_value_and_derivative(derivative: str, graph: bool) -> None:
    value, slope = along_trajectory(velocity, X, TIMES, DIRECTION, RATE, derivative=derivative, step=1e-5, graph=graph)
    torch.testing.assert_close(value, velocity(X, TIMES), rtol=1e-14, atol=1e-14)
    assert (value.requires_grad, slope.requires_grad) == (graph, False)
    tolerance = 1e-12 if derivative == "exact" else 1e-4
    torch.testing.assert_close(slope, exact(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("derivative", ["semi_continuous", "discrete"])
def test_error_of_a_finite_difference_is_of_first_order(derivative: str) -> None:
    """-δ/2 (F'' + F), F'' along t with x fixed, or along the arc that the step of x lies on."""

    def curve(h: float) -> Tensor:
        x = X if derivative == "semi_continuous" else math.cos(h) * X + math.sin(h) * DIRECTION
        return velocity(x, TIMES + h).detach()

    h = 1e-3
    second = (curve(h) - 2 * curve(0) + curve(-h)) / h**2
    expected = -column(RATE) * (second + curve(0)) / 2
    for step in (1e-3, 1e-4):
        _, slope = along_trajectory(velocity, X, TIMES, DIRECTION, RATE, derivative=derivative, step=step)
        error = (slope - exact()) / step
        assert (error - expected).norm() < 4 * step * expected.norm()


def test_which_variant_differentiates_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Semi-continuous: tangents in space only; discrete: none."""
    tangents = []
    jvp = dual.jvp
    monkeypatch.setattr(dual, "jvp", lambda fn, x, tx, **kw: (tangents.append(tx), jvp(fn, x, tx, **kw))[1])
    for derivative in ("exact", "semi_continuous", "discrete"):
        along_trajectory(velocity, X, TIMES, DIRECTION, RATE, derivative=derivative)
    (_, in_time), (in_space, none) = tangents
    assert torch.equal(in_time, RATE)
    assert torch.equal(in_space, column(RATE) * DIRECTION)
    assert none is None


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="'central', must be one of exact, semi_continuous, discrete"):
        along_trajectory(velocity, X, TIMES, DIRECTION, RATE, derivative="central")
