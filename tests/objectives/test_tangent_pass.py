"""One forward pass for tangent and gradient, or two, of a transformer: the same loss and gradients in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from tests.objectives.closed_forms import Mlp, text
from tests.objectives.wan import random, wan
from torch import Tensor, nn

from rcm.flow import Wrapped
from rcm.objectives import meanflow_loss, scm_loss

BATCH = 3
TIMES = torch.tensor([0.2, 0.9, 1.5], dtype=torch.float64)
DATA, NOISE = random(BATCH, 2, 1, 4, 4), random(BATCH, 2, 1, 4, 4, seed=1)
TEXT, NULL = random(BATCH, 3, 4, seed=2), random(1, 3, 4, seed=3)


def gradients(student: nn.Module, teacher: nn.Module, data: Tensor, **options: object) -> tuple[Tensor, list[Tensor]]:
    loss, _ = scm_loss(
        Wrapped(student), Wrapped(teacher), data, NOISE, TIMES, TEXT, NULL, batch=BATCH, guidance=2.0, **options
    )
    return loss.detach(), list(torch.autograd.grad(loss, list(student.parameters())))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"derivative": "semi_continuous"},
        {"derivative": "discrete"},
        {"warmup": 0.4, "tangent_warmup_terms": "position", "tangent_normalisation": "squared_norm"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_shared_and_separate_passes_give_the_same_gradients(options: dict[str, object]) -> None:
    student, teacher = wan(0), wan(1)
    shared, separate = (gradients(student, teacher, DATA, tangent_pass=p, **options) for p in ("shared", "separate"))
    torch.testing.assert_close(shared[0], separate[0], rtol=1e-12, atol=0)
    for a, b in zip(shared[1], separate[1], strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm() + 1e-15
    assert sum(g.norm() for g in shared[1]) > 0.1


def test_shared_pass_with_a_second_time() -> None:
    student, teacher = wan(0, second_time=True), Wrapped(wan(1))

    def gradient(tangent_pass: str) -> list[Tensor]:
        loss, _ = meanflow_loss(
            Wrapped(student), teacher, DATA, NOISE, TIMES, TIMES / 3, TEXT, NULL,
            batch=BATCH, guidance=2.0, tangent_pass=tangent_pass,
        )  # fmt: skip
        return list(torch.autograd.grad(loss, list(student.parameters())))

    for a, b in zip(gradient("shared"), gradient("separate"), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm() + 1e-15
    assert student.get_parameter("second_time_embedding.0.weight") is not None


@pytest.mark.parametrize("tangent_pass", ["shared", "separate"])
@pytest.mark.parametrize("source", ["data", "teacher"])
def test_a_sample_that_is_not_finite_leaves_no_trace_in_the_gradients(source: str, tangent_pass: str) -> None:
    data = DATA.clone()
    if source == "data":
        data[1] = math.inf
    student, teacher = wan(0), wan(1)
    if source == "teacher":  # of a guided call, with the sample twice
        teacher.register_forward_hook(lambda module, inputs, out: out.index_fill(0, torch.tensor([1, 4]), math.nan))
    _, spoilt = gradients(student, teacher, data, tangent_pass=tangent_pass)

    kept = [0, 2]
    loss, _ = scm_loss(
        Wrapped(student), Wrapped(wan(1)), DATA[kept], NOISE[kept], TIMES[kept], TEXT[kept], NULL,
        batch=BATCH, guidance=2.0,
    )  # fmt: skip
    for a, b in zip(spoilt, torch.autograd.grad(loss, list(student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def passes(loss: Callable[[Wrapped], object]) -> list[tuple[bool, bool]]:
    """(with a graph, with tangents) of each call of a student's network."""
    calls: list[tuple[bool, bool]] = []

    class Watched(Mlp):
        def forward(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
            dual = torch.autograd.forward_ad.unpack_dual(x).tangent is not None
            calls.append((torch.is_grad_enabled(), dual))
            return super().forward(x, time, words)

    loss(Wrapped(Watched(2)))
    return calls


@pytest.mark.parametrize(
    ("derivative", "shared", "separate"),
    [
        ("exact", [(True, True)], [(False, True), (True, False)]),
        ("semi_continuous", [(False, False), (True, True)], [(False, False), (False, True), (True, False)]),
        ("discrete", [(False, False), (True, False)], [(False, False), (False, False), (True, False)]),
    ],
)
def test_passes_of_the_student(derivative: str, shared: list[object], separate: list[object]) -> None:
    x0, eps = random(2, BATCH, 2, 1, 1, 1)
    for tangent_pass, expected in (("shared", shared), ("separate", separate)):
        calls = passes(
            lambda student, tangent_pass=tangent_pass: scm_loss(
                student, Wrapped(Mlp(2, seed=1)), x0, eps, TIMES, text(BATCH), text(1),
                batch=BATCH, guidance=1.0, derivative=derivative, tangent_pass=tangent_pass,
            )
        )  # fmt: skip
        assert calls == expected
