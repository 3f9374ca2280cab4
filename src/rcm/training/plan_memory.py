"""What a rank of a distillation holds in memory, by formulas: nothing is run, networks are built on the meta device.

What is counted are live tensors on the CUDA path, where norms and attention keep their inputs and a number a row. The
contexts of CUDA and NCCL and the allocator's fragments come on top. `benchmarks/plan_peak.py` compares the formulas
with the tensors of a step.

Units: bytes. One *tensor of the tokens* is batch x tokens of a rank x width, in the data type of the passes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rcm.networks import build

FLOAT = 4  # bytes of master weights, reductions, moments and averages

CATEGORIES = (
    "student",  # master weights, shards
    "fake score",
    "teacher",  # in the data type of the passes
    "EMA",
    "moments",  # both of AdamW, of student and fake score; the first is kept though beta1 is 0
    "gradients",  # shards
    "gathered",  # weights of the units at work, whole
    "communication",  # all-gather, reduce-scatter and all-to-all under way
    "kept",  # activations kept for the backward pass
    "at work",  # activations of the block at work
    "loss",  # latents, noises, text, rotary angles; float64 outside of the networks
)


@dataclass(frozen=True)
class Kept:
    """How many tensors of the tokens a block keeps for its backward pass, MLP apart: its two hidden ones count more.

    `saved`: besides its input. `tangents`: more, while the dual level is open, where tangent and graph come from one
    pass and nothing is recomputed (a saved tensor keeps its tangent). `left`: of these, what is kept after that.
    """

    saved: int
    tangents: int
    left: int


KEPT = {"wan": Kept(saved=20, tangents=39, left=9), "cosmos": Kept(saved=22, tangents=42, left=9)}
PRODUCTS = (
    9  # of these, outputs of products and attention, the MLP's first apart: q, k, v, o, attention; q, o, attention; MLP
)


class Network:
    """Sizes of a network: parameters by unit of sharding, and what decides on activations."""

    def __init__(self, config: Mapping[str, Any]):
        with torch.device("meta"):
            network: Any = build(config)
        self.kind, self.width, self.mlp_width = config["kind"], config["width"], config["mlp_width"]
        self.heads, self.patch = config["heads"], config["patch"]
        self.layers, self.text_width = len(network.blocks), config["text_width"]
        self.patch_elements = math.prod(self.patch) * network.out_channels
        parts = {"block": network.blocks[0], "head": network.head}
        precise = {name: getattr(network, name) for name in network.precise}
        self.shapes = {name: [p.shape for p in part.parameters()] for name, part in (parts | precise).items()}
        units = [*network.blocks, network.head, *precise.values()]
        inside = {id(p) for unit in units for p in unit.parameters()}
        self.shapes["root"] = [p.shape for p in network.parameters() if id(p) not in inside]
        self.precise = set(precise)

    def times(self, unit: str) -> int:
        """How many units of that name there are."""
        return self.layers if unit == "block" else 1

    def numel(self, unit: str) -> int:
        return sum(map(math.prod, self.shapes[unit]))

    @cached_property
    def total(self) -> int:
        """Number of parameters."""
        return sum(self.numel(unit) * self.times(unit) for unit in self.shapes)

    def shard(self, unit: str, ranks: int) -> int:
        """Elements of a unit on the first of `ranks`."""
        return shard(self.shapes[unit], ranks)

    def bytes(self, ranks: int, rounded: int) -> int:
        """Shards of all parameters; `rounded`: bytes of those that are not `precise`."""
        sizes = {unit: FLOAT if unit in self.precise else rounded for unit in self.shapes}
        return sum(self.shard(unit, ranks) * self.times(unit) * sizes[unit] for unit in self.shapes)


def shard(shapes: Sequence[Sequence[int]], ranks: int) -> int:
    """Elements on the first of `ranks`: axis 0 of every parameter is cut, and the last ones may have fewer or none."""
    return sum(-(-shape[0] // ranks) * math.prod(shape[1:]) if shape else 1 for shape in shapes)


@dataclass(frozen=True)
class Work:
    """What the passes of a rank are over, and how: a micro-batch of `samples` on one of `context` ranks."""

    network: Network
    latents: tuple[int, int, int, int]  # C, T, H, W
    words: int  # tokens of a text
    samples: int
    accumulate: int  # micro-batches of an update
    sharing: int  # ranks that share the parameters: shard x context
    context: int
    recompute: str
    shared_tangents: bool
    itemsize: int  # bytes of a number in the passes: 2 for bfloat16
    offload_teacher: bool

    @property
    def sharded(self) -> bool:
        """False where one process runs without FSDP: its passes use the weights themselves."""
        return self.sharing > 1 or self.itemsize < FLOAT

    @property
    def tokens(self) -> int:
        """Of a sample, all ranks together."""
        return math.prod(n // p for n, p in zip(self.latents[1:], self.network.patch, strict=True))

    @property
    def here(self) -> int:
        """Tokens of a sample on this rank, padding included."""
        return -(-self.tokens // self.context)

    @property
    def tensor(self) -> int:
        """Bytes of one tensor of the tokens."""
        return self.samples * self.here * self.network.width * self.itemsize

    @property
    def ratio(self) -> float:
        """Width of the MLP, in widths."""
        return self.network.mlp_width / self.network.width

    @property
    def wide(self) -> float:
        """A tensor of the tokens in float32, in tensors of the tokens: modulation computes there."""
        return FLOAT / self.itemsize


# --- Activations, in tensors of the tokens -------------------------------------------------------------------------


def at_work(work: Work, *, tangents: bool) -> tuple[float, float]:
    """The most that the forward pass of a block holds besides its input, without a graph; and of what is exchanged.

    The MLP (its input, the residual, two hidden tensors), the rotation of queries and keys, or the exchange of the
    context group, where the message of queries, keys and values is there four times, thrice as communication.
    """
    m = work.ratio
    alone = max(5 + 4 * m, 18) if tangents else max(2 + 2 * m, 8)
    exchange = (12, 18) if tangents else (5, 9)
    return exchange if work.context > 1 and sum(exchange) > alone else (alone, 0)


def kept_of_block(work: Work, *, tangents: bool) -> float:
    """What a block keeps for its backward pass, its input included; `tangents`: from a pass with tangents."""
    kept = KEPT[work.network.kind]
    whole = 1 + kept.saved + 2 * work.ratio + _text_and_rows(work)
    if work.recompute == "none":
        return whole + kept.left * tangents
    if work.recompute == "matmuls" and not tangents:
        return 1 + PRODUCTS + work.ratio + _text_and_rows(work)
    return 1.0


def backward_of_block(work: Work, *, tangents: bool) -> float:
    """The most that the backward pass of a block holds besides what all blocks keep.

    At its start: all that a block saves, computed again, and gradients of the residual and of its modulation, two or
    three of them in float32; or within the MLP, the gradient of its hidden tensor.
    """
    m, saved = work.ratio, KEPT[work.network.kind].saved + _text_and_rows(work)
    gradients = 2 * work.wide + (work.wide if work.itemsize < FLOAT else 0)
    zeros = 1 if tangents else 0  # of the tangent, which gets no gradient
    if work.recompute == "none":
        return 3 + zeros + max(gradients, m)
    if work.recompute == "matmuls" and not tangents:
        return max(12 + 2 * m, 14 + m)
    return 3 + zeros + saved + max(2 * m + gradients, 3 * m)


def _text_and_rows(work: Work) -> float:
    """Keys and values of the text, and the log-sum-exp of both attentions."""
    rows = 2 * work.network.heads * FLOAT / (work.network.width * work.itemsize)
    return 3 * work.words / work.here + rows


HEAD = 3  # what the head keeps: its input, normalised, modulated


# --- The phases of a step ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """What of a step the memory depends on."""

    consistency: bool  # sCM, MeanFlow or dCM
    derivative: str  # exact, semi_continuous, discrete; none for dCM
    dmd: bool
    gan: bool
    branch: Sequence[Sequence[int]]  # shapes of the discriminator's parameters; its own pass, short, is not counted
    guided: bool
    max_rollout: int


Bytes = dict[str, float]


def phases(work: Work, objective: Objective) -> dict[str, Bytes]:
    """Bytes of a rank in each phase of a student's and of a critic's step, by category."""
    held = resident(work, objective)
    found = {}
    for name, more in _each(work, objective):
        found[name] = {key: held.get(key, 0.0) + more.get(key, 0.0) for key in CATEGORIES}
    return found


def peak(phases: Mapping[str, Bytes]) -> tuple[str, float]:
    """Name and bytes of the largest phase."""
    name = max(phases, key=lambda name: sum(phases[name].values()))
    return name, sum(phases[name].values())


def resident(work: Work, objective: Objective) -> Bytes:
    """What is there all the time, and does not depend on tokens."""
    network, ranks = work.network, work.sharing
    master = network.bytes(ranks, FLOAT)
    fake = master + shard(objective.branch, ranks) * FLOAT if objective.dmd else 0
    channels, *size = work.latents
    latents = work.samples * channels * math.prod(size) * FLOAT
    text = _text(work) * (1 + 1 / work.samples)
    return {
        "student": master,
        "fake score": fake,
        "teacher": 0 if work.offload_teacher and work.sharded else network.bytes(ranks, work.itemsize),
        "EMA": master,
        "moments": 2 * (master + fake),
        "loss": latents + text,  # samples, their text, the empty text
    }


def _each(work: Work, objective: Objective) -> Iterator[tuple[str, Bytes]]:
    layers, more, noises = work.network.layers, work.accumulate > 1, objective.max_rollout
    embedded = work.tokens / work.here - 1  # the first block's input is a part of all tokens
    kept = layers * kept_of_block(work, tangents=False) + embedded
    backward = backward_of_block(work, tangents=False)
    teacher = 2 if objective.guided else 1
    if objective.consistency:
        yield "student: teacher", _forward(work, teacher * embedded, times=teacher, latents=(6, 1), full=more)
        yield from _consistency(work, objective, kept, embedded)
    if objective.dmd:
        full, done, both = objective.consistency or more, kept + HEAD, 2 if objective.gan else 1
        yield "DMD: rollout", _forward(work, kept - 1, latents=(3, 1 + noises), full=full)
        yield (
            "DMD: teacher",
            _forward(work, done + teacher * embedded, times=teacher, latents=(3 + 3 * teacher, noises + 3), full=full),
        )
        if objective.gan:
            yield from _backward(work, "GAN", done + kept, backward, latents=(4, noises + 1), full=full, weights=False)
        yield from _backward(work, "DMD", kept, backward, latents=(0, 0), full=full)
        yield "critic: rollout", _forward(work, embedded, latents=(3, 1 + noises), full=more)
        yield (
            "critic: forward",
            _forward(work, both * (kept - 1), times=both, latents=(3 + 3 * both, noises + 1 + both), full=more),
        )
        yield from _backward(
            work, "critic", both * kept, both * backward, latents=(2 * both - 1, noises + 1), full=more
        )
    yield "optimiser", {"gradients": _gradients(work)}


def _consistency(work: Work, objective: Objective, kept: float, embedded: float) -> Iterator[tuple[str, Bytes]]:
    layers, more = work.network.layers, work.accumulate > 1
    tangents = objective.derivative in ("exact", "semi_continuous")
    shared = tangents and work.shared_tangents
    graph = layers * kept_of_block(work, tangents=shared) + embedded
    open_ = graph
    if shared and work.recompute == "none":  # tangents of what is saved live as long as the dual level
        rule = KEPT[work.network.kind]
        open_ += layers * (rule.tangents - rule.left + 2 * work.ratio)
    before = open_ - 1 if shared or not tangents else embedded
    yield "student: forward", _forward(work, before, tangents=tangents, latents=(7, 3), full=more)
    if not work.shared_tangents:
        yield "student: second forward", _forward(work, kept - 1, latents=(5, 2), full=more)
    last = backward_of_block(work, tangents=shared)
    yield from _backward(work, "student", graph, last, latents=(0, 0), full=more)


def _forward(
    work: Work, kept: float, *, latents: tuple[int, int], full: bool, times: int = 1, tangents: bool = False
) -> Bytes:
    """A forward pass over `times` the samples of a micro-batch, where so many tensors are `kept` besides its input.

    `full`: the gradients of earlier passes are there.
    """
    busy, exchanged = (times * count * work.tensor for count in at_work(work, tangents=tangents))
    return {
        "gradients": _gradients(work) if full else 0,
        "gathered": _unit(work, "block") + _unit(work, "root"),
        "communication": _unit(work, "block") * (work.sharing > 1) + exchanged,
        "kept": kept * work.tensor,
        "at work": times * work.tensor + busy,
        "loss": _latents(work, latents) + times * _text(work) * (times > 1) + _rotary(work, angles=True),
    }


def _backward(
    work: Work, name: str, kept: float, last: float, *, latents: tuple[int, int], full: bool, weights: bool = True
) -> Iterator[tuple[str, Bytes]]:
    """The backward pass at its start, where all is kept, and at its end, where all gradients are there."""
    block, layers = work.network.numel("block"), work.network.layers
    shard = work.network.shard("block", work.sharing) * FLOAT
    common = {
        "gathered": _unit(work, "block") + _unit(work, "root"),
        "communication": (_unit(work, "block") + block * FLOAT * weights) if work.sharing > 1 else 0,
        # at the end of a block its own gradients are there, whole, and little else
        "at work": max(last * work.tensor, 10 * work.tensor + _unit(work, "block") * weights),
        "loss": _latents(work, latents) + _rotary(work, angles=False),
    }
    early = _gradients(work) if full else shard * weights
    yield f"{name}: backward", common | {"kept": kept * work.tensor, "gradients": early}
    if weights and not full:
        end = {"kept": kept / layers * work.tensor, "gradients": _gradients(work)}
        yield f"{name}: end of backward", common | end


def _gradients(work: Work) -> int:
    return work.network.bytes(work.sharing, FLOAT)


def _unit(work: Work, unit: str) -> int:
    """A unit, gathered."""
    return work.network.numel(unit) * work.itemsize if work.sharded else 0


def _text(work: Work) -> int:
    """The text of the samples, in float32."""
    return work.samples * work.words * work.network.text_width * FLOAT


def _latents(work: Work, count: tuple[int, int]) -> int:
    """So many latents in float64 and in float32."""
    return work.samples * math.prod(work.latents) * (8 * count[0] + FLOAT * count[1])


def _rotary(work: Work, *, angles: bool) -> int:
    """Cosines and sines of all tokens, with float64 angles while a forward pass runs; and the text as it enters."""
    each = work.tokens * work.network.width // work.network.heads
    text = work.samples * work.words * work.network.text_width * work.itemsize
    return each * (2 * work.itemsize + 8 * angles) + text
