"""The registered operators behind `attention` and `attention_jvp`, and which kernel each of them takes.

torch.compile and torch.export keep them whole: each has a fake implementation and, for O, a backward operator.
"""

import importlib.util
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from functools import cache
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
TWICE = (
    "the gradient of attention is not differentiated again: its own kernel has no derivative. torch.func.grad (or jvp) "
    "of a torch.func.jvp (or grad) works, by elementary operations"
)

_taken: dict[str, set[str]] = defaultdict(set)


def taken() -> dict[str, list[str]]:
    """The kernels that `attention`, `attention_jvp` and "backward" have run on so far in this process."""
    return {operator: sorted(names) for operator, names in sorted(_taken.items())}


def choose(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, backend: str = "auto") -> dict[str, str]:
    """The kernels that `attention`, `attention_jvp` and "backward", the gradient of their O, take for such tensors.

    Raises ValueError where the backend asked for cannot take them.
    """
    return {
        "attention": forward_name(q, k, v, causal, backend),
        "attention_jvp": own_backend(q, k, v, backend),
        "backward": backward_name(q, k, v, causal, backend),
    }


def forward_name(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: str) -> str:
    """The kernel for ordinary tensors: PyTorch's own where it has one, unless a backend is asked for."""
    primal = library.forward_name(q, k, v, causal) if backend == "auto" else None
    return primal or own_backend(q, k, v, backend)


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def own_backend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> str:
    """This package's backend for such tensors: the one asked for, or for "auto" the fastest that takes them."""
    if backend in ("math", "torch"):
        return backend
    if backend == "auto" and q.device.type != "cuda":
        return "torch"
    if not has_triton():
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
    """The functions `forward` and `backward` of one of this package's backends."""
    if backend == "triton":
        from flash_jvp import fused

        return fused.forward, fused.backward
    return (plain.math, plain.math_backward) if backend == "math" else (plain.stream, plain.stream_backward)


def autocasts(kind: str) -> bool:
    """Whether an autocast is active on a kind of device."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _exactly(kind: str) -> AbstractContextManager[Any]:
    """Inside an operator, autocast must not round what is computed in float32 on purpose."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


def _fresh(x: Tensor) -> Tensor:
    """Contiguous, and no view to autograd: a user may write into what an operator returns."""
    return torch.ops.aten._unsafe_view(x.contiguous(), x.shape)


@torch.library.custom_op("flash_jvp::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, backend: str) -> tuple[Tensor, Tensor]:
    """O and the log-sum-exp of its rows."""
    name = forward_name(q, k, v, causal, backend)
    _taken["attention"].add(name)
    with _exactly(q.device.type):
        if name in BACKENDS:
            o, _, lse = _own(name)[0](q, k, v, None, None, None, scale, causal)
        else:
            o, lse = library.FORWARDS[name](q, k, v, scale, causal)
    return _fresh(o), _fresh(lse.to(plain.lse_dtype(q)))


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
    name = own_backend(q, k, v, backend)
    _taken["attention_jvp"].add(name)
    with _exactly(q.device.type):
        o, to, lse = _own(name)[0](q, k, v, tq, tk, tv, scale, causal)
    return _fresh(o), torch.zeros_like(o) if to is None else _fresh(to), _fresh(lse)


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
    if plain.keys_seen(q, k, causal) == 1:  # O is that one value, whatever q and k are: exactly, where kernels round
        dv = v.new_zeros(v.shape)
        dv[:, :, 0] = go.unflatten(1, (v.shape[1], -1)).sum(dim=(2, 3), dtype=plain.lse_dtype(q))
        return q.new_zeros(q.shape), k.new_zeros(k.shape), dv
    name = backward_name(q, k, v, causal, backend)
    _taken["backward"].add(name)
    run = _own(name)[1] if name in BACKENDS else library.backwards(q, k, v, causal)[name]
    with _exactly(q.device.type):
        if name not in BACKENDS:  # PyTorch's kernels read some strides wrongly: NaN where the last is not 1 (2.13)
            q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        dq, dk, dv = run(go.contiguous(), q, k, v, o, lse, scale, causal)
    return _fresh(dq), _fresh(dk), _fresh(dv)


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
    lse = q.new_empty(q.shape[:3], dtype=plain.lse_dtype(q))
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
    if go is not None and forward_ad.unpack_dual(go).tangent is not None:
        raise RuntimeError(TWICE)
    # A compiled backward pass is handed zeros for the outputs that have no gradient, so that it must look at them.
    if gto is not None and get_proxy_mode() is None:
        raise RuntimeError(REACHED)
    if go is None and gto is not None:  # O is no output of the compiled function
        go = torch.zeros_like(gto)
    gradients = (None,) * 3 if go is None else attention_backward(go, gto, *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None,) * (ctx.tangents + 3)


def _no_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(TWICE)


attention_backward.register_autograd(_no_backward)
attention.register_autograd(_backward, setup_context=_save)
attention_jvp.register_autograd(_backward, setup_context=_save)
