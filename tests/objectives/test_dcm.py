"""Discrete-time consistency: its grid, its gradient by hand, and the order of its error at the exact solution."""

import math

import pytest
import torch
from tests.objectives.closed_forms import NORMAL, TWO_MODES, Exact, Mlp, Network, Teacher, text
from torch import Tensor

from rcm.flow import Wrapped, trig_to_rf
from rcm.objectives import dcm_loss, dcm_times

BATCH = 12
DRAWS = torch.linspace(0, 1, BATCH, dtype=torch.float64)
NULL = torch.zeros(1, 1, 1)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(BATCH, 2, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("skip", [1, 3])
def test_grid(skip: int) -> None:
    """r = 5 s / (1 + 4 s) at s = 1 - u - j / 48, u up to 1 - skip / 48: from pure noise down to the data."""
    times = dcm_times(DRAWS, skip=skip)
    assert times.shape == (skip + 1, BATCH)
    assert times[0, 0] == math.pi / 2
    assert times[-1, -1] == pytest.approx(0, abs=1e-15)
    for j in range(skip + 1):
        s = 1 - DRAWS * (1 - skip / 48) - j / 48
        torch.testing.assert_close(trig_to_rf(times[j]), 5 * s / (1 + 4 * s), rtol=1e-12, atol=1e-12)


def test_impossible_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="dcm_skip is 49, must be between 1 and dcm_steps = 48"):
        dcm_times(DRAWS, skip=49)


class Conditional(Network):
    """TWO_MODES where the text is 1, NORMAL where it is 0."""

    def rf(self, x: Tensor, r: Tensor, text: Tensor) -> Tensor:
        weight = text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        return weight * Teacher(TWO_MODES).rf(x, r, text) + (1 - weight) * Teacher(NORMAL).rf(x, r, text)


def slope(x: Tensor, t: Tensor, guidance: float) -> Tensor:
    """E[dx/dt] of the two mixtures at x = C x0 + S ε, guided."""
    velocities = []
    for data in (NORMAL, TWO_MODES):
        x0, eps = data.posterior(x, column(t.cos()), column(t.sin()))
        velocities.append(column(t.cos()) * eps - column(t.sin()) * x0)
    return velocities[0] + guidance * (velocities[1] - velocities[0])


@pytest.mark.parametrize("skip", [1, 2])
@pytest.mark.parametrize("form", ["unconditional", "conditional"])
def test_gradient_is_the_gap_to_the_neighbour(skip: int, form: str) -> None:
    """dL/df = 2 (f - f') / B, and a change of v moves f by -r; nothing comes through f'."""
    network, x0, eps = Mlp(2, batch=BATCH), noise(1), noise(2)
    times = dcm_times(DRAWS, steps=12, skip=skip)
    loss, metrics = dcm_loss(
        Wrapped(network), Wrapped(Conditional()), x0, eps, times, text(BATCH) + 1, NULL,
        batch=2 * BATCH, guidance=1.5, guidance_form=form,
    )  # fmt: skip
    loss.backward()
    x = start = column(times[0].cos()) * x0 + column(times[0].sin()) * eps
    for j in range(skip):
        x = x + column(times[j + 1] - times[j]) * slope(x, times[j], 1.5 if form == "unconditional" else 2.5)
    denoise = Wrapped(network).denoise
    gap = (denoise(start, times[0], text(BATCH) + 1) - denoise(x, times[-1], text(BATCH) + 1)).detach()
    expected = -column(trig_to_rf(times[0])) * 2 * gap / (2 * BATCH)
    torch.testing.assert_close(network.offset.grad, expected, rtol=1e-10, atol=1e-13)
    assert loss.item() == pytest.approx(gap.square().sum().item() / (2 * BATCH), rel=1e-10)
    assert metrics["dcm_gap_sum"].item() == pytest.approx(gap.abs().mean(dim=(1, 2, 3, 4)).sum().item(), rel=1e-10)
    assert metrics["dcm_nan"] == 0


def test_error_at_the_true_consistency_function_is_that_of_an_euler_step() -> None:
    """Of second order in the step: four times smaller on a grid twice as fine, at the same first time."""

    def gap(steps: int) -> float:
        student, teacher = Wrapped(Exact(TWO_MODES)), Wrapped(Teacher(TWO_MODES))
        draws = torch.full((BATCH,), 0.4 / (1 - 1 / steps), dtype=torch.float64)
        _, metrics = dcm_loss(
            student, teacher, TWO_MODES.sample((BATCH, 2, 1, 1, 1), 3), noise(), dcm_times(draws, steps=steps),
            text(BATCH), NULL, batch=BATCH, guidance=1.0,
        )  # fmt: skip
        return metrics["dcm_gap_sum"].item()

    assert gap(200) / gap(400) == pytest.approx(4, rel=0.03)
    assert gap(200) > 1e-7


def test_samples_that_are_not_finite_are_skipped_and_counted() -> None:
    def gradient(x0: Tensor) -> tuple[list[Tensor], int]:
        network = Mlp(2)
        loss, metrics = dcm_loss(
            Wrapped(network), Wrapped(Conditional()), x0, noise(), dcm_times(DRAWS), text(BATCH), NULL,
            batch=BATCH, guidance=2.0,
        )  # fmt: skip
        return list(torch.autograd.grad(loss, list(network.layers.parameters()))), int(metrics["dcm_nan"])

    spoilt = noise(1)
    spoilt[4] = math.nan
    gradients, skipped = gradient(spoilt)
    spoilt[4] = 0.3
    whole, none = gradient(spoilt)
    assert (skipped, none) == (1, 0)
    assert all(g.isfinite().all() for g in gradients)
    assert any((g - w).abs().max() > 1e-4 for g, w in zip(gradients, whole, strict=True))
