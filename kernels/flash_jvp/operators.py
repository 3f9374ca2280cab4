"""The registered operators behind `attention` and `attention_jvp`, and which kernel each of them takes.

torch.compile and torch.export keep them whole: each has a fake implementation and, for O, a backward operator.
"""

import importlib.util
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from flash_jvp import library, plain

BACKENDS = ("math", "torch", "triton")
REACHED = (
    "a gradient has reached the tangent of attention, which has none here: the gradient kernel is that of O alone, and "
    "dropping this part would be a silent error. Detach the tangent (sCM, MeanFlow and rCM use it as a constant) or "
    "compute it under torch.no_grad()"
)


def choose(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, backend: str = "auto") -> dict[str, str]:
    """Which kernels `attention`, `attention_jvp` and the gradient of their O take for such tensors.

    Raises ValueError where the backend asked for cannot take them.
    """
    own = own_backend(q, k, v, backend)
    primal = library.forward_name(q, k, v, 1.0, causal) if backend == "auto" else None
    return {
        "attention": f"PyTorch {primal}" if primal else own,
        "attention_jvp": own,
        "backward": backward_name(q, k, v, causal, backend),
    }


def own_backend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> str:
    """This package's backend for such tensors: the one asked for, or for "auto" the fastest that takes them."""
    if backend in ("math", "torch"):
        return backend
    if backend == "auto" and q.device.type != "cuda":
        return "torch"
    if not importlib.util.find_spec("triton"):
        refusal: str | None = "Triton is not installed (pip install triton, on Linux)"
    else:
        from flash_jvp import fused

        refusal = fused.refusal(q, k, v)
    if refusal and backend == "triton":
        raise ValueError(f"backend 'triton' cannot take these tensors: {refusal}. Use backend='auto' or 'torch'")
    return "torch" if refusal else "triton"


def backward_name(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: str) -> str:
    """The kernel of the gradient: the one that was measured to be the fastest here, or else the first of the list."""
    own = own_backend(q, k, v, backend)
    if backend != "auto":
        return own
    names = [*library.backwards(q, k, v, causal), own]
    if own == "triton":
        from flash_jvp import tuning

        measured = tuning.backward(q, k)
        return measured if measured in names else names[0]
    return names[0]


def _own(backend: str) -> Any:
    """The module-like pair of functions `forward`, `backward` of one of this package's backends."""
    if backend == "triton":
        from flash_jvp import fused

        return fused.forward, fused.backward
    return {"math": plain.math, "torch": plain.stream}[backend], plain.stream_backward


def _refuse_duals(*tensors: Tensor | None) -> None:
    """An operator below the autograd layer would drop tangents in silence."""
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise RuntimeError(
            "this operator drops the tangents of dual tensors: call flash_jvp.attention, and where torch.compile "
            "is used, make the dual tensors inside the compiled function (torch.func.jvp)"
        )


@torch.library.custom_op("flash_jvp::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, backend: str) -> tuple[Tensor, Tensor]:
    """O and the log-sum-exp of its rows."""
    _refuse_duals(q, k, v)
    result = library.forward(q, k, v, scale, causal) if backend == "auto" else None
    if result is None:
        o, _, lse = _own(own_backend(q, k, v, backend))[0](q, k, v, None, None, None, scale, causal)
    else:
        o, lse = result
    return o.contiguous(), lse.contiguous()


@torch.library.custom_op("flash_jvp::attention_jvp", mutates_args=())
def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """O, its tangent and the log-sum-exp of its rows."""
    _refuse_duals(q, k, v, tq, tk, tv)
    o, to, lse = _own(own_backend(q, k, v, backend))[0](q, k, v, tq, tk, tv, scale, causal)
    return o, torch.zeros_like(o) if to is None else to, lse


@torch.library.custom_op("flash_jvp::attention_backward", mutates_args=())
def attention_backward(
    go: Tensor,
    gto: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of O. Raises where the tangent's own gradient is not zero."""
    if gto is not None and gto.any():
        raise RuntimeError(REACHED)
    name = backward_name(q, k, v, causal, backend)
    run = _own(name)[1] if name in BACKENDS else library.backwards(q, k, v, causal)[name]
    dq, dk, dv = run(go.contiguous(), q, k, v, o, lse, scale, causal)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


@attention_jvp.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *tangents_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    o, lse = _outputs(q, v)
    return o, torch.empty_like(o), lse


@attention_backward.register_fake
def _(go: Tensor, gto: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *tangents, scale, causal, backend = inputs
    o, *_, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse)
    ctx.options, ctx.tangents = (scale, causal, backend), len(tangents)


def _backward(ctx: Any, go: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    gto = others[0] if ctx.tangents else None
    # A compiled backward pass is handed zeros for the outputs that have no gradient, so that it must look at them.
    if gto is not None and get_proxy_mode() is None:
        raise RuntimeError(REACHED)
    gradients = (None,) * 3 if go is None else attention_backward(go, gto, *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None,) * (ctx.tangents + 3)


attention.register_autograd(_backward, setup_context=_save)
attention_jvp.register_autograd(_backward, setup_context=_save)
