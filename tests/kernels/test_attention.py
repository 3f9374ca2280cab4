"""Attention of primals and tangents, against `torch.func.jvp` of plain attention in float64."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from flash_jvp import attention, attention_jvp, plain

BACKENDS = ["math", "torch"]

LENGTHS = [(1, 1), (9, 9), (15, 63), (64, 65), (127, 127), (3, 200)]
ABSENT = ["", "q", "k", "v", "kv", "qk", "qkv"]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


def inputs(
    queries: int, keys: int, *, heads: int = 3, group: int = 1, size: int = 16, value_size: int = 16, seed: int = 0
) -> list[Tensor]:
    """q, k, v, tq, tk, tv of shapes (2, heads · group, S, D), (2, heads, S, D), ... not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, heads * group, size), (keys, heads, size), (keys, heads, value_size)] * 2
    return [torch.randn(2, s, h, d, generator=generator, dtype=torch.float64).transpose(1, 2) for s, h, d in shapes]


def reference(tensors: list[Tensor], scale: float | None = None, causal: bool = False) -> tuple[Tensor, Tensor]:
    primals, tangents = tuple(tensors[:3]), tuple(tensors[3:])
    return torch.func.jvp(lambda q, k, v: attend(q, k, v, scale, causal), primals, tangents)


def relative(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / y.norm().clamp(min=1)).item()


@pytest.fixture(params=[None, 16], ids=["one block", "many blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(plain, "KV_BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_jvp_is_that_of_plain_attention(queries: int, keys: int, backend: str, absent: str) -> None:
    tensors = inputs(queries, keys)
    given = [None if name in absent else x for name, x in zip("qkv", tensors[3:], strict=True)]
    o, to = attention_jvp(*tensors[:3], *given, backend=backend)
    zeros = [torch.zeros_like(x) if t is None else x for x, t in zip(tensors[3:], given, strict=True)]
    expected_o, expected_to = reference([*tensors[:3], *zeros])
    assert relative(o, expected_o) < 1e-13
    assert relative(to, expected_to) < 1e-12


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("backend", BACKENDS)
def test_jvp_with_own_scale_and_value_size(backend: str) -> None:
    tensors = inputs(20, 50, size=8, value_size=24)
    o, to = attention_jvp(*tensors, scale=0.7, backend=backend)
    expected_o, expected_to = reference(tensors, scale=0.7)
    assert relative(o, expected_o) < 1e-13
    assert relative(to, expected_to) < 1e-12


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (33, 33), (20, 50), (50, 20), (1, 40)])
def test_masks_and_shared_key_heads(queries: int, keys: int, backend: str, group: int, causal: bool) -> None:
    """Causal masks count from the first key, whatever the lengths; JVP and gradient are those of plain attention."""
    tensors = inputs(queries, keys, heads=2, group=group)
    expected = reference(tensors, causal=causal)
    primals = [x.clone().requires_grad_() for x in tensors[:3]]
    o, to = attention_jvp(*primals, *tensors[3:], causal=causal, backend=backend)
    assert relative(o, expected[0]) < 1e-13
    assert relative(to, expected[1]) < 1e-12
    gradient = torch.randn_like(o)
    exact = torch.autograd.grad(attend(*primals, causal=causal), primals, gradient)
    for out in (o, attention(*primals, causal=causal, backend=backend)):
        assert relative(out, expected[0]) < 1e-13
        result = torch.autograd.grad(out, primals, gradient)
        assert all(relative(x, y) < 1e-12 for x, y in zip(result, exact, strict=True))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_keys_that_are_not_seen_reach_nothing(backend: str) -> None:
    """Not even where they, or their tangents, are huge or not numbers."""
    tensors = inputs(8, 40)
    o, to = reference(tensors, causal=True)
    for spoiled in (1, 4):
        for value in (1e30, torch.nan):
            given = [x.clone() for x in tensors]
            given[spoiled][:, :, 5:] = value
            result = attention_jvp(*given, causal=True, backend=backend)
            assert all(relative(x[:, :, :5], y[:, :, :5]) < 1e-12 for x, y in zip(result, (o, to), strict=True))


@pytest.mark.parametrize("queries", [7, 19])
def test_causal_is_that_of_scaled_dot_product_attention(queries: int) -> None:
    q, k, v, *_ = inputs(queries, 11)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert all(relative(attention(q, k, v, causal=True, backend=b), expected) < 1e-13 for b in (*BACKENDS, "auto"))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("sign", [1, -1])
def test_jvp_of_large_logits(sign: int) -> None:
    """Row maxima of ±80 and more: exp of an unshifted score overflows in float32."""
    tensors = inputs(40, 70)
    tensors[0] = tensors[0].abs() * 20
    tensors[1] = tensors[1].abs() * 10 * sign
    assert (tensors[0] @ tensors[1].mT / 4).abs().amax(dim=-1).min() > 80
    expected = reference(tensors)
    for result, exact in zip(attention_jvp(*(x.float() for x in tensors)), expected, strict=True):
        assert relative(result.double(), exact) < 1e-3


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_streaming_is_as_exact_as_the_plain_form_in_the_same_precision(dtype: torch.dtype) -> None:
    tensors = [x.to(dtype) for x in inputs(63, 127)]
    exact = reference([x.double() for x in tensors])
    naive = attention_jvp(*tensors, backend="math")
    streamed = attention_jvp(*tensors, backend="torch")
    eps = torch.finfo(dtype).eps
    size = tensors[2].double().norm() + tensors[5].double().norm()
    for x, y, z in zip(streamed, naive, exact, strict=True):
        assert x.dtype == dtype
        assert (x - z).norm() <= 2 * (y - z).norm() + 4 * eps * (z.norm() + size)


def test_memory_is_linear_in_the_number_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No intermediate of the streaming form is as large as the score matrix."""
    monkeypatch.setattr(plain, "KV_BLOCK", 32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)), 0)
            return out

    tensors = inputs(512, 512)
    with Watch(), torch.no_grad():
        attention_jvp(*tensors, backend="torch")
    assert largest <= tensors[0].numel() * 2  # 2 · 3 · 512 · 32, where the score matrix has 2 · 3 · 512 · 512


def test_dual_tensors_in_dual_tensor_out() -> None:
    tensors = inputs(9, 12)
    expected_o, expected_to = reference(tensors)
    with torch.no_grad(), forward_ad.dual_level():
        o = attention(*(forward_ad.make_dual(x, t) for x, t in zip(tensors[:3], tensors[3:], strict=True)))
        o, to = forward_ad.unpack_dual(o)
    assert relative(o, expected_o) < 1e-13
    assert relative(to, expected_to) < 1e-12


def test_dual_queries_with_plain_keys_as_in_cross_attention() -> None:
    q, k, v, tq, tk, tv = inputs(9, 12)
    _, expected = reference([q, k, v, tq, tk * 0, tv * 0])
    with torch.no_grad(), forward_ad.dual_level():
        to = forward_ad.unpack_dual(attention(forward_ad.make_dual(q, tq), k, v)).tangent
    assert relative(to, expected) < 1e-12


def test_plain_tensors_keep_their_gradient() -> None:
    tensors = [x.requires_grad_() for x in inputs(9, 12)[:3]]
    gradient = torch.randn_like(attend(*tensors))
    expected = torch.autograd.grad(attend(*tensors), tensors, gradient)
    result = torch.autograd.grad(attention(*tensors), tensors, gradient)
    assert all(relative(x, y) < 1e-12 for x, y in zip(result, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_primal_of_a_jvp_has_its_gradient_and_the_tangent_refuses_one(backend: str) -> None:
    tensors = [x.requires_grad_() for x in inputs(9, 12)]
    o, to = attention_jvp(*tensors, backend=backend)
    expected_o, expected_to = reference([x.detach() for x in tensors])
    assert relative(o, expected_o) < 1e-13
    assert relative(to, expected_to) < 1e-12
    gradient = torch.randn_like(o)
    expected = torch.autograd.grad(attend(*tensors[:3]), tensors[:3], gradient)
    result = torch.autograd.grad(o, tensors[:3], gradient, retain_graph=True)
    assert all(relative(x, y) < 1e-12 for x, y in zip(result, expected, strict=True))
    for loss in (to.sum(), (o + to).sum()):
        with pytest.raises(RuntimeError, match="a gradient has reached the tangent"):
            loss.backward(retain_graph=True)


def test_gradient_that_reaches_the_tangent_of_a_dual_raises() -> None:
    tensors = inputs(9, 12)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    with forward_ad.dual_level():
        q, k, v = (forward_ad.make_dual(x * weight, t) for x, t in zip(tensors[:3], tensors[3:], strict=True))
        o, to = forward_ad.unpack_dual(attention(q, k, v))
        o.sum().backward(retain_graph=True)
        assert weight.grad is not None
        with pytest.raises(RuntimeError, match="a gradient has reached the tangent"):
            to.sum().backward()
