"""The adversarial part of DMD2: a logistic case by hand, and the branch on a transformer's features."""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.objectives.wan import WIDTH, random, wan
from torch import Tensor, nn

from rcm.flow import Wrapped
from rcm.networks.discriminator import Discriminator, FakeScore
from rcm.objectives import adversarial_critic_loss, adversarial_loss, critic_loss
from rcm.objectives.adversarial import judge

BATCH, SIZE = 5, (2, 1, 4, 4)
TIMES = torch.linspace(0.2, 1.5, BATCH, dtype=torch.float64)
COS, SIN = (x.view(-1, 1, 1, 1, 1) for x in (TIMES.cos(), TIMES.sin()))
X0, REAL, NOISE = (random(BATCH, *SIZE, seed=seed) for seed in range(3))
TEXT = random(BATCH, 3, 4, seed=3)


class Toy(nn.Module):
    """A score of zero velocity; its one block passes x (B, C, T, H, W) on as tokens (B, C T H W, 1)."""

    time_scale, patch = 1.0, (1, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Flatten()])
        self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        return x

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.scale * self.blocks[0](x).view_as(x)


class Logistic(nn.Module):
    """D = w · features."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(random(math.prod(SIZE), seed=5) / 4)

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.w


def toy() -> FakeScore:
    network = FakeScore(Toy(), width=2, layers=[0], heads=1)
    network.branch = Logistic()
    return network


def diffused(x0: Tensor) -> Tensor:
    """What reaches the network: the TrigFlow sample over C + S."""
    return (COS * x0 + SIN * NOISE) / (COS + SIN)


def test_gradient_of_the_student_in_the_logistic_case() -> None:
    """dL/dx0 = -σ(-D) w C / (C + S) / batch."""
    network, x0, batch = toy(), X0.clone().requires_grad_(), 2 * BATCH
    loss, metrics = adversarial_loss(x0, Wrapped(network), NOISE, TIMES, TEXT, batch=batch)
    loss.backward()
    w = network.branch.w.detach()
    logit = diffused(X0).flatten(1) @ w
    expected = -(1 / (1 + logit.exp()))[:, None] * w * (COS / (COS + SIN)).flatten(1) / batch
    torch.testing.assert_close(x0.grad.flatten(1), expected, rtol=1e-12, atol=1e-15)
    assert loss.item() == pytest.approx((1 + (-logit).exp()).log().sum().item() / batch, rel=1e-12)
    assert metrics["gan_logit_sum"].item() == pytest.approx(logit.sum().item(), rel=1e-12)
    assert metrics["gan_nan"] == 0


def test_gradients_of_the_critic_in_the_logistic_case() -> None:
    """dL/dw = c Σ (σ(D(x)) x - σ(-D(real)) real) / batch; the score's own error is that of `critic_loss`."""
    network, batch, weight = toy(), 2 * BATCH, 0.3
    loss, metrics = adversarial_critic_loss(
        X0, REAL, Wrapped(network), NOISE, TIMES, TEXT, batch=batch, critic_weight=weight
    )
    loss.backward()
    w = network.branch.w.detach()
    x, real = diffused(X0).flatten(1), diffused(REAL).flatten(1)
    student, data = x @ w, real @ w
    expected = weight * (torch.sigmoid(student) @ x - torch.sigmoid(-data) @ real) / batch
    torch.testing.assert_close(network.branch.w.grad, expected, rtol=1e-12, atol=1e-15)
    gan = ((1 + (-data).exp()).log() + (1 + student.exp()).log()).sum().item()
    plain = toy()
    alone, _ = critic_loss(X0, Wrapped(plain), NOISE, TIMES, TEXT, batch=batch)
    alone.backward()
    assert loss.item() == pytest.approx(alone.item() + weight * gan / batch, rel=1e-12)
    assert network.score.scale.grad.item() == pytest.approx(plain.score.scale.grad.item(), rel=1e-12)
    figures = {key: value.item() for key, value in metrics.items()}
    sums = {
        "critic_gan_sum": gan,
        "critic_real_logit_sum": data.sum().item(),
        "critic_student_logit_sum": student.sum().item(),
    }
    assert figures == pytest.approx({"critic_nan": 0, **sums}, rel=1e-12)


def test_samples_that_are_not_finite_are_skipped_and_counted() -> None:
    bad, good = [1, 3], [0, 2, 4]
    x0, real = X0.clone(), REAL.clone()
    x0[1], real[3] = math.nan, math.inf
    network, expected = judged_network(), judged_network()
    loss, metrics = adversarial_critic_loss(
        x0, real, Wrapped(network), NOISE, TIMES, TEXT, batch=BATCH, critic_weight=1.0
    )
    loss.backward()
    assert metrics["critic_nan"] == len(bad)
    part, figures = adversarial_critic_loss(
        X0[good], REAL[good], Wrapped(expected), NOISE[good], TIMES[good], TEXT[good], batch=BATCH, critic_weight=1.0
    )
    part.backward()
    assert metrics["critic_gan_sum"].item() == pytest.approx(figures["critic_gan_sum"].item(), rel=1e-10)
    for a, b in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)

    loss, metrics = adversarial_loss(x0, Wrapped(network), NOISE, TIMES, TEXT, batch=BATCH)
    others = [0, 2, 3, 4]
    part, _ = adversarial_loss(X0[others], Wrapped(network), NOISE[others], TIMES[others], TEXT[others], batch=BATCH)
    assert metrics["gan_nan"] == 1
    assert loss.item() == pytest.approx(part.item(), rel=1e-10)


def test_a_logit_that_is_not_finite_spoils_no_gradient() -> None:
    """The derivative of softplus at NaN is NaN, also of a sample that the sum leaves out."""
    network, x0 = toy(), X0.clone().requires_grad_()
    spoilt = torch.zeros(2 * BATCH, dtype=torch.float64)
    spoilt[2] = math.nan
    network.branch.register_forward_hook(lambda module, inputs, out: out + spoilt[: len(out)])
    loss, metrics = adversarial_loss(x0, Wrapped(network), NOISE, TIMES, TEXT, batch=BATCH)
    loss.backward()
    assert metrics["gan_nan"] == 1
    assert x0.grad.isfinite().all()
    assert [g.norm() > 0 for g in x0.grad] == [True, True, False, True, True]

    network.branch.w.grad = None
    loss, metrics = adversarial_critic_loss(
        X0, REAL, Wrapped(network), NOISE, TIMES, TEXT, batch=BATCH, critic_weight=1.0
    )
    loss.backward()
    assert metrics["critic_nan"] == 1
    assert network.branch.w.grad.isfinite().all()


def judged_network() -> FakeScore:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = FakeScore(wan(), width=WIDTH, layers=[0, 2], heads=4).double()
        for parameter in network.branch.parameters():
            nn.init.normal_(parameter, std=0.3)
        return network


def test_velocity_and_logits_come_from_one_pass() -> None:
    network, plain = judged_network(), wan()
    calls: list[object] = []
    network.score.register_forward_pre_hook(lambda *_: calls.append(1))
    velocity, logits = judge(Wrapped(network), X0, TIMES, TEXT)
    assert len(calls) == 1
    assert torch.equal(velocity, Wrapped(plain).velocity(X0, TIMES, TEXT))
    assert torch.equal(velocity, Wrapped(network).velocity(X0, TIMES, TEXT))
    assert logits.shape == (BATCH,)
    assert logits.dtype == torch.float64


def test_features_are_the_tokens_behind_the_chosen_blocks() -> None:
    """Without its later blocks, a network hands the same tokens to its head."""
    network = judged_network()
    with torch.no_grad(), network.features(X0.shape) as features:
        network(X0, TIMES[:, None], TEXT)
    for depth, feature in zip((1, 3), features, strict=True):
        short, seen = wan(), []
        short.blocks = short.blocks[:depth]
        short.head.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        short(X0, TIMES[:, None], TEXT)
        assert feature.shape == (BATCH, 4, WIDTH)
        assert torch.equal(feature, seen[0])


def test_gradient_reaches_the_sample_through_the_score() -> None:
    """Central differences of the loss in one direction; frozen weights collect nothing."""
    network, x0, direction = (
        judged_network().requires_grad_(False),
        X0.clone().requires_grad_(),
        random(*X0.shape, seed=9),
    )

    def loss(x: Tensor) -> Tensor:
        return adversarial_loss(x, Wrapped(network), NOISE, TIMES, TEXT, batch=BATCH)[0]

    loss(x0).backward()
    h = 1e-5
    difference = (loss(X0 + h * direction) - loss(X0 - h * direction)) / (2 * h)
    assert (x0.grad * direction).sum().item() == pytest.approx(difference.item(), rel=1e-7)
    assert abs(difference.item()) > 1e-4
    assert all(p.grad is None for p in network.parameters())


def test_the_branch_reads_with_softmax_attention() -> None:
    """One layer and one head, written out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        branch = Discriminator(WIDTH, 1, 1).double()
        for parameter in branch.parameters():
            nn.init.normal_(parameter, std=0.5)
    x = random(BATCH, 7, WIDTH)

    def normed(y: Tensor, norm: nn.Module) -> Tensor:
        mean, var = y.mean(-1, keepdim=True), y.var(-1, unbiased=False, keepdim=True)
        return (y - mean) / (var + 1e-6).sqrt() * norm.weight + norm.bias

    def rms(y: Tensor, norm: nn.Module) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    reader, tokens, query = branch.readers[0], normed(x, branch.feature_norms[0]), branch.query[0, 0]
    q = rms(normed(query, branch.query_norms[0]) @ reader.q.weight.T + reader.q.bias, reader.norm_q)
    k = rms(tokens @ reader.k.weight.T + reader.k.bias, reader.norm_k)
    v = tokens @ reader.v.weight.T + reader.v.bias
    share = torch.softmax(k @ q / math.sqrt(WIDTH), dim=1)
    token = query + (share[:, None] @ v)[:, 0] @ reader.o.weight.T + reader.o.bias
    expected = normed(token, branch.norm) @ branch.logit.weight[0] + branch.logit.bias
    torch.testing.assert_close(branch(x), expected, rtol=1e-10, atol=1e-10)


def test_a_new_branch_does_not_take_sides() -> None:
    network = FakeScore(wan(), width=WIDTH, layers=[1], heads=2).double()
    _, logits = judge(Wrapped(network), X0, TIMES, TEXT)
    assert torch.equal(logits, torch.zeros(BATCH, dtype=torch.float64))
    loss, _ = adversarial_loss(X0, Wrapped(network), NOISE, TIMES, TEXT, batch=BATCH)
    assert loss.item() == pytest.approx(math.log(2))


def test_weights_keep_their_names_and_no_hook_stays_behind() -> None:
    network = judged_network()
    names = network.state_dict().keys()
    assert {name for name in names if name.startswith("score.")} == {f"score.{name}" for name in wan().state_dict()}
    assert all(name.startswith(("score.", "branch.")) for name in names)
    with pytest.raises(RuntimeError):
        judge(Wrapped(network), X0, TIMES, F.pad(TEXT, (0, 1)))
    assert not any(block._forward_hooks for block in network.score.blocks)


@pytest.mark.parametrize("layers", [[], [2, 1], [1, 1], [0, 3], [-1]])
def test_impossible_layers_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise from 0 to 2 at most"):
        FakeScore(wan(), width=WIDTH, layers=layers, heads=2)
