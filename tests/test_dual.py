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


def test_linear_layers_whose_weight_carries_a_tangent() -> None:
    """The short cut for constant weights must not drop their tangents."""
    x, w, tx, tw = torch.randn(4, 6, 6, dtype=torch.float64).unbind()
    b, tb = torch.randn(2, 6, dtype=torch.float64).unbind()
    for tangents in ((tx, tw, tb), (tx, None, tb), (None, tw, None), (tx, None, None)):
        filled = tuple(torch.zeros_like(p) if t is None else t for p, t in zip((x, w, b), tangents, strict=True))
        _, expected = torch.func.jvp(nn.functional.linear, (x, w, b), filled)
        _, derivative = dual.jvp(nn.functional.linear, (x, w, b), tangents)
        torch.testing.assert_close(derivative, expected, rtol=1e-12, atol=1e-12)


def test_linear_layers_multiply_twice_and_not_three_times() -> None:
    products: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = func.overloadpacket.__name__
            if name in ("addmm", "mm", "linear"):
                products.append(name)
            return func(*args, **(kwargs or {}))

    x, tx = torch.randn(2, 7, 5, dtype=torch.float64).unbind()
    with Watch():
        dual.jvp(nn.Linear(5, 8).double(), (x,), (tx,))
    assert len(products) == 2
