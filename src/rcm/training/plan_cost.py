"""What a step of a distillation costs: products, bytes between ranks, seconds; by formulas.

A pass is counted in products of matrices (two operations each), attention apart:

    plain 1 · with tangents 2, attention 3 · computed again 1 · backward 2, attention 2.5

(the tangent of a product with constant weights is one more product, that of attention two more; the backward pass of
attention computes the scores again). `Pass.equivalents` is the rougher count of `rcm.parallel.Counter`: 1, 3, 1, 2.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from rcm.parallel import Layout

from .plan_memory import FLOAT, Objective, Work
from .schedule import Schedule
from .settings import Settings

COST = {"plain": (1, 1), "tangents": (2, 3), "again": (1, 1), "backward": (2, 2.5), "through": (1, 2.5)}
EQUIVALENTS = {"plain": 1, "tangents": 3, "again": 1, "backward": 2, "through": 1}


@dataclass(frozen=True)
class Cluster:
    """GPUs and what is assumed of them. H100 SXM: 989 TFLOP/s in bfloat16, NVLink 450 GB/s a direction.

    Utilisation is that of the products, attention included. A rank's traffic runs at `node` bytes a second where its
    group is inside a node, else at `network` (400 Gbit/s a GPU). Gathering and reduction of weights overlap with the
    products of the same pass; the exchange of a context group overlaps with nothing.
    """

    gpus: int
    per_node: int = 8
    memory: float = 80 * 2**30
    peak: float = 989e12
    utilisation: float = 0.4
    node: float = 450e9
    network: float = 50e9
    reserve: float = 0.07  # of the memory: contexts of CUDA and NCCL, fragmentation

    @property
    def usable(self) -> float:
        return self.memory * (1 - self.reserve)

    def bandwidth(self, ranks: int, stride: int = 1) -> float:
        """Of a group of ranks that are `stride` apart."""
        return self.node if ranks * stride <= self.per_node and self.per_node % (ranks * stride) == 0 else self.network


@dataclass(frozen=True)
class Pass:
    """One call of a network, or its backward pass, over `samples` times the samples of a micro-batch."""

    kind: str  # a key of COST
    samples: float
    gathers: int = 1  # how often the weights of all units are gathered, a call
    reduces: bool = False  # gradients of the weights are summed over the ranks
    calls: float = 1.0  # on average; a rollout's vary

    @property
    def equivalents(self) -> float:
        return EQUIVALENTS[self.kind] * self.samples * self.calls


def consistency_passes(work: Work, objective: Objective, skip: int) -> Iterator[Pass]:
    """Those of the consistency loss, for a micro-batch."""
    guided = 2 if objective.guided else 1
    exact = objective.derivative in ("exact", "semi_continuous")
    yield Pass("plain", guided, calls=1 if objective.derivative != "none" else skip)
    if objective.derivative != "exact":  # the finite difference, or dCM's target
        yield Pass("plain", 1)
    yield Pass("tangents" if exact else "plain", 1)
    if objective.derivative != "none" and not work.shared_tangents:
        yield Pass("plain", 1)
    yield from _gradient(work, 1, tangents=exact and work.shared_tangents)


def distribution_passes(work: Work, objective: Objective, rollout: float) -> Iterator[Pass]:
    """Those of DMD, with the adversarial part if there is one."""
    yield Pass("plain", 1, calls=rollout)
    yield Pass("plain", 2 if objective.guided else 1)
    yield Pass("plain", 1)
    if objective.gan:
        yield Pass("plain", 1)
        if work.recompute == "blocks":
            yield Pass("again", 1, gathers=0)
        yield Pass("through", 1)
    yield from _gradient(work, 1, tangents=False)


def critic_passes(work: Work, objective: Objective, rollout: float) -> Iterator[Pass]:
    """Those of the fake score's step."""
    samples = 2 if objective.gan else 1
    yield Pass("plain", 1, calls=rollout)
    yield Pass("plain", samples)
    yield from _gradient(work, samples, tangents=False)


def _gradient(work: Work, samples: float, *, tangents: bool) -> Iterator[Pass]:
    if work.recompute == "blocks" or (work.recompute == "matmuls" and tangents):
        yield Pass("again", samples, gathers=0)
    yield Pass("backward", samples, reduces=True)


@dataclass(frozen=True)
class Step:
    """One update, for a rank: operations, bytes by kind of communication, seconds, forward-equivalents a sample."""

    products: float
    attention: float
    bytes: dict[str, float]
    seconds: float
    equivalents: float


def step(work: Work, layout: Layout, cluster: Cluster, passes: list[Pass]) -> Step:
    """The sum over the passes of all micro-batches."""
    products, attention = forward_operations(work)
    sent: defaultdict[str, float] = defaultdict(float)
    total = [0.0, 0.0]
    seconds = 0.0
    for each in passes:
        linear, quadratic = (cost * each.samples * each.calls for cost in COST[each.kind])
        total = [total[0] + linear * products, total[1] + quadratic * attention]
        busy = (linear * products + quadratic * attention) / (cluster.peak * cluster.utilisation)
        moved = _bytes(work, layout, each)
        for kind, size in moved.items():
            sent[kind] += size
        sharing = layout.shard * layout.context
        weights = (moved["all-gather"] + moved["reduce-scatter"]) / cluster.bandwidth(sharing)
        weights += moved["all-reduce"] / cluster.bandwidth(layout.replicate, sharing)
        exchange = (moved["all-to-all"] + moved["gather of tokens"]) / cluster.bandwidth(layout.context)
        seconds += max(busy, weights) + exchange
    often = work.accumulate
    return Step(
        total[0] * often,
        total[1] * often,
        {kind: size * often for kind, size in sent.items()},
        seconds * often,
        sum(each.equivalents for each in passes),
    )


def forward_operations(work: Work) -> tuple[float, float]:
    """Operations of one plain pass over a micro-batch on one rank: in products with weights, and in attention."""
    n = work.network
    text_width = n.width if n.kind == "wan" else n.text_width
    token = 6 * n.width**2 + 2 * n.width * n.mlp_width  # q, k, v, o; q, o; the MLP
    text = 2 * n.width * text_width  # k, v
    ends = n.width * n.patch_elements
    embedding = n.width * (n.text_width + n.width) if n.kind == "wan" else 0
    weights = n.layers * (work.here * token + work.words * text) + work.words * embedding
    weights += (work.tokens + work.here) * ends
    scores = n.layers * n.width * (work.tokens * work.tokens / work.context + work.here * work.words)
    return 2.0 * work.samples * weights, 4.0 * work.samples * scores


def _bytes(work: Work, layout: Layout, each: Pass) -> dict[str, float]:
    """What a rank receives (and sends as much)."""
    n, sharing, context = work.network, layout.shard * layout.context, layout.context
    weights = sum(n.numel(u) * n.times(u) * (FLOAT if u in n.precise else work.itemsize) for u in n.shapes)
    away, outside = 1 - 1 / sharing, 1 - 1 / context
    # q, k, v and back o; tangents as much again; their gradients take the same way back
    messages = {"plain": 4, "tangents": 8, "again": 4, "backward": 4, "through": 4}[each.kind]
    output = work.tokens * n.patch_elements * work.samples * work.itemsize
    forward = {"plain": 1, "tangents": 2}.get(each.kind, 0)
    return {
        "all-gather": each.calls * each.gathers * weights * away,
        "reduce-scatter": n.total * FLOAT * away * each.reduces,
        "all-reduce": 2 * (1 - 1 / layout.replicate) * n.total * FLOAT / sharing * each.reduces,
        "all-to-all": each.calls * each.samples * messages * n.layers * work.tensor * outside,
        "gather of tokens": each.calls * each.samples * forward * output * outside,
    }


@dataclass(frozen=True)
class Steps:
    """The three kinds of step of a run."""

    alone: Step | None  # of the student, by the consistency loss alone
    joint: Step | None  # of the student, with DMD
    critic: Step | None

    @classmethod
    def of(cls, work: Work, layout: Layout, objective: Objective, settings: Settings, cluster: Cluster) -> "Steps":
        rollout = (settings.max_rollout + 1) / 2  # on average, whether they take turns or are drawn
        alone = list(consistency_passes(work, objective, settings.dcm_skip)) if objective.consistency else []
        if not objective.dmd:
            return cls(step(work, layout, cluster, alone), None, None)
        joint = alone + list(distribution_passes(work, objective, rollout))
        critic = list(critic_passes(work, objective, rollout))
        return cls(
            step(work, layout, cluster, alone) if alone else None,
            step(work, layout, cluster, joint),
            step(work, layout, cluster, critic),
        )

    def hours(self, schedule: Schedule) -> float:
        """Of the whole run, without loading, saving and previews."""
        alone = min(schedule.alone, schedule.student_updates) if self.alone else 0
        counts = (
            (self.alone, alone),
            (self.joint, schedule.student_updates - alone),
            (self.critic, schedule.critic_updates),
        )
        return math.fsum(count * step.seconds for step, count in counts if step) / 3600
