"""The registered operators: transforms, compilation and export pass through them, and misuse is refused by name."""

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_jvp import attention, attention_jvp, choose, library, operators, taken

from .test_attention import attend, inputs, reference, relative

KERNELS = Path(__file__).parents[2] / "kernels"
SIZES = {"heads": 2, "group": 2}


@pytest.fixture
def tensors() -> list[Tensor]:
    return inputs(9, 12, **SIZES)


@pytest.fixture
def gradient() -> Tensor:
    return torch.randn(2, 4, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def same(result: object, expected: object) -> bool:
    pairs = zip(torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(expected), strict=True)
    return all(relative(x, y) < 1e-12 for x, y in pairs)


def gradients(fn: Callable[..., Tensor], tensors: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    primals = [x.clone().requires_grad_() for x in tensors[:3]]
    return torch.autograd.grad(fn(*primals), primals, gradient)


# Transforms of torch.func


def test_func_jvp_takes_the_streaming_operator(tensors: list[Tensor]) -> None:
    """And not a composition that holds the score matrix: the operator is called, and nothing else multiplies."""
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        result = torch.func.jvp(attention, tuple(tensors[:3]), tuple(tensors[3:]))
    assert same(result, reference(tensors))
    assert "flash_jvp.attention_jvp.default" in called
    assert called.count("flash_jvp.attention.default") == 0


def test_func_jvp_with_constant_keys(tensors: list[Tensor]) -> None:
    q, k, v, tq, tk, tv = tensors
    result = torch.func.jvp(lambda q: attention(q, k, v), (q,), (tq,))
    assert same(result, reference([q, k, v, tq, tk * 0, tv * 0]))


def test_the_output_of_func_jvp_has_its_gradient(tensors: list[Tensor], gradient: Tensor) -> None:
    primals = tuple(x.clone().requires_grad_() for x in tensors[:3])
    o, to = torch.func.jvp(attention, primals, tuple(tensors[3:]))
    result = torch.autograd.grad(o, primals, gradient, retain_graph=True)
    assert same(result, gradients(attend, tensors, gradient))
    with pytest.raises(RuntimeError, match="a gradient has reached the tangent"):
        torch.autograd.grad(to, primals, gradient)


@pytest.mark.parametrize("output", [0, 1])
def test_func_grad_of_a_jvp(tensors: list[Tensor], gradient: Tensor, output: int) -> None:
    """Under torch.func.grad elementary operations stand in, which have a gradient of the tangent as well."""

    def loss(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *primals: (torch.func.jvp(fn, primals, tuple(tensors[3:]))[output] * gradient).sum()

    results = [torch.func.grad(loss(fn), argnums=(0, 1, 2))(*tensors[:3]) for fn in (attention, attend)]
    assert same(*results)


def test_explicit_jvp_under_func_grad(tensors: list[Tensor]) -> None:
    def loss(q: Tensor) -> Tensor:
        return attention_jvp(q, *tensors[1:])[1].square().sum()

    def exact(q: Tensor) -> Tensor:
        return reference([q, *tensors[1:]])[1].square().sum()

    assert same(torch.func.grad(loss)(tensors[0]), torch.func.grad(exact)(tensors[0]))


@pytest.mark.filterwarnings("ignore")  # PyTorch loops over the batch, and says so
def test_vmap(tensors: list[Tensor]) -> None:
    batch = [torch.stack([x, 2 * x, x.flip(2)]) for x in tensors]
    assert same(torch.func.vmap(attention)(*batch[:3]), torch.stack(list(map(attend, *batch[:3]))))
    result = torch.func.vmap(lambda *x: torch.func.jvp(attention, x[:3], x[3:]))(*batch)
    assert same(result, [torch.stack(x) for x in zip(*map(reference, zip(*batch, strict=True)), strict=True)])


def test_linearize(tensors: list[Tensor]) -> None:
    o, tangent = torch.func.linearize(attention, *tensors[:3])
    assert same((o, tangent(*tensors[3:])), reference(tensors))


@pytest.mark.parametrize("compiling", [False, True])
def test_a_second_forward_mode_is_not_dropped(tensors: list[Tensor], compiling: bool) -> None:
    q, k, v, tq, *_ = tensors

    def twice(fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        once = lambda q: torch.func.jvp(lambda q: fn(q, k, v), (q,), (tq,))[1]  # noqa: E731
        return lambda q: torch.func.jvp(once, (q,), (tq.flip(2),))[1]

    torch._dynamo.reset()
    run = torch.compile(twice(attention), backend="eager", fullgraph=True) if compiling else twice(attention)
    assert same(run(q), twice(attend)(q))


def test_dual_inputs_of_the_explicit_form_keep_their_tangents(tensors: list[Tensor]) -> None:
    q, k, v, tq, *_ = tensors
    for argument in (0, 3):

        def along(fn: Callable[..., Tensor], argument: int = argument) -> tuple[Tensor, Tensor]:
            def move(x: Tensor) -> Tensor:
                return fn(x, k, v, tq) if argument == 0 else fn(q, k, v, x)

            return torch.func.jvp(move, (tensors[argument],), (tq.flip(2),))

        def exact(q: Tensor, k: Tensor, v: Tensor, tq: Tensor) -> Tensor:
            return torch.func.jvp(lambda q: attend(q, k, v), (q,), (tq,))[1]

        assert same(along(lambda *x: attention_jvp(*x)[1]), along(exact))


def test_the_gradient_of_a_dual_is_refused_or_right(tensors: list[Tensor], gradient: Tensor) -> None:
    q, k, v, tq, *_ = tensors
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="gradient of attention is not differentiated"):
        dual = forward_ad.make_dual(q.clone().requires_grad_(), tq)
        torch.autograd.grad(attention(dual, k, v).square().sum(), dual)
    with pytest.raises(RuntimeError, match="gradient of attention is not differentiated"):
        primal = q.clone().requires_grad_()
        (first,) = torch.autograd.grad(attention(primal, k, v), primal, gradient, create_graph=True)
        first.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "torch", "math"])
def test_results_may_be_written_into(tensors: list[Tensor], backend: str) -> None:
    q = tensors[0].clone().requires_grad_()
    o = attention(q, *tensors[1:3], backend=backend)
    assert same(o.mul_(2), attend(*tensors[:3]) * 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # it is needed for the gradient
        o.sum().backward()
    o, to = attention_jvp(*tensors, backend=backend)
    assert same(o.add_(to), sum(reference(tensors)))


def test_recomputation(tensors: list[Tensor], gradient: Tensor) -> None:
    def recomputed(*primals: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(attention, *primals, use_reentrant=False)

    assert same(gradients(recomputed, tensors, gradient), gradients(attend, tensors, gradient))


# Compilation and export


@pytest.fixture(params=["eager", "aot_eager"])
def compiled(request: pytest.FixtureRequest) -> Callable[[Callable[..., object]], Callable[..., object]]:
    torch._dynamo.reset()
    return lambda fn: torch.compile(fn, fullgraph=True, backend=request.param)


def test_compiled_jvp(compiled: Callable, tensors: list[Tensor]) -> None:
    assert same(compiled(attention_jvp)(*tensors), reference(tensors))
    by_func = compiled(lambda *x: torch.func.jvp(attention, x[:3], x[3:]))
    assert same(by_func(*tensors), reference(tensors))


def test_compiled_gradient(compiled: Callable, tensors: list[Tensor], gradient: Tensor) -> None:
    assert same(gradients(compiled(attention), tensors, gradient), gradients(attend, tensors, gradient))


@pytest.mark.parametrize("detached", ["inside", "outside"])
def test_compiled_jvp_with_gradient(compiled: Callable, tensors: list[Tensor], gradient: Tensor, detached: str) -> None:
    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        o, to = torch.func.jvp(attention, x[:3], x[3:])
        return o, to.detach() if detached == "inside" else to

    primals = [x.clone().requires_grad_() for x in tensors[:3]]
    o, to = compiled(both)(*primals, *tensors[3:])
    assert same((o, to), reference(tensors))
    result = torch.autograd.grad(o, primals, gradient, retain_graph=True)
    assert same(result, gradients(attend, tensors, gradient))
    if detached == "outside":
        with pytest.raises(RuntimeError, match="a gradient has reached the tangent"):
            torch.autograd.grad((o + to).sum(), primals)


def test_compiled_tangent_alone_refuses_its_gradient(compiled: Callable, tensors: list[Tensor]) -> None:
    """Where O is no output of the graph, it has no gradient of its own that would bring the backward pass about."""
    primals = [x.clone().requires_grad_() for x in tensors[:3]]
    to = compiled(lambda *x: torch.func.jvp(attention, x[:3], x[3:])[1])(*primals, *tensors[3:])
    assert same(to, reference(tensors)[1])
    with pytest.raises(RuntimeError, match="a gradient has reached the tangent"):
        to.sum().backward()


def test_dual_tensors_from_outside_of_a_compiled_function(tensors: list[Tensor]) -> None:
    """They would lose their tangents: refused in a full graph, and done in eager mode otherwise."""

    def run(fn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), forward_ad.dual_level():
            duals = (forward_ad.make_dual(x, tx) for x, tx in zip(tensors[:3], tensors[3:], strict=True))
            return tuple(forward_ad.unpack_dual(fn(*duals)))

    torch._dynamo.reset()
    assert same(run(torch.compile(attention, backend="eager")), reference(tensors))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="dual tensors from outside of a compiled function"):
        run(torch.compile(attention, backend="eager", fullgraph=True))


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_graph_keeps_the_operators(tensors: list[Tensor], decomposed: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, *x: Tensor) -> tuple[Tensor, Tensor]:
            return attention_jvp(*x)[1], attention(*x[:3])

    program = torch.export.export(Model(), tuple(tensors))
    if decomposed:
        program = program.run_decompositions()
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in targets if "getitem" not in name] == [
        "flash_jvp.attention_jvp.default",
        "flash_jvp.attention.default",
    ]
    assert same(program.module()(*tensors), (reference(tensors)[1], attend(*tensors[:3])))


@pytest.mark.parametrize("backend", ["auto", "math", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operators_are_registered_as_they_behave(tensors: list[Tensor], dtype: torch.dtype, backend: str) -> None:
    """PyTorch's own check: schema, fake implementation (shapes, strides, dtypes), autograd, dynamic shapes."""
    tensors = [x.to(dtype) for x in tensors]
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    ops = torch.ops.flash_jvp
    torch.library.opcheck(ops.attention.default, (q, k, v, 0.25, False, backend))
    for tangents in (tensors[3:], [tensors[3], None, None], [None] * 3):
        torch.library.opcheck(ops.attention_jvp.default, (*tensors[:3], *tangents, 0.25, True, backend))
    o, lse = ops.attention(*tensors[:3], 0.25, False, backend)
    rest = (torch.ones_like(o), None, *tensors[:3], o, lse, 0.25, False, backend)
    torch.library.opcheck(ops.attention_backward.default, rest)


# What is chosen


def test_choice_is_told(tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors[:3]
    fastest = {"attention": "flash-cpu", "attention_jvp": "torch", "backward": "flash-cpu"}
    assert choose(q, k, v) == fastest
    assert choose(q, k, v, causal=True)["backward"] == "torch"  # 9 queries, 12 keys
    assert choose(q, k, v[..., :8]) == {"attention": "torch", "attention_jvp": "torch", "backward": "torch"}
    assert set(choose(q, k, v, backend="math").values()) == {"math"}
    monkeypatch.setattr(operators, "_taken", defaultdict(set))
    gradients(attention, tensors, torch.ones(2, 4, 9, 16, dtype=torch.float64))
    assert taken() == {"attention": ["flash-cpu"], "backward": ["flash-cpu"]}
    attention_jvp(*tensors, backend="math")
    attention_jvp(*tensors)
    assert taken()["attention_jvp"] == ["math", "torch"]


@pytest.mark.parametrize("queries", [9, 1])
def test_gradients_of_any_strides(queries: int) -> None:
    """PyTorch's kernel for CPUs gives NaN where the last stride is not 1."""
    tensors = inputs(queries, 12)
    wide = [torch.full((*x.shape, 2), torch.nan, dtype=x.dtype) for x in tensors[:3]]
    for x, y in zip(wide, tensors, strict=False):
        x[..., 0] = y
    gradient = torch.randn(2, 3, queries, 32, dtype=torch.float64)[..., ::2]
    primals = [x[..., 0].detach().requires_grad_() for x in wide]
    assert all(x.stride(-1) == 2 for x in (*primals, gradient))
    result = torch.autograd.grad(attention(*primals), primals, gradient)
    assert same(result, gradients(attend, tensors, gradient))


@pytest.mark.parametrize("backend", ["auto", "math", "torch"])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(7, 1, False), (7, 1, True), (1, 7, True)])
def test_the_gradient_of_a_single_key_is_exact(queries: int, keys: int, causal: bool, backend: str) -> None:
    """In float32 at logits of some hundreds, where rounding would be multiplied by q and k."""
    q, k, v, *_ = (x.float() for x in inputs(queries, keys, **SIZES))
    primals = [x.requires_grad_() for x in (q * 30, k * 30, v)]
    o = attention(*primals, causal=causal, backend=backend)
    gradient = torch.randn_like(o)
    dq, dk, dv = torch.autograd.grad(o, primals, gradient)
    assert not dq.any()
    assert not dk.any()
    assert not dv[:, :, 1:].any()
    expected = gradient.double().unflatten(1, (2, 2)).sum(dim=(2, 3))
    assert relative(dv[:, :, 0].double(), expected) < 1e-7


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_arguments_of_cuda_kernels_fit_their_schemas(name: str) -> None:
    """On a machine without CUDA: PyTorch checks the arguments against fake CUDA tensors and gives the shapes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v, o = (torch.empty(2, 4, s, 64, dtype=torch.bfloat16, device="cuda") for s in (33, 20, 20, 33))
        lse = torch.empty(2, 4, 33, dtype=torch.float32, device="cuda")
        run = {"flash": library._flash, "cudnn": library._cudnn}[name]
        assert [x.shape for x in run(o, q, k, v, o, lse, 0.1, False)] == [q.shape, k.shape, v.shape]


def test_no_library_backward_for_a_causal_mask_over_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 2.1 and later aligns such a mask with the last key."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for device in ("cpu", "cuda"):
        with FakeTensorMode():
            q, k, v = (torch.empty(1, 1, s, 64, dtype=torch.bfloat16, device=device) for s in (3, 5, 5))
            assert library.backwards(q, k, v, causal=False)
            assert not library.backwards(q, k, v, causal=True)
            assert library.backwards(k, k, v, causal=True)


def test_old_cards_have_no_flash_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        q = torch.empty(1, 1, 8, 64, dtype=torch.float16, device="cuda")
        assert library.backwards(q, q, q, causal=False) == {}


# Autocast and misuse


def test_autocast_is_that_of_scaled_dot_product_attention(tensors: list[Tensor]) -> None:
    mixed = [x.float() if i % 3 < 2 else x.bfloat16() for i, x in enumerate(tensors)]
    expected = reference([x.bfloat16().double() for x in tensors])
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(attention_jvp(*mixed), expected, strict=True):
            assert x.dtype == torch.bfloat16
            assert relative(x.double(), y) < 0.02
        assert attention(*mixed[:3]).dtype == torch.bfloat16
        assert attention(*tensors[:3]).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t[0], t[1][:, :, :5], *t[2:]], r"q, k, v are \(2, 4, 9, 16\), \(2, 2, 5, 16\), .* expected"),
        (lambda t: [t[0][..., :4], *t[1:]], "expected"),
        (lambda t: [t[0][0], *t[1:]], "expected"),
        (lambda t: [t[0][:, :3], *t[1:]], "the 3 query heads must be a multiple of the 2 key heads"),
        (lambda t: [t[0][:, :, :0], *t[1:]], "every size must be at least 1"),
        (lambda t: [*t[:5], t[5][:, :, :5]], r"the tangent of v is \(2, 2, 5, 16\), its primal \(2, 2, 12, 16\)"),
        (lambda t: [*t[:4], t[4].float(), t[5]], "the tangent of k is torch.float32 on cpu, q is torch.float64 on cpu"),
        (lambda t: [t[0], t[1].float(), *t[2:]], "k is torch.float32 on cpu, q is torch.float64"),
        (lambda t: [*t[:2], t[2].to("meta"), *t[3:]], "v is torch.float64 on meta, q is torch.float64 on cpu"),
        (lambda t: [x.long() for x in t], "q is torch.int64; supported are"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable, message: str, tensors: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        attention_jvp(*change(tensors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": torch.tensor(0.3)}, "scale is Tensor, must be a number"),
        ({"scale": "0.3"}, "scale is str"),
        ({"scale": True}, "scale is bool"),
        ({"causal": 1}, "causal is int, must be True or False"),
    ],
)
def test_options_of_another_type_are_named(options: dict, message: str, tensors: list[Tensor]) -> None:
    with pytest.raises(TypeError, match=message):
        attention(*tensors[:3], **options)


def test_unknown_backend_is_named(tensors: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="backend is 'cuda', must be one of auto, math, torch, triton"):
        attention(*tensors[:3], backend="cuda")


# The package by itself

BARE = """
import importlib.machinery, sys
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {refused!r} else super().find_spec(name, path, target)
sys.meta_path = [Without if x is importlib.machinery.PathFinder else x for x in sys.meta_path]
import torch, flash_jvp
q = torch.randn(1, 2, 5, 16)
assert not {{"rcm", "triton", "flash_attn"}} & set(sys.modules), sorted(sys.modules)
print(torch.func.jvp(flash_jvp.attention, (q, q, q), (q, q, q))[1].shape)
try:
    flash_jvp.attention(q, q, q, backend="triton")
except ValueError as error:
    print(error)
"""


def test_the_package_works_without_triton_flash_attn_or_this_library() -> None:
    code = BARE.format(refused=["rcm", "triton", "flash_attn"])
    environment = {"PYTHONPATH": str(KERNELS), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    shape, refusal = result.stdout.strip().splitlines()
    assert shape == "torch.Size([1, 2, 5, 16])"
    assert re.search("backend 'triton' cannot take these tensors: .*Triton", refusal)


def test_the_example_of_the_readme_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Tensor] = {}
    exec(example, names)
    q, k, v, tq = (names[name].double() for name in ("q", "k", "v", "tq"))
    _, expected = torch.func.jvp(lambda q: attend(q, k, v), (q,), (tq,))
    assert relative(names["to"].double(), expected) < 1e-5
