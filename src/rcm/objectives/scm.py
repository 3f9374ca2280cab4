"""sCM: continuous-time consistency distillation in the rearranged form of rCM (arXiv 2510.08431, algorithm 1).

Notation: C = cos t, S = sin t, F_θ the student's TrigFlow velocity, F_- the same without gradient, F* the teacher's
guided velocity, q the warm-up ratio. Shapes: B samples, C channels, T frames, H × W.
"""

import torch
from torch import Tensor

from rcm.flow import Wrapped, guided_velocity, per_sample
from rcm.objectives.derivative import along_trajectory
from rcm.objectives.loss import Loss, check, finite_samples, keep, norm, squared_error

NORMALISATIONS = ("norm", "squared_norm")
WARMUP_TERMS = ("both", "position")
TANGENT_PASSES = ("shared", "separate")


def scm_tangent(
    student: Wrapped,
    teacher: Wrapped,
    x_BCTHW: Tensor,
    t_B: Tensor,
    text: Tensor,
    null_text: Tensor,
    *,
    guidance: float,
    guidance_form: str = "unconditional",
    warmup: float = 1.0,
    tangent_warmup_terms: str = "both",
    derivative: str = "exact",
    derivative_step: float = 1e-4,
    s_B: Tensor | None = None,
    graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """F_θ and the tangent g, before normalisation, at points x of the probability flow; float64, shaped as x.

        g = -C √(1 - q² S²) (F_- - F*) - q (C S x + C S dF_-/dt)         tangent_warmup_terms "both"
        g = -C √(1 - q² S²) (F_- - F*) - (q C S x + C S dF_-/dt)         "position"

    One forward-mode pass along (C S F*, C S) gives F_- and C S dF_-/dt together; F_θ has its graph if `graph`, g has
    none. At q = 1, g = C df_-/dt, the derivative of the consistency function along the teacher's trajectory: zero where
    the student is exact. With a second time s, C and S are those of t - s (see `rcm.objectives.meanflow`).
    """
    check("tangent_warmup_terms", tangent_warmup_terms, WARMUP_TERMS)
    angle_B = t_B.double() if s_B is None else t_B.double() - s_B.double()
    angle = per_sample(angle_B, x_BCTHW)
    cos, sin = angle.cos(), angle.sin()
    with torch.no_grad():
        direction = guided_velocity(teacher, x_BCTHW, t_B, text, null_text, guidance, guidance_form)
    velocity, slope = along_trajectory(
        lambda x, t: student.velocity(x, t, text, s_B),
        x_BCTHW,
        t_B,
        direction,
        angle_B.cos() * angle_B.sin(),
        derivative=derivative,
        step=derivative_step,
        graph=graph,
    )
    with torch.no_grad():
        gap = cos * (1 - (warmup * sin) ** 2).sqrt() * (velocity - direction)
        if tangent_warmup_terms == "both":
            return velocity, -gap - warmup * (cos * sin * x_BCTHW + slope)
        return velocity, -gap - (warmup * cos * sin * x_BCTHW + slope)


def scm_loss(
    student: Wrapped,
    teacher: Wrapped,
    x0_BCTHW: Tensor,
    noise_BCTHW: Tensor,
    t_B: Tensor,
    text: Tensor,
    null_text: Tensor,
    *,
    batch: int,
    guidance: float,
    guidance_form: str = "unconditional",
    warmup: float = 1.0,
    tangent_warmup_terms: str = "both",
    tangent_constant: float = 0.1,
    tangent_normalisation: str = "norm",
    derivative: str = "exact",
    derivative_step: float = 1e-4,
    tangent_pass: str = "shared",
    s_B: Tensor | None = None,
) -> Loss:
    """‖F_θ - F_- - ĝ‖² at x_t = C x0 + S noise, with the normalised tangent ĝ = g / (‖g‖ + c), c the tangent constant.

    The value is about 1 whatever the student; what it teaches is the gradient, -2 ĝ in F_θ. F_- is taken from the pass
    that has the graph, so that rounding, which differs between two passes, stays out of the gradient.

    Args:
        x0_BCTHW: data of unit standard deviation.
        t_B: TrigFlow times, of the distribution p_G.
        text: condition (B, L, D); `null_text` (B or 1, L, D) is its unconditional counterpart.
        batch: samples of the global batch, of which those at hand may be a part.
        guidance: scale of the teacher's classifier-free guidance, in the form that `rcm.flow.guided` describes.
        warmup: q, from 0 to 1; `tangent_warmup_terms` says what it multiplies, see `scm_tangent`.
        tangent_normalisation: "norm" as in the original sCM and the reference code; "squared_norm" is g / (‖g‖² + c),
            which eq. 4 of the paper prints, and which does not normalise.
        derivative: of F_-, see `along_trajectory`; `derivative_step` is the δ of its finite differences.
        tangent_pass: "shared" takes F_θ from the forward pass that gives the tangent (a dual one costs three plain
            ones, so this saves a fourth); "separate" makes a pass each. The gradients agree. A sample whose F_θ itself
            is not finite is masked in the loss, but its backward pass is through what overflowed.
        s_B: second time, see `rcm.objectives.meanflow`.

    Returns the loss and `scm_tangent_norm_sum` (Σ ‖g‖), `scm_nan` (samples skipped).
    """
    check("tangent_normalisation", tangent_normalisation, NORMALISATIONS)
    check("tangent_pass", tangent_pass, TANGENT_PASSES)
    t = per_sample(t_B, x0_BCTHW)
    x = t.cos() * x0_BCTHW + t.sin() * noise_BCTHW
    finite = finite_samples(x)
    x = keep(finite, x)
    velocity, g = scm_tangent(
        student,
        teacher,
        x,
        t_B,
        text,
        null_text,
        guidance=guidance,
        guidance_form=guidance_form,
        warmup=warmup,
        tangent_warmup_terms=tangent_warmup_terms,
        derivative=derivative,
        derivative_step=derivative_step,
        s_B=s_B,
        graph=tangent_pass == "shared",
    )
    finite = finite & finite_samples(g)
    g = keep(finite, g)
    if tangent_pass == "separate":
        velocity = student.velocity(keep(finite, x), t_B, text, s_B)
    g_norm = norm(g)
    length = g_norm if tangent_normalisation == "norm" else g_norm.square()
    target = velocity.detach() + g / (per_sample(length, g) + tangent_constant)
    finite = finite & finite_samples(velocity.detach())
    loss = squared_error(velocity - target, finite, batch)
    return loss, {"scm_tangent_norm_sum": g_norm.sum(), "scm_nan": (~finite).sum()}
