"""Attention of primals by kernels that PyTorch carries (or flash-attn brings), with the log-sum-exp of its rows.

The forward is the one that `scaled_dot_product_attention` would take. The backwards take O and the log-sum-exp of
whichever forward made them, this package's own included, so that training needs no second forward pass.
"""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor, Tensor]]

aten = torch.ops.aten


def forward_name(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str | None:
    """The fused kernel that `scaled_dot_product_attention` takes here; None if it takes one without a log-sum-exp.

    None for a causal mask over different lengths as well, except on a CPU: the CUDA kernels align it in different ways.
    """
    kind = q.device.type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and (q.shape[3] % 8 or (causal and q.shape[2] != k.shape[2]))):
        return None
    grouped = q.shape[1] != k.shape[1]
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, enable_gqa=grouped)
    if choice == SDPBackend.FLASH_ATTENTION.value:
        return "flash-cpu" if kind == "cpu" else "flash"
    return "cudnn" if choice == SDPBackend.CUDNN_ATTENTION.value else None


def _flash_cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    o, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    return o, lse.view(q.shape[:3])


FORWARDS = {"flash-cpu": _flash_cpu_forward, "flash": _flash_forward, "cudnn": _cudnn_forward}


def backwards(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Backward]:
    """The backward kernels that take these tensors, the safest choice first.

    None for a causal mask over different lengths: flash-attn 2.1 and later aligns it with the last key, not the first.
    """
    if q.shape[3] != v.shape[3] or (causal and q.shape[2] != k.shape[2]):
        return {}
    if q.device.type == "cpu":
        return {"flash-cpu": _flash_cpu} if q.dtype in (torch.float32, torch.float64, torch.bfloat16) else {}
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[3] % 8 or q.shape[3] > 192:
        return {}
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return {}
    found: dict[str, Backward] = {}
    if torch.backends.cuda.is_flash_attention_available():
        found["flash"] = _flash
    exact = torch.are_deterministic_algorithms_enabled()
    if q.shape[1] == k.shape[1] and q.shape[3] <= 128 and torch.backends.cudnn.is_available() and not exact:
        found["cudnn"] = _cudnn
    if _has_flash_attn():
        found["flash-attn"] = _flash_attn
    return found


@cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _flash_cpu(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        go, q, k, v, o, lse.to(torch.promote_types(q.dtype, torch.float32)), 0.0, causal, scale=scale
    )


def _flash(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, which is 0: not read
    return aten._scaled_dot_product_flash_attention_backward(
        *(go, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, state, state), scale=scale
    )


def _cudnn(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.empty((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(
        *(go, q, k, v, o, lse.unsqueeze(-1), state, state, None, None, None, q.shape[2], k.shape[2], 0.0, causal),
        scale=scale,
    )


def _flash_attn(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    go, q, k, v, o = (x.transpose(1, 2).contiguous() for x in (go, q, k, v, o))
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    exact = torch.are_deterministic_algorithms_enabled()
    options = {"dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "softcap": 0.0, "alibi_slopes": None}
    window = {"window_size_left": -1, "window_size_right": -1, "deterministic": exact}
    _flash_attn_backward(go, q, k, v, o, lse, *gradients, **options, **window)
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv
