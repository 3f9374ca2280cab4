"""The functions of the package: attention that carries tangents, and its explicit Jacobian-vector product.

Layout (B, H, S, D) as in `torch.nn.functional.scaled_dot_product_attention`. Queries and keys may differ in length, and
the query heads may be a multiple of the key heads: query head h reads key head h // (Hq / Hkv).
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, maybe_current_level
from torch._functorch import eager_transforms

from flash_jvp import operators, plain

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False, backend: str = "auto"
) -> Tensor:
    """softmax(q kᵀ · scale) v, for ordinary tensors (with a gradient) and for dual tensors (with a tangent).

    q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv); returns (B, Hq, Sq, Dv). `scale` is 1/√D unless given.
    `causal` masks key j > query i, whatever the lengths. Dual tensors are those of `torch.autograd.forward_ad` and of
    `torch.func.jvp`. `backend` is "math", "torch", "triton" or "auto"; `choose` says what "auto" takes.
    Raises ValueError on shapes, dtypes and devices that do not fit.
    """
    if _elementary():
        return attention_jvp(q, k, v, scale=scale, causal=causal, backend=backend)[0]
    (q, tq), (k, tk), (v, tv) = (forward_ad.unpack_dual(x) for x in (q, k, v))
    if tq is not None or tk is not None or tv is not None:
        o, to = attention_jvp(q, k, v, tq, tk, tv, scale=scale, causal=causal, backend=backend)
        return forward_ad.make_dual(o, to)
    if torch.compiler.is_compiling() and forward_ad._current_level >= 0 and maybe_current_level() is None:
        # The compiler would not see the tangents; where it may fall back to eager mode, this makes it do so.
        raise RuntimeError("dual tensors from outside of a compiled function: make them inside, with torch.func.jvp")
    q, k, v = (_autocast(x) for x in (q, k, v))
    _check(q, k, v, {}, scale, causal, backend)
    return operators.attention(q, k, v, _scale(q, scale), causal, backend)[0]


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attention` and its derivative along the tangents (`None`: zero, at no cost), which have their primals' shapes.

    The attention is differentiable in q, k and v; a gradient that reaches the derivative raises RuntimeError.
    """
    given = [x for x in (q, k, v, tq, tk, tv) if x is not None]
    elementary = _elementary() or any(forward_ad.unpack_dual(x).tangent is not None for x in given)
    q, k, v = (_autocast(x) for x in (q, k, v))
    tq, tk, tv = (None if x is None else _autocast(x) for x in (tq, tk, tv))
    _check(q, k, v, {"q": tq, "k": tk, "v": tv}, scale, causal, backend)
    if elementary:
        o, to, _ = plain.math(q, k, v, tq, tk, tv, _scale(q, scale), causal)
        return o, torch.zeros_like(o) if to is None else to
    return operators.attention_jvp(q, k, v, tq, tk, tv, _scale(q, scale), causal, backend)[:2]


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _autocast(x: Tensor) -> Tensor:
    """In the dtype of an active autocast, as `scaled_dot_product_attention` takes its inputs."""
    kind = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point() or not operators.autocasts(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _elementary() -> bool:
    """Under `torch.func.grad` (vjp, jacrev, hessian) or two forward modes: registered operators do not pass there.

    The operations of `plain.math` do, and have every derivative, with the whole score matrix.
    """
    if eager_transforms.JVP_NESTING > 1:
        return True
    if torch.compiler.is_compiling():  # which cannot ask for more, and does not pass torch.func.grad of an operator
        return False
    return any(transform.key() == TransformType.Grad for transform in get_interpreter_stack() or ())


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: dict[str, Tensor | None],
    scale: float | None,
    causal: bool,
    backend: str,
) -> None:
    """ValueError or TypeError on what is not supported, with what was found and what is expected."""
    if isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymInt | torch.SymFloat | None):
        raise TypeError(
            f"scale is {type(scale).__name__}, must be a number; a tensor belongs to q, which is multiplied"
        )
    if not isinstance(causal, bool):
        raise TypeError(f"causal is {type(causal).__name__}, must be True or False")
    if backend not in ("auto", *operators.BACKENDS):
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(('auto', *operators.BACKENDS))}")
    shapes = f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    matching = q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3]
    if not matching or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}; expected (B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv)")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"{shapes}; every size must be at least 1")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}; the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key heads")
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}; supported are {', '.join(map(str, DTYPES))}")
    for name, primal in {"q": q, "k": k, "v": v}.items():
        tangent = tangents.get(name)
        for kind, x in ((name, primal), (f"the tangent of {name}", tangent)):
            if x is not None and (x.dtype != q.dtype or x.device != q.device):
                raise ValueError(f"{kind} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: they must agree")
        if tangent is not None and tangent.shape != primal.shape:
            raise ValueError(f"the tangent of {name} is {tuple(tangent.shape)}, its primal {tuple(primal.shape)}")
