"""Forward-mode derivatives against `torch.func.jvp`."""

import torch
from torch import nn

from rcm import dual

LAYERS = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 3)).double()


def test_value_and_derivative_are_those_of_func_jvp() -> None:
    x, tx, y, ty = torch.randn(4, 7, 5, dtype=torch.float64).unbind()

    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return LAYERS(x * y.sin())

    expected = torch.func.jvp(fn, (x, y), (tx, ty))
    result = dual.jvp(fn, (x, y), (tx, ty))
    for value, exact in zip(result, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
        assert not value.requires_grad


def test_none_is_a_zero_tangent() -> None:
    x, tx, y = torch.randn(3, 7, dtype=torch.float64).unbind()
    _, derivative = dual.jvp(torch.mul, (x, y), (tx, None))
    torch.testing.assert_close(derivative, tx * y, rtol=1e-15, atol=0)


def test_output_that_does_not_depend_on_the_dual_input_has_derivative_zero() -> None:
    x, tx, y = torch.randn(3, 7).unbind()
    value, derivative = dual.jvp(lambda x, y: y.exp(), (x, y), (tx, None))
    assert torch.equal(value, y.exp())
    assert torch.equal(derivative, torch.zeros_like(y))
