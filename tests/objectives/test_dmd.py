"""DMD and its critic against mixtures whose denoisers are exact."""

import math

import numpy as np
import pytest
import torch
from tests.objectives.closed_forms import NORMAL, TWO_MODES, Exact, Mixture, Mlp, Network, Teacher, text
from torch import Tensor, nn

from rcm.flow import Wrapped
from rcm.objectives import Rollout, balance, critic_loss, dmd_loss, roll_out, rollout_times
from rcm.sampling import consistency_sample

BATCH = 16
OTHER = Mixture([1.0], [-0.4], [0.9])
TIMES = torch.linspace(0.1, 1.5, BATCH, dtype=torch.float64)
COS, SIN = (x.view(-1, 1, 1, 1, 1) for x in (TIMES.cos(), TIMES.sin()))
CONDITION, NULL = torch.ones(BATCH, 1, 1), torch.zeros(1, 1, 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 2, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rollout(steps: int) -> Rollout:
    draws = torch.rand(steps, BATCH, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.3
    return Rollout(rollout_times(draws), noise(steps, BATCH, seed=3))


def sample(student: nn.Module, steps: int, *, grad: bool = True) -> Tensor:
    return roll_out(Wrapped(student), rollout(steps), CONDITION, grad_last=grad)


class Conditional(Network):
    """TWO_MODES where the text is 1, NORMAL where it is 0."""

    def rf(self, x: Tensor, r: Tensor, text: Tensor) -> Tensor:
        weight = text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        return weight * Teacher(TWO_MODES).rf(x, r, text) + (1 - weight) * Teacher(NORMAL).rf(x, r, text)


def test_rollout_times_start_at_noise_and_never_increase() -> None:
    draws = torch.tensor([[0.2, 0.3], [1.0, 0.5], [1.2, 0.4], [0.7, 0.6]])
    half_pi = math.pi / 2
    expected = torch.tensor([[half_pi, half_pi], [1.0, 0.5], [1.0, 0.4], [0.7, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(rollout_times(draws), expected, rtol=1e-7, atol=0)
    assert draws[0, 0] == pytest.approx(0.2)


def test_gradient_vanishes_where_fake_and_teacher_agree() -> None:
    network = Mlp(2, batch=BATCH)
    x0, both = sample(network, 2), Wrapped(Teacher(TWO_MODES))
    loss, metrics = dmd_loss(x0, both, both, noise(BATCH), TIMES, text(BATCH), NULL, batch=BATCH, guidance=1.0)
    loss.backward()
    assert network.offset.grad is not None
    assert network.offset.grad.abs().max() < 1e-12
    assert loss < 1e-20
    assert metrics["dmd_gap_sum"] < 1e-12


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_gradient_is_the_normalised_difference_of_the_denoisers(guidance: float) -> None:
    """dL/dx0 = 2 (f_fake - f_teacher) / (B m), m = mean |x0 - f_teacher|; at t = π/2 a change of v moves x0 by -1."""
    network, eps = Mlp(2, batch=BATCH), noise(BATCH)
    fake, teacher = Wrapped(Teacher(OTHER)), Wrapped(Conditional())
    loss, metrics = dmd_loss(
        sample(network, 1), fake, teacher, eps, TIMES, CONDITION, NULL, batch=BATCH, guidance=guidance
    )
    loss.backward()
    with torch.no_grad():
        start = rollout(1).noises[0]
        x0 = start - network(start, torch.full((BATCH, 1), 1000.0, dtype=torch.float64), CONDITION)
        x = COS * x0 + SIN * eps
        denoised = [data.posterior(x, COS, SIN)[0] for data in (OTHER, TWO_MODES, NORMAL)]
        f_teacher = denoised[2] + guidance * (denoised[1] - denoised[2])
        gap = denoised[0] - f_teacher
        d = gap / (x0 - f_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(network.offset.grad, -2 * d / BATCH, rtol=1e-9, atol=1e-12)
    assert loss.item() == pytest.approx(d.square().sum().item() / BATCH, rel=1e-9)
    assert metrics["dmd_gap_sum"].item() == pytest.approx(gap.abs().mean().item() * BATCH, rel=1e-9)


def test_normaliser_is_bounded_below() -> None:
    """Where x0 equals the teacher's denoiser to the last digit the gradient stays finite."""
    point = Mixture([1.0], [0.3], [1e-12])
    fake, teacher = Wrapped(Teacher(OTHER)), Wrapped(Teacher(point))
    x0 = sample(Exact(point), 1)
    loss, metrics = dmd_loss(x0, fake, teacher, noise(BATCH), TIMES, CONDITION, NULL, batch=BATCH, guidance=1.0)
    f_fake = OTHER.posterior(COS * 0.3 + SIN * noise(BATCH), COS, SIN)[0]
    assert metrics["dmd_nan"] == 0
    assert loss.item() == pytest.approx(((f_fake - 0.3) / 1e-5).square().sum().item() / BATCH, rel=1e-6)


class Counting(Mlp):
    """Notes which of its calls keep a graph."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        self.enabled = [*getattr(self, "enabled", []), torch.is_grad_enabled()]
        return super().forward(x, time, text)


def test_rollout_is_the_sampler_with_a_graph_in_its_last_step_alone() -> None:
    student, others = Counting(2, batch=BATCH), Counting(2, seed=1, batch=1)
    x0, other = sample(student, 3), Wrapped(others)
    loss, _ = dmd_loss(x0, other, other, noise(BATCH), TIMES, CONDITION, NULL, batch=BATCH, guidance=2.0)
    assert student.enabled == [False, False, True]
    assert others.enabled == [False, False]
    loss.backward()
    assert others.offset.grad is None

    student.enabled = []
    x0 = sample(student, 3, grad=False)
    assert not any(student.enabled)
    assert torch.equal(x0, consistency_sample(lambda x, t: Wrapped(student).denoise(x, t, CONDITION), *rollout(3)))
    critic, _ = critic_loss(x0, other, noise(BATCH), TIMES, CONDITION, batch=BATCH)
    x = COS * x0 + SIN * noise(BATCH)
    f = Wrapped(others).denoise(x, TIMES, CONDITION)
    assert critic.item() == pytest.approx(((f - x0) / SIN).square().sum().item() / BATCH, rel=1e-10)
    critic.backward()
    assert others.offset.grad is not None


class Spoilt(Network):
    def rf(self, x: Tensor, r: Tensor, text: Tensor) -> Tensor:
        v = Teacher(OTHER).rf(x, r, text)
        v[5] = math.nan
        return v


def test_samples_that_are_not_finite_are_skipped_and_counted() -> None:
    def gradient(fake: Network) -> tuple[Tensor, dict[str, Tensor]]:
        network = Mlp(2, batch=BATCH)
        nets = sample(network, 1), Wrapped(fake), Wrapped(Conditional())
        loss, metrics = dmd_loss(*nets, noise(BATCH), TIMES, CONDITION, NULL, batch=BATCH, guidance=2.0)
        loss.backward()
        assert network.offset.grad is not None
        return network.offset.grad, metrics

    expected, _ = gradient(Teacher(OTHER))
    result, metrics = gradient(Spoilt())
    assert metrics["dmd_nan"] == 1
    assert metrics["dmd_gap_sum"].isfinite()
    expected[5] = 0
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)

    fake, eps = Mlp(2), noise(BATCH)
    eps[2] = math.inf
    x0 = sample(Mlp(2, seed=1), 2, grad=False)
    loss, metrics = critic_loss(x0, Wrapped(fake), eps, TIMES, CONDITION, batch=BATCH)
    loss.backward()
    assert metrics["critic_nan"] == 1
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in fake.layers.parameters())


def critic_moments(data: Mixture, t: float) -> list[float]:
    """|E[h(x_t) (F_fake - v)]| for h = 1, x, tanh x, with a fake score exact for `data` and a student whose samples are
    exactly normal: both noises on a Gauss-Hermite grid, the expectation from the gradients of the critic's loss."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    a, b = (torch.from_numpy(x).reshape(-1, 1, 1, 1, 1) for x in np.meshgrid(nodes, nodes))
    weight = torch.from_numpy(np.outer(weights, weights) / (2 * math.pi)).reshape(-1, 1, 1, 1, 1)
    student = Wrapped(Exact(NORMAL))
    batch = len(a)
    times = torch.full((batch,), t, dtype=torch.float64)

    class Fake(Teacher):
        offset = torch.zeros(batch, 1, 1, 1, 1, dtype=torch.float64, requires_grad=True)

        def rf(self, x: Tensor, r: Tensor, text: Tensor) -> Tensor:
            return super().rf(x, r, text) + self.offset

    fake = Fake(data)
    start = torch.full((1, batch), math.pi / 2, dtype=torch.float64)
    x0 = roll_out(student, Rollout(start, a[None]), text(batch), grad_last=False)
    loss, _ = critic_loss(x0, Wrapped(fake), b, times, text(batch), batch=batch)
    (gradient,) = torch.autograd.grad(loss, fake.offset)
    x = math.cos(t) * (0.7 + 0.6 * a) + math.sin(t) * b
    error = gradient * batch / 2 * (math.cos(t) + math.sin(t))
    return [(weight * h * error).sum().abs().item() for h in (torch.ones_like(x), x, x.tanh())]


@pytest.mark.parametrize("t", [0.2, 0.8, 1.4])
def test_critic_is_at_rest_at_the_exact_score_of_the_student(t: float) -> None:
    """The gradient at the conditional mean of v vanishes in expectation, weighted with any function of x_t."""
    assert max(critic_moments(NORMAL, t)) < 1e-9
    assert max(critic_moments(OTHER, t)) > 0.05


@pytest.mark.parametrize(("elements", "expected"), [(1_996_800, 14.1), (261_120, 5.1), (3072, 0.55), (784, 0.28)])
def test_balance_of_published_models(elements: int, expected: float) -> None:
    assert balance(0.01, elements) == pytest.approx(expected, abs=0.05)


def test_a_sample_lost_on_the_way_spoils_no_weight() -> None:
    """It is masked before the pass with the graph, in which 0 · NaN would reach every weight."""

    def gradients(lost: list[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
        network, drawn = Mlp(2), rollout(3)
        drawn.noises[1, lost] = math.nan
        x0 = roll_out(Wrapped(network), drawn, CONDITION, grad_last=True)
        nets = x0, Wrapped(Teacher(OTHER)), Wrapped(Conditional())
        keeping = [i for i in range(BATCH) if i != 5]
        if not lost:  # the others alone
            nets = x0[keeping], *nets[1:]
        chosen = slice(None) if lost else keeping
        eps, times, condition = (a[chosen] for a in (noise(BATCH), TIMES, CONDITION))
        loss, metrics = dmd_loss(*nets, eps, times, condition, NULL, batch=BATCH, guidance=2.0)
        loss.backward()
        return [p.grad for p in network.layers.parameters()], metrics

    found, metrics = gradients([5])
    assert metrics["dmd_nan"] == 1
    for one, other in zip(found, gradients([])[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
