"""MeanFlow: the exact flow map between two times is a zero; s = 0 is sCM, s = t is the teacher's velocity."""

import math

import pytest
import torch
from tests.objectives.closed_forms import NORMAL, TWO_MODES, Exact, Mlp, Teacher, text
from tests.objectives.wan import SIZES, random, wan
from torch import Tensor, nn

from rcm import networks
from rcm.flow import Wrapped, guided_velocity
from rcm.objectives import meanflow_loss, scm_loss, scm_tangent

BATCH = 20
T = torch.linspace(0.1, math.pi / 2, BATCH, dtype=torch.float64)
S = T * torch.rand(BATCH, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 0.9
NULL = torch.zeros(1, 1, 1)


def column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1, 1)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(BATCH, 2, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TwoTimes(nn.Module):
    """A network of two rectified-flow times."""

    time_scale = 7.0

    def forward(self, x: Tensor, time: Tensor, text: Tensor, second: Tensor | None = None) -> Tensor:
        assert second is not None
        return self.rf(x, column(time) / self.time_scale, column(second) / self.time_scale)


class FlowMap(TwoTimes):
    """The exact flow of N(0.7, spread²) from t to s, which scales the distance to the mean with the deviation."""

    def __init__(self, spread: float = 0.6):
        super().__init__()
        self.spread = spread
        self.offset = nn.Parameter(torch.zeros(BATCH, 2, 1, 1, 1, dtype=torch.float64))

    def rf(self, x_rf: Tensor, r: Tensor, r_s: Tensor) -> Tensor:
        t, s = torch.atan2(r, 1 - r), torch.atan2(r_s, 1 - r_s)
        b = 1 / (t.cos() + t.sin())
        x = x_rf / b
        at_s, at_t = (((time.cos() * self.spread) ** 2 + time.sin() ** 2).sqrt() for time in (s, t))
        x_s = s.cos() * 0.7 + at_s / at_t * (x - t.cos() * 0.7)
        average = ((t - s).cos() * x - x_s) / (t - s).sin()
        return (average - (t.cos() - t.sin()) * x_rf) / b + self.offset


class Smooth(TwoTimes):
    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp(2)

    def rf(self, x: Tensor, r: Tensor, r_s: Tensor) -> Tensor:
        return self.net.rf(x, r, r_s.view(-1, 1, 1))  # the second time takes the place of the text


class Indifferent(Smooth):
    def rf(self, x: Tensor, r: Tensor, r_s: Tensor) -> Tensor:
        return self.net.rf(x, r, text(len(x)))


def point() -> Tensor:
    return column(T.cos()) * NORMAL.sample((BATCH, 2, 1, 1, 1), 3) + column(T.sin()) * noise()


def test_the_exact_flow_map_is_a_zero() -> None:
    teacher, x0 = Wrapped(Teacher(NORMAL)), NORMAL.sample((BATCH, 2, 1, 1, 1), 3)
    exact = FlowMap()
    loss, metrics = meanflow_loss(
        Wrapped(exact), teacher, x0, noise(), T, S, text(BATCH), NULL, batch=BATCH, guidance=1.0
    )
    loss.backward()
    assert exact.offset.grad is not None
    assert exact.offset.grad.abs().max() < 1e-9
    assert metrics["meanflow_tangent_norm_sum"] < 1e-9
    assert metrics["meanflow_nan"] == 0
    _, wrong = meanflow_loss(
        Wrapped(FlowMap(0.65)), teacher, x0, noise(), T, S, text(BATCH), NULL, batch=BATCH, guidance=1.0
    )
    assert wrong["meanflow_tangent_norm_sum"] > 0.05


def test_closed_form_of_the_flow_is_the_consistency_function_at_zero() -> None:
    """So the zero above is that of the probability flow, which tests of `Exact` establish independently."""
    zero = torch.zeros_like(T)
    consistency = Wrapped(Exact(NORMAL)).velocity(point(), T, text(BATCH))
    torch.testing.assert_close(Wrapped(FlowMap()).velocity(point(), T, text(BATCH), zero), consistency)


def test_second_time_zero_is_scm() -> None:
    student, x0 = Wrapped(Indifferent()), noise(1)
    given = Wrapped(Teacher(TWO_MODES)), x0, noise(), T
    zero = torch.zeros_like(T)
    loss, _ = meanflow_loss(student, *given, zero, text(BATCH), NULL, batch=BATCH, guidance=1.0, warmup=0.7)
    expected, _ = scm_loss(
        Wrapped(student.network.net), *given, text(BATCH), NULL, batch=BATCH, guidance=1.0, warmup=0.7
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_equal_times_ask_for_the_velocity_of_the_teacher() -> None:
    student, teacher = Wrapped(Smooth()), Wrapped(Teacher(TWO_MODES))
    velocity, g = scm_tangent(student, teacher, point(), T, text(BATCH), NULL, guidance=1.0, s_B=T)
    target = guided_velocity(teacher, point(), T, text(BATCH), NULL, 1.0)
    torch.testing.assert_close(g, target - velocity, rtol=1e-12, atol=1e-12)
    assert g.norm() > 0.1


def test_tangent_is_the_derivative_of_the_flow_map_with_s_held() -> None:
    """g = cos(t - s) df(x_t, t, s)/dt by central differences along the exact flow of the teacher."""
    student, x, h = Wrapped(Smooth()), point(), 1e-3

    def follow(h: float) -> Tensor:
        t, moved = T + h, T + h
        deviation = [((t.cos() * 0.6) ** 2 + t.sin() ** 2).sqrt() for t in (T, moved)]
        x_t = column(moved.cos()) * 0.7 + column(deviation[1] / deviation[0]) * (x - column(T.cos()) * 0.7)
        velocity = student.velocity(x_t, t, text(BATCH), S).detach()
        return column((t - S).cos()) * x_t - column((t - S).sin()) * velocity

    derivative = (8 * (follow(h) - follow(-h)) - (follow(2 * h) - follow(-2 * h))) / (12 * h)
    _, g = scm_tangent(student, Wrapped(Teacher(NORMAL)), x, T, text(BATCH), NULL, guidance=1.0, s_B=S)
    torch.testing.assert_close(g, column((T - S).cos()) * derivative, rtol=1e-8, atol=1e-9)


def test_a_new_student_is_its_teacher_at_every_second_time() -> None:
    """The embedding of the second time starts at zero, and learns."""
    teacher = wan(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = networks.build(SIZES | {"second_time": True}).double()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"second_time_embedding"}
    assert not unexpected
    x, words = random(BATCH, 2, 1, 4, 4), random(BATCH, 3, 4, seed=1)
    expected = Wrapped(teacher).velocity(x, T, words)
    for s_B in (S, T, None):
        assert torch.equal(Wrapped(student).velocity(x, T, words, s_B), expected)
    loss, _ = meanflow_loss(
        Wrapped(student), Wrapped(teacher), x, random(*x.shape, seed=2), T, S, words, words[:1],
        batch=BATCH, guidance=2.0,
    )  # fmt: skip
    loss.backward()
    assert student.get_parameter("second_time_embedding.2.weight").grad.norm() > 1e-3
