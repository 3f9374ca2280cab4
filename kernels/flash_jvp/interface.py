"""The two functions of the package: attention that carries tangents, and its explicit Jacobian-vector product.

Layout (B, H, S, D) as in `torch.nn.functional.scaled_dot_product_attention`; queries and keys may differ in length.
"""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from flash_jvp import plain

BACKENDS = {"math": plain.math, "torch": plain.stream}


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v, for plain tensors (with a gradient) and for forward-mode dual tensors (with a tangent).

    `scale` is 1/√D unless given. Inside `torch.func` transforms it is composed of elementary operations.
    """
    if any(map(is_functorch_wrapped_tensor, (q, k, v))):
        return torch.softmax(q @ k.mT * _scale(q, scale), dim=-1) @ v
    (q, tq), (k, tk), (v, tv) = (forward_ad.unpack_dual(x) for x in (q, k, v))
    if tq is None and tk is None and tv is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return forward_ad.make_dual(*attention_jvp(q, k, v, tq, tk, tv, scale=scale))


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, Sq, Dv) and its derivative along the tangents (`None`: zero), which have their primals' shapes.

    The attention is differentiable in q, k and v; a gradient that reaches the tangent raises RuntimeError.
    `backend` is "math" (whole score matrix), "torch" (streaming) or "auto". Raises ValueError on wrong shapes.
    """
    _check(q, k, v, tq, tk, tv, backend)
    run = BACKENDS["torch" if backend == "auto" else backend]
    inputs = [x for x in (q, k, v, tq, tk, tv) if x is not None]
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return run(q, k, v, tq, tk, tv, _scale(q, scale))
    with torch.no_grad():
        _, to = run(q, k, v, tq, tk, tv, _scale(q, scale))
    return F.scaled_dot_product_attention(q, k, v, scale=scale), _NoGradient.apply(to, *inputs)


class _NoGradient(torch.autograd.Function):
    """Ties the tangent to the inputs' graph only to raise there: dropping its gradient would be a silent error."""

    @staticmethod
    def forward(ctx: Any, to: Tensor, *inputs: Tensor) -> Tensor:
        return to

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("the tangent of attention has no gradient: detach it, or compute it under torch.no_grad()")


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, backend: str
) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(('auto', *BACKENDS))}")
    if q.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; expected (B, H, S, D)")
    for name, primal, tangent in (("q", q, tq), ("k", k, tk), ("v", v, tv)):
        if tangent is not None and tangent.shape != primal.shape:
            raise ValueError(f"the tangent of {name} is {tuple(tangent.shape)}, its primal {tuple(primal.shape)}")
