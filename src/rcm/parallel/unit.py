"""Parts of a network (blocks, head, embedding of the time, the whole) as units of sharding and recomputation.

A unit is called as before and does three things more. Tangents travel around the hooks of FSDP, which know plain
tensors alone. Where a backward pass will come, a recomputed unit keeps its inputs and nothing else: its forward pass
runs on dual tensors without a graph, and its backward pass computes the value again, without the tangent (the dual
checkpoint). And it counts its calls.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flash_jvp  # noqa: F401  (registers the operator named in _MATMULS)
from rcm import dual

RECOMPUTE = ("none", "blocks", "matmuls")


class Counter:
    """What the parts of a step cost, in forward passes of the network over one sample ("forward-equivalents").

    A block's call counts 1, one with tangents 3, its backward pass 2 (1 where its weights are frozen), each times the
    samples of its batch and divided by the number of blocks; under `matmuls`, the recomputation of what is no product
    of matrices counts nothing.
    """

    def __init__(self) -> None:
        self.cost = 0.0
        self.parts: dict[str, list[float]] = {}

    @contextmanager
    def part(self, name: str, samples: int) -> Iterator[None]:
        """What is run inside, backward passes included, belongs to `name` and serves so many samples."""
        before = self.cost
        yield
        total = self.parts.setdefault(name, [0.0, 0.0])
        total[0] += self.cost - before
        total[1] += samples

    def equivalents(self) -> dict[str, float]:
        """Forward-equivalents per sample of each part since the last call."""
        parts, self.parts = self.parts, {}
        return {name: cost / samples for name, (cost, samples) in parts.items()}


COUNTER = Counter()  # of this process: networks share it, as a step uses several

_weights_learn = True


@contextmanager
def constant_weights() -> Iterator[None]:
    """Of passes inside, the gradient of inputs alone will be asked for, by `torch.autograd.grad`."""
    global _weights_learn
    _weights_learn = False
    try:
        yield
    finally:
        _weights_learn = True


class Unit(nn.Module):
    """What `make_unit` adds to a module."""

    recompute: str
    share: float  # of the network's forward pass, in the count
    run: Callable[..., Tensor]  # the module's own forward, perhaps compiled
    own: Callable[..., Tensor]  # ... and as it is, which is what dual tensors pass through
    tangents: Sequence[Tensor | None] | None  # of the inputs, during a call
    out_tangent: Tensor | None  # of the output, during a call

    def __call__(self, *inputs: Any) -> Any:
        primals, tangents = zip(*map(dual.unpack, inputs), strict=True)
        if any(t is not None for t in tangents):
            self.tangents = [t if t is None else t.detach() for t in tangents]
        try:
            out = super().__call__(*primals)
            return dual.pack(out, self.out_tangent)
        finally:
            self.tangents = self.out_tangent = None

    def forward(self, *inputs: Any) -> Tensor:
        tangents, graph = self.tangents, torch.is_grad_enabled()
        samples = self.share * len(inputs[0])
        COUNTER.cost += samples * (1 if tangents is None else 3)
        if graph and (self.recompute == "blocks" or (self.recompute == "matmuls" and tangents is not None)):
            parameters = _learning(self)
            out, self.out_tangent = _Recomputed.apply(self, len(inputs), *inputs, *(tangents or ()), *parameters)
            return out
        if graph and self.recompute == "matmuls":
            out = checkpoint(self.run, *inputs, use_reentrant=False, context_fn=_saved_matmuls)
        else:
            out, self.out_tangent = _call(self, inputs, tangents)
        if out.requires_grad:
            cost = _backward_cost(_learning(self)) * samples
            out.register_hook(lambda _: _count(cost))
        return out


def make_unit(module: nn.Module, *, recompute: str = "none", share: float = 0.0, compile: bool = False) -> None:
    """Turn a module whose forward takes tensors by position, and returns one, into a unit, in place."""
    kind: Any = type(module)
    module.__class__ = _unit_class(kind)
    unit: Any = module
    unit.recompute, unit.share, unit.tangents, unit.out_tangent = recompute, share, None, None
    unit.own = kind.forward.__get__(module)
    unit.run = torch.compile(unit.own) if compile else unit.own


@cache
def _unit_class(kind: Any) -> type[Unit]:
    """One class for all modules of a kind: `torch.compile` then compiles one block for all."""
    return type(f"Unit{kind.__name__}", (Unit, kind), {})


class _Recomputed(torch.autograd.Function):
    """A unit whose activations are not kept: (inputs, tangents or nothing, parameters) -> (value, tangent or None)."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, count: int, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        inputs = tensors[:count]
        tangents = tensors[count : 2 * count] if unit.tangents is not None else None
        ctx.unit, ctx.count, ctx.before = unit, count, 2 + (count if tangents is None else 2 * count)
        ctx.learning = len(tensors) + 2 > ctx.before
        ctx.save_for_backward(*(x.detach() for x in inputs))  # a view of a dual tensor would keep its tangent
        with dual.enabled():
            out, tangent = _call(unit, inputs, tangents)
        if tangent is not None:
            ctx.mark_non_differentiable(tangent)
        return out, tangent

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        unit, needed = ctx.unit, ctx.needs_input_grad
        inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed[2:], strict=False)]
        parameters = [p for p in unit.parameters() if p.requires_grad] if ctx.learning else []
        with torch.enable_grad():
            out = unit.run(*inputs)
        _count((1 + _backward_cost(parameters)) * unit.share * len(inputs[0]))
        wanted = [x for x in (*inputs, *parameters) if x.requires_grad]
        found = dict(zip(map(id, wanted), torch.autograd.grad(out, wanted, gradient, allow_unused=True), strict=True))
        nothing = [None] * (ctx.before - 2 - ctx.count)
        return None, None, *(found.get(id(x)) for x in inputs), *nothing, *(found[id(p)] for p in parameters)


def _call(unit: Unit, inputs: Sequence[Any], tangents: Sequence[Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
    if tangents is None:
        return unit.run(*inputs), None
    out, tangent = dual.unpack(unit.own(*map(dual.pack, inputs, tangents)))
    return out, torch.zeros_like(out) if tangent is None else tangent.detach()


def _learning(unit: Unit) -> list[nn.Parameter]:
    """The parameters that get a gradient."""
    return [p for p in unit.parameters() if p.requires_grad] if _weights_learn else []


def _backward_cost(parameters: Sequence[nn.Parameter]) -> int:
    """In forward passes: products give a gradient each to inputs and weights."""
    return 2 if parameters else 1


def _count(cost: float) -> None:
    COUNTER.cost += cost


_MATMULS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.flash_jvp.attention.default,
}


def _saved_matmuls() -> Any:
    def policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _MATMULS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
