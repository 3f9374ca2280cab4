"""dCM: discrete-time consistency distillation, neighbours on a grid of times joined by steps of the teacher.

Notation: f the student's consistency function, F* the teacher's guided velocity. Shapes: B samples, C channels,
T frames, H × W, K + 1 times.
"""

from itertools import pairwise

import torch
from torch import Tensor

from rcm.flow import Wrapped, guided_velocity, per_sample, rf_to_trig, shifted
from rcm.objectives.loss import Loss, finite_samples, keep, squared_error


def dcm_times(u_B: Tensor, *, steps: int = 48, shift: float = 5.0, skip: int = 1) -> Tensor:
    """Decreasing TrigFlow times (skip + 1, B), `skip` steps of a grid of `steps` with a random offset.

    Rectified-flow times r_j = shift s_j / (1 + (shift - 1) s_j) with s_j = 1 - (u' + j / steps), j = 0 … skip, and
    u' = (1 - skip / steps) u, for draws u (B,) of U(0, 1). The last is 0 at the least.
    """
    if not 1 <= skip <= steps:
        raise ValueError(f"dcm_skip is {skip}, must be between 1 and dcm_steps = {steps}")
    offset_B = u_B.double() * (1 - skip / steps)
    j = torch.arange(skip + 1, dtype=torch.float64, device=u_B.device)[:, None]
    return rf_to_trig(shifted((1 - (offset_B + j / steps)).clamp(min=0), shift))


def dcm_loss(
    student: Wrapped,
    teacher: Wrapped,
    x0_BCTHW: Tensor,
    noise_BCTHW: Tensor,
    times_KB: Tensor,
    text: Tensor,
    null_text: Tensor,
    *,
    batch: int,
    guidance: float,
    guidance_form: str = "unconditional",
) -> Loss:
    """‖f(x_t, t) - sg f(x', t')‖², where Euler steps of the teacher, x' = x - (t - t') F*(x, t), join the two times.

    Passes: a guided one of the teacher for each step, one of the student without gradient and one with.

    Args:
        times_KB: (K + 1, B), t first and t' last; see `dcm_times`. The other arguments are as in `scm_loss`.

    Returns the loss and `dcm_gap_sum` (Σ mean |f - f'|), `dcm_nan` (samples skipped).
    """
    first = per_sample(times_KB[0], x0_BCTHW)
    x = first.cos() * x0_BCTHW + first.sin() * noise_BCTHW
    with torch.no_grad():
        below = x
        for t_B, next_B in pairwise(times_KB):
            direction = guided_velocity(teacher, below, t_B, text, null_text, guidance, guidance_form)
            below = below - per_sample(t_B - next_B, x) * direction
        target = student.denoise(below, times_KB[-1], text)
    finite = finite_samples(x, target)
    x0 = student.denoise(keep(finite, x), times_KB[0], text)
    finite = finite & finite_samples(x0.detach())
    error = x0 - keep(finite, target)
    metrics = {
        "dcm_gap_sum": keep(finite, error.detach()).abs().flatten(1).mean(dim=1).sum(),
        "dcm_nan": (~finite).sum(),
    }
    return squared_error(error, finite, batch), metrics
