"""sCM: continuous-time consistency distillation in the rearranged form of rCM (arXiv 2510.08431, algorithm 1).

Notation: C = cos t, S = sin t, F_θ the student's TrigFlow velocity, F_- the same without gradient, F* the teacher's
guided velocity, q the warm-up ratio. Shapes: B samples, C channels, T frames, H × W.
"""

import torch
from torch import Tensor

from rcm import dual
from rcm.flow import Wrapped, guided_velocity, per_sample
from rcm.objectives.loss import Loss, finite_samples, keep, norm, squared_error


@torch.no_grad()
def scm_tangent(
    student: Wrapped,
    teacher: Wrapped,
    x_BCTHW: Tensor,
    t_B: Tensor,
    text: Tensor,
    null_text: Tensor,
    *,
    guidance: float,
    warmup: float = 1.0,
) -> Tensor:
    """The tangent g, before normalisation, at points x of the probability flow; float64, shaped as x.

        g = -C √(1 - q² S²) (F_- - F*) - q (C S x + C S dF_-/dt)

    One forward-mode pass along (C S F*, C S) gives F_- and C S dF_-/dt together. At q = 1, g = C df_-/dt, the
    derivative of the consistency function along the teacher's trajectory: zero where the student is exact.
    """
    t = per_sample(t_B, x_BCTHW)
    cos, sin = t.cos(), t.sin()
    direction = guided_velocity(teacher, x_BCTHW, t_B, text, null_text, guidance)
    velocity, derivative = dual.jvp(
        lambda x, time: student.velocity(x, time, text),
        (x_BCTHW.double(), t_B.double()),
        (cos * sin * direction, t_B.double().cos() * t_B.double().sin()),
    )
    gap = cos * (1 - (warmup * sin) ** 2).sqrt() * (velocity - direction)
    return -gap - warmup * (cos * sin * x_BCTHW + derivative)


def scm_loss(
    student: Wrapped,
    teacher: Wrapped,
    x0_BCTHW: Tensor,
    noise_BCTHW: Tensor,
    t_B: Tensor,
    text: Tensor,
    null_text: Tensor,
    *,
    guidance: float,
    warmup: float = 1.0,
    tangent_constant: float = 0.1,
) -> Loss:
    """‖F_θ - F_- - g / (‖g‖ + c)‖² at x_t = C x0 + S noise, c the tangent constant.

    Eq. 4 prints ‖g‖² + c, which does not normalise; this is the form of the original sCM and of the reference code.
    The value is about 1 whatever the student; what it teaches is the gradient, -2 g / (‖g‖ + c) in F_θ. F_- is taken
    from the pass that has the graph, so that rounding, which differs between two passes, stays out of the gradient.

    Args:
        x0_BCTHW: data of unit standard deviation.
        t_B: TrigFlow times, of the distribution p_G.
        text: condition (B, L, D); `null_text` (B or 1, L, D) is its unconditional counterpart.
        guidance: scale of the teacher's classifier-free guidance.
        warmup: q, from 0 to 1.

    Returns the loss and `scm_tangent_norm` (mean of ‖g‖), `scm_nan` (samples skipped).
    """
    t = per_sample(t_B, x0_BCTHW)
    x = t.cos() * x0_BCTHW + t.sin() * noise_BCTHW
    g = scm_tangent(student, teacher, x, t_B, text, null_text, guidance=guidance, warmup=warmup)
    finite = finite_samples(x, g)
    x, g = keep(finite, x), keep(finite, g)
    velocity = student.velocity(x, t_B, text)
    g_norm = norm(g)
    target = velocity.detach() + g / (per_sample(g_norm, g) + tangent_constant)
    finite &= finite_samples(velocity.detach())
    loss = squared_error(velocity - target, finite)
    metrics = {
        "scm_tangent_norm": g_norm.sum() / finite.sum().clamp(min=1),
        "scm_nan": (~finite).sum(),
    }
    return loss, metrics
