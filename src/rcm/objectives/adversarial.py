"""The adversarial part of DMD2, the paper's baseline: a discriminator D on the features of the fake score.

Non-saturating losses on diffused samples x_t = C x0 + S noise, C = cos t, S = sin t, t of the distribution p_D:

    student   softplus(-D(x_t))
    critic    softplus(-D(x_t of data)) + softplus(D(x_t of the student)), beside the fake score's own loss

Shapes: B samples, C channels, T frames, H × W.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.flow import Wrapped, per_sample
from rcm.networks.discriminator import FakeScore
from rcm.objectives.loss import Loss, finite_samples, keep, squared_error


def judge(fake: Wrapped, x_BCTHW: Tensor, t_B: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The fake score's TrigFlow velocity and the logits D (B,) at x_t, from one pass; float64."""
    network = cast(FakeScore, fake.network)
    with network.features(x_BCTHW.shape) as features:
        velocity = fake.velocity(x_BCTHW, t_B, text)
    return velocity, network.branch(*features).double()


def adversarial_loss(
    x0_BCTHW: Tensor, fake: Wrapped, noise_BCTHW: Tensor, t_B: Tensor, text: Tensor, *, batch: int
) -> Loss:
    """softplus(-D(x_t)) of the student's sample x0, with gradient.

    One pass of the fake score, with a graph: the gradient goes through it to the sample. In a backward pass its weights
    collect gradients too, unless the caller has frozen them. Arguments as in `dmd_loss`, whose noise and times serve.

    Returns the loss and `gan_logit_sum` (Σ D), `gan_nan` (samples skipped).
    """
    t = per_sample(t_B, x0_BCTHW)
    x = t.cos() * x0_BCTHW + t.sin() * noise_BCTHW
    finite = finite_samples(x.detach())
    velocity, logit_B = judge(fake, keep(finite, x), t_B, text)
    finite = finite & logit_B.detach().isfinite()
    logit_B = keep(finite, logit_B)  # before softplus, whose derivative would make 0 · NaN of it
    loss = keep(finite, F.softplus(-logit_B)).sum() / batch
    # the velocity with weight zero: a sharded network gathers its weights when the gradient of its output arrives
    loss = loss + 0 * keep(finite_samples(velocity.detach()), velocity).sum()
    return loss, {"gan_logit_sum": logit_B.detach().sum(), "gan_nan": (~finite).sum()}


def adversarial_critic_loss(
    x0_BCTHW: Tensor,
    real_BCTHW: Tensor,
    fake: Wrapped,
    noise_BCTHW: Tensor,
    t_B: Tensor,
    text: Tensor,
    *,
    batch: int,
    critic_weight: float,
) -> Loss:
    """`critic_loss` of the student's samples x0, plus critic_weight · (softplus(-D(real_t)) + softplus(D(x_t))).

    Data and samples are diffused by the same noise to the same times, and pass through the fake score together: one
    pass over 2 B samples. A pair counts where both are finite. `real_BCTHW` are data with the prompts `text`.

    Returns the loss and `critic_nan` (pairs skipped), `critic_gan_sum` (Σ of the adversarial part, not weighted),
    `critic_real_logit_sum`, `critic_student_logit_sum` (Σ D).
    """
    t = per_sample(t_B, x0_BCTHW)
    x, v = t.cos() * x0_BCTHW + t.sin() * noise_BCTHW, t.cos() * noise_BCTHW - t.sin() * x0_BCTHW
    real = t.cos() * real_BCTHW + t.sin() * noise_BCTHW
    finite = finite_samples(x, real)
    both = torch.cat([keep(finite, x), keep(finite, real)])
    velocities, logits = judge(fake, both, torch.cat([t_B, t_B]), torch.cat([text, text]))
    velocity, (student_B, real_B) = velocities.chunk(2)[0], logits.chunk(2)
    finite = finite & finite_samples(velocity.detach()) & student_B.detach().isfinite() & real_B.detach().isfinite()
    student_B, real_B = keep(finite, student_B), keep(finite, real_B)
    gan = keep(finite, F.softplus(-real_B) + F.softplus(student_B)).sum()
    loss = squared_error(velocity - keep(finite, v), finite, batch) + critic_weight * gan / batch
    metrics = {
        "critic_nan": (~finite).sum(),
        "critic_gan_sum": gan.detach(),
        "critic_real_logit_sum": real_B.detach().sum(),
        "critic_student_logit_sum": student_B.detach().sum(),
    }
    return loss, metrics
