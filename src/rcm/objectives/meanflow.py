"""MeanFlow distillation, which the paper calls sCTM (App. F.1): the flow between any two times, in TrigFlow form.

The student's F_θ(x, t, s) is to carry x from t down to s ≤ t along the teacher's trajectory dx/dt = F*(x, t):

    f(x, t, s) = cos(t - s) x - sin(t - s) F(x, t, s)

which is x itself at s = t and the consistency function at s = 0. F is the average velocity between the two times (arXiv
2505.13447, eq. 3), on an arc instead of a chord. f is the exact flow map where it does not change along a trajectory
while s is held:

    0 = df/dt = -cos(t - s) (F - F*) - sin(t - s) (x + dF/dt)
    F = F* - tan(t - s) (x + dF/dt)

the MeanFlow identity u = v - (t - s) du/dt (there eq. 6) in TrigFlow. With the weight cos(t - s), which keeps the
tangent finite, this is the tangent of sCM with t - s for t: the losses are one function, and s = 0 is sCM.
"""

from typing import Any

from torch import Tensor

from rcm.flow import Wrapped
from rcm.objectives.loss import Loss
from rcm.objectives.scm import scm_loss


def meanflow_loss(
    student: Wrapped,
    teacher: Wrapped,
    x0_BCTHW: Tensor,
    noise_BCTHW: Tensor,
    t_B: Tensor,
    s_B: Tensor,
    text: Tensor,
    null_text: Tensor,
    **options: Any,
) -> Loss:
    """‖F_θ - F_- - ĝ‖² with g = -cos² (F_- - F*) - cos sin (x + dF_-/dt), of the angle t - s.

    Args:
        student: its network takes a second time, see `rcm.flow.Wrapped`.
        s_B: 0 ≤ s ≤ t. Two draws of p_G, sorted, are such a pair.
        options: and the other arguments, as in `scm_loss`.

    Returns the loss and `meanflow_tangent_norm_sum` (Σ ‖g‖), `meanflow_nan` (samples skipped).
    """
    loss, metrics = scm_loss(student, teacher, x0_BCTHW, noise_BCTHW, t_B, text, null_text, s_B=s_B, **options)
    return loss, {key.replace("scm", "meanflow"): value for key, value in metrics.items()}
