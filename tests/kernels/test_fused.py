"""The Triton kernels (in Triton's interpreter where there is no GPU) against float64 autodiff of plain attention."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

pytest.importorskip("triton", reason="Triton is not installed: the fused kernels cannot run")

from flash_jvp import fused, plain, tuning
from flash_jvp.plain import lse_dtype
from flash_jvp.tuning import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else [torch.float32, torch.float16, torch.bfloat16]


class Case(NamedTuple):
    queries: int
    keys: int
    d: int = 16
    causal: bool = False
    given: str = "qkv"  # which tangents are
    dtype: torch.dtype = torch.float32
    heads: int = 2
    heads_kv: int = 2
    scale: float | None = None
    batch: int = 1


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Plain attention, in the precision of its inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = q @ k.mT * scale
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    return torch.softmax(s, dim=-1) @ v


def tensors(case: Case, seed: int = 0) -> list[Tensor]:
    """q, k, v, their tangents and the gradient of o, in a (B, S, H, D) layout seen as (B, H, S, D)."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (case.queries, case.heads), (case.keys, case.heads_kv)
    sizes = [queries, keys, keys] * 2 + [queries]
    random = (torch.randn(case.batch, length, heads, case.d, generator=generator) for length, heads in sizes)
    return [x.to(DEVICE, case.dtype).transpose(1, 2) for x in random]


def check(case: Case, given: list[Tensor]) -> None:
    """The bound of all five outputs: twice the error of plain attention in the same precision, and rounding."""
    q, k, v, *tangents, go = given
    tangents = [t if name in case.given else None for name, t in zip("qkv", tangents, strict=True)]
    scale = case.d**-0.5 if case.scale is None else case.scale
    with new_memory_is_nan():
        o, to, lse = fused.forward(q, k, v, *tangents, scale, case.causal)
        gradients = fused.backward(go, q, k, v, o, lse, scale, case.causal)
    assert (to is None) == (not case.given)
    assert lse.dtype == lse_dtype(q)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        primals = [x.to(dtype, copy=True, memory_format=torch.contiguous_format) for x in (q, k, v)]
        directions = [torch.zeros_like(x) if t is None else t.to(dtype) for x, t in zip(primals, tangents, strict=True)]

        def f(*x: Tensor) -> Tensor:
            return attend(*x, scale, case.causal)

        leaves = [x.requires_grad_() for x in primals]
        primal = f(*leaves)
        backward = torch.autograd.grad(primal, leaves, go.to(dtype))
        jvp = torch.func.jvp(f, tuple(x.detach() for x in primals), tuple(directions))[1]
        return [primal.detach(), jvp, *backward]

    exact, naive = plain(torch.float64), plain(case.dtype)
    eps = torch.finfo(case.dtype).eps
    forward_size = v.double().norm() + (0 if tangents[2] is None else tangents[2].double().norm())
    sizes = [forward_size] * 2 + [go.double().norm()] * 3
    names = ("o", "to", "dq", "dk", "dv")
    for name, x, ref, plainly, size in zip(names, (o, to, *gradients), exact, naive, sizes, strict=True):
        if x is None:
            continue
        assert x.shape == ref.shape, name
        assert x.dtype == case.dtype, name
        assert x.is_contiguous(), name
        assert x.isfinite().all(), name
        bound = 2 * (plainly.double() - ref).norm() + 4 * eps * (ref.norm() + size)
        assert (x.double() - ref).norm() <= bound, (name, (x.double() - ref).norm() / bound)
    s = q.double() @ k.double().repeat_interleave(case.heads // case.heads_kv, 1).mT * scale
    if case.causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
    assert torch.allclose(lse.double(), s.logsumexp(-1), rtol=1e-5, atol=2e-5)


@contextlib.contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """What a kernel does not write is seen."""
    before = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = before


def test_unwritten_memory_is_seen() -> None:
    with new_memory_is_nan():
        assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (15, 15), (63, 64), (64, 63), (65, 65), (127, 127), (1, 127), (65, 15), (15, 65)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(queries: int, keys: int, causal: bool, dtype: torch.dtype) -> None:
    case = Case(queries, keys, causal=causal, dtype=dtype)
    check(case, tensors(case))


@pytest.mark.parametrize("given", ["", "q", "k", "v", "qk", "qv", "kv"])
def test_absent_tangents(given: str) -> None:
    case = Case(65, 63, given=given)
    check(case, tensors(case))


@pytest.mark.parametrize("d", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(d: int, dtype: torch.dtype) -> None:
    case = Case(65, 63, d=d, dtype=dtype)
    check(case, tensors(case))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("heads", "heads_kv"), [(6, 2), (4, 1)])
def test_grouped_query_heads(heads: int, heads_kv: int, causal: bool) -> None:
    case = Case(33, 20, batch=2, heads=heads, heads_kv=heads_kv, causal=causal)
    check(case, tensors(case))


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 1), Tile(64, 16, 4, 1), Tile(32, 32, 4, 1)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(65, 100), (100, 65)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_any_tile(tile: Tile, queries: int, keys: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles wider than high and higher than wide: where the diagonal enters and leaves them differs."""
    monkeypatch.setattr(tuning, "tile", lambda *_: tile)
    case = Case(queries, keys, causal=causal)
    check(case, tensors(case))


@pytest.mark.parametrize("scale", [-0.25, 0.0, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_scale_of_any_sign(scale: float, causal: bool) -> None:
    case = Case(65, 40, scale=scale, causal=causal)
    check(case, tensors(case))


# Rows of padding, which are not stored, may overflow in the backward: numpy notes it, a GPU does not mind.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_maxima_of_80_and_more(sign: int, dtype: torch.dtype) -> None:
    """exp of an unshifted score overflows in float32, or is zero for all keys."""
    case = Case(40, 70, dtype=dtype)
    q, k, *rest = tensors(case)
    q, k = q.abs() / 2 + 4.5, (k.abs() / 2 + 4.5) * sign
    maxima = (q.double() @ k.double().mT / 4).amax(dim=-1) * sign
    assert 80 < maxima.min() < maxima.max() < 200
    check(case, [q, k, *rest])


def test_rows_whose_logits_grow_along_the_keys() -> None:
    """Every tile raises the row maximum: all sums are rescaled each time."""
    case = Case(20, 127)
    q, k, *rest = tensors(case)
    q, k = q.abs(), k.abs() * torch.linspace(0.1, 8, case.keys, device=DEVICE)[:, None]
    check(case, [q, k, *rest])


def test_any_strides() -> None:
    """Row-padded, broadcast, reversed in memory, at odd addresses, every second channel: read as they are or copied."""
    case = Case(33, 47, batch=2)
    q, k, v, tq, tk, tv, go = tensors(case)

    def padded(x: Tensor, by: int) -> Tensor:
        wide = torch.full((*x.shape[:3], x.shape[3] + by), torch.nan, device=DEVICE)
        wide[..., by // 2 : by // 2 + x.shape[3]] = x
        return wide[..., by // 2 : by // 2 + x.shape[3]]

    def spread(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]

    packed = torch.stack([k, v], dim=3).transpose(1, 2).contiguous().transpose(1, 2)  # a projection to keys and values
    broadcast = go[:, :, :1, :1].expand_as(go)
    check(case, [padded(q, 32), packed[..., 0, :], packed[..., 1, :], padded(tq, 3), tk, tv, go])
    check(case, [q, spread(k), padded(v, 1), tq, padded(tk, 16), tv.mT.contiguous().mT, broadcast])
    check(case, [*map(spread, (q, k, v, tq, tk, tv)), go])
    check(case, [q[:1].expand_as(q), k[:, :1].expand_as(k), v[:, :1].expand_as(v), tq, tk, tv, go])


def test_a_head_that_spans_more_than_32_bits() -> None:
    """Rows far apart in a large address range, of which only the pages in use exist."""
    stride = (1 << 22) - 16
    length = (1 << 31) // stride + 2 * tuning.INTERPRETER.block_m  # a tile starts beyond 2³¹
    memory = torch.empty(length * stride, dtype=torch.float16)
    q, k, _, tq, *_, go = tensors(Case(5, length, heads=1, heads_kv=1, dtype=torch.float16))
    apart = memory.as_strided((1, 1, length, 16), (0, 0, stride, 1))
    apart.copy_(k)
    results = []
    for keys in (k, apart):
        o, to, lse = fused.forward(q, keys, keys, tq, keys, keys, 0.25, False)
        results.append((o, to, *fused.backward(go, q, keys, keys, o, lse, 0.25, False)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_the_backward_is_the_same_in_every_run() -> None:
    case = Case(33, 20, heads=4, heads_kv=1)
    q, k, v, *_, go = tensors(case)
    o, _, lse = fused.forward(q, k, v, None, None, None, 0.25, False)
    first, second = (fused.backward(go, q, k, v, o, lse, 0.25, False) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_absent_tangents_allocate_nothing() -> None:
    made: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if "empty" in str(func) or "zeros" in str(func) or "clone" in str(func):
                made.append(tuple(out.shape))
            return out

    q, k, v, *_ = tensors(Case(20, 30))
    with Watch():
        fused.forward(q, k, v, None, None, None, 0.25, False)
    assert [shape for shape in made if len(shape) > 2] == [(1, 2, 20, 16), (1, 2, 20)]


GOOD = (2, 4, 5, 16)


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        ([GOOD] * 3, {}, None),
        ([GOOD, (2, 2, 9, 16), (2, 2, 9, 16)], {}, None),
        ([GOOD, GOOD, (2, 4, 5, 32)], {}, "D is 32 in v"),
        ([(2, 4, 5, 48)] * 3, {}, "D is 48 in q: .*16, 32, 64, 128, 256"),
        ([GOOD] * 3, {"dtype": torch.float64}, "torch.float64.*takes float16"),
        ([GOOD] * 3, {"device": "meta"}, "q is on meta"),
    ],
)
def test_refusals(shapes: list[tuple[int, ...]], options: dict[str, object], words: str | None) -> None:
    given = [torch.empty(shape, **{"device": DEVICE, **options}) for shape in shapes]
    reason = fused.refusal(*given)
    if words is None:
        assert reason is None
    else:
        with pytest.raises(ValueError, match=words):
            raise ValueError(reason)


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton's interpreter is not in use")
def test_bfloat16_is_refused_by_the_interpreter() -> None:
    given = [torch.empty(GOOD, dtype=torch.bfloat16)] * 3
    assert "bfloat16" in fused.refusal(*given)


LATE = """
import os, torch, triton
os.environ["TRITON_INTERPRET"] = "1"
from flash_jvp import fused
print(fused.refusal(*[torch.empty(1, 1, 1, 16)] * 3))
"""


def test_an_interpreter_chosen_too_late_is_refused() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(fused.__file__).parents[1])
    result = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, env=environment, check=True)
    assert "set after Triton was imported" in result.stdout


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_tangent_that_all_keys_share_costs_no_precision(dtype: torch.dtype) -> None:
    """Such a part of tk, the tangent of a shift, moves rows of tS as a whole: it reaches neither tO nor its error."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, tq, tk, tv = (torch.randn(1, 2, 127, 64, generator=generator) for _ in range(6))
    share = torch.randn(64, generator=generator)
    errors: dict[float, list[float]] = {}
    for size in (0.0, 100.0):
        tensors = [x.to(DEVICE, dtype) for x in (q, k, v, tq, tk + size * share, tv)]
        exact = plain.math(*(x.double() for x in tensors), 0.125, False)[1]
        results = [backend(*tensors, 0.125, False)[1] for backend in (fused.forward, plain.math)]
        errors[size] = [((x.double() - exact).norm() / exact.norm()).item() for x in results]
    (own, naive), (own_shared, naive_shared) = errors.values()
    assert own_shared < 1.5 * own
    assert naive_shared > 10 * naive


@pytest.mark.parametrize("value", [1e4, torch.nan])
@pytest.mark.parametrize("spoiled", [1, 4], ids=["k", "tk"])
def test_keys_that_are_not_seen_reach_nothing(spoiled: int, value: float) -> None:
    tensors = [torch.randn(1, 1, 40, 16, device=DEVICE) for _ in range(6)]
    o, to, _ = plain.math(*(x.double() for x in tensors), 0.25, True)
    tensors[spoiled][:, :, 5:] = value
    results = fused.forward(*tensors, 0.25, True)
    for x, y in zip(results[:2], (o, to), strict=True):
        assert (x[:, :, :5].double() - y[:, :, :5]).norm() < 1e-5 * y[:, :, :5].norm()
