"""DMD: distribution matching of the student's own samples, and the critic (fake score) that it needs.

Notation: C = cos t, S = sin t, f a denoiser, F a TrigFlow velocity. Shapes: N steps, B samples, C channels, T frames,
H × W. The adversarial branch of DMD2 is in `rcm.objectives.adversarial`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rcm.flow import Wrapped, guided_velocity, per_sample
from rcm.objectives.loss import Loss, finite_samples, keep, squared_error
from rcm.sampling import consistency_sample

SMALLEST_SCALE = 1e-5


class Rollout(NamedTuple):
    """What a sample of the student is made from: TrigFlow times (N, B) and noises (N, B, C, T, H, W)."""

    times: Tensor
    noises: Tensor


def rollout_times(draws_NB: Tensor) -> Tensor:
    """Decreasing times (N, B): π/2, then the running minimum of the draws of p_D in rows 2 to N (row 1 is not used)."""
    times = draws_NB.double().clone()
    times[0] = math.pi / 2
    return times.cummin(dim=0).values


def roll_out(student: Wrapped, rollout: Rollout, text: Tensor, *, grad_last: bool) -> Tensor:
    """The student's sample x0 (B, C, T, H, W), as the few-step sampler makes it at inference; N passes.

    With `grad_last` it carries the graph of its last step alone (of no other, whatever the mode outside). A sample that
    is not finite on the way stays so, but does not pass through that graph, in which it would spoil all gradients.
    """

    def denoise(x: Tensor, t_B: Tensor) -> Tensor:
        finite = finite_samples(x)
        x0 = student.denoise(keep(finite, x), t_B, text)
        return torch.where(per_sample(finite, x0).bool(), x0, math.nan)

    return consistency_sample(denoise, *rollout, grad_last=grad_last)


def dmd_loss(
    x0_BCTHW: Tensor,
    fake: Wrapped,
    teacher: Wrapped,
    noise_BCTHW: Tensor,
    t_B: Tensor,
    text: Tensor,
    null_text: Tensor,
    *,
    batch: int,
    guidance: float,
    guidance_form: str = "unconditional",
) -> Loss:
    """‖x0 - sg(x0 - d)‖² with d = (f_fake - f_teacher) / m, both denoisers at x_t = C x0 + S noise.

    m = mean |x0 - f_teacher| of the sample, at least 1e-5; the teacher is guided, the fake score is not. The gradient
    in x0 is 2 d. (arXiv 2510.08431, alg. 1.) Passes: a guided one of the teacher, one of the fake score; no gradients.

    Args:
        x0_BCTHW: the student's sample with the gradient of its last step, from `roll_out`.
        noise_BCTHW: ε that diffuses the sample to t_B, TrigFlow times of the distribution p_D.
        text: condition (B, L, D); `null_text` (B or 1, L, D) is its unconditional counterpart.
        batch: samples of the global batch, of which those at hand may be a part.
        guidance: scale of the teacher's classifier-free guidance, in the form that `rcm.flow.guided` describes.

    Returns the loss and `dmd_gap_sum` (Σ mean |f_fake - f_teacher|), `dmd_nan` (samples skipped).
    """
    x0 = x0_BCTHW
    with torch.no_grad():
        t = per_sample(t_B, x0)
        x = t.cos() * x0 + t.sin() * noise_BCTHW
        direction = guided_velocity(teacher, x, t_B, text, null_text, guidance, guidance_form)
        f_teacher = t.cos() * x - t.sin() * direction
        gap = fake.denoise(x, t_B, text) - f_teacher
        scale = (x0 - f_teacher).abs().flatten(1).mean(dim=1).clamp(min=SMALLEST_SCALE)
        finite = finite_samples(x0, gap)
        target = x0 - gap / per_sample(scale, gap)
    loss = squared_error(x0 - target, finite, batch)
    metrics = {
        "dmd_gap_sum": keep(finite, gap).abs().flatten(1).mean(dim=1).sum(),
        "dmd_nan": (~finite).sum(),
    }
    return loss, metrics


def critic_loss(x0_BCTHW: Tensor, fake: Wrapped, noise_BCTHW: Tensor, t_B: Tensor, text: Tensor, *, batch: int) -> Loss:
    """‖F_fake - v‖² with v = C noise - S x0 at x_t = C x0 + S noise, x0 a sample of the student without gradient.

    The same as ‖f_fake - x0‖² / S²: the fake score learns to denoise what the student makes. Arguments as in
    `dmd_loss`. Returns the loss and `critic_nan` (samples skipped).
    """
    t = per_sample(t_B, x0_BCTHW)
    x, v = t.cos() * x0_BCTHW + t.sin() * noise_BCTHW, t.cos() * noise_BCTHW - t.sin() * x0_BCTHW
    finite = finite_samples(x)
    velocity = fake.velocity(keep(finite, x), t_B, text)
    finite = finite & finite_samples(velocity.detach())
    return squared_error(velocity - keep(finite, v), finite, batch), {"critic_nan": (~finite).sum()}


def balance(weight: float, elements: int) -> float:
    """λ √D, the weight that tells: the DMD gradient of a sample grows with √D (D elements), that of sCM does not.

    The paper's λ = 0.01 is 14 for Wan2.1 1.3B at 480p (D = 1,996,800).
    """
    return weight * math.sqrt(elements)
