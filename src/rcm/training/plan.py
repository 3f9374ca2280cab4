"""Which settings of a distillation fit a cluster, and how fast they are; by formulas, before anything is started."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from rcm.artefact import UserError
from rcm.networks.discriminator import Discriminator
from rcm.parallel import RECOMPUTE, Layout
from rcm.parallel.context import check_heads
from rcm.parallel.mesh import fit

from .batches import shares
from .plan_cost import Cluster, Step, Steps
from .plan_memory import Bytes, Network, Objective, Work, peak, phases
from .settings import Settings

KEYS = ("replicate", "shard", "context", "recompute", "micro_batch", "offload_teacher")  # what is proposed


@dataclass(frozen=True)
class Choice:
    """Settings of the section `parallel` on so many ranks; `micro_batch` None: all samples of a rank at once."""

    layout: Layout
    recompute: str
    micro_batch: int | None
    offload_teacher: bool
    tangent_pass: str
    precision: str

    def positions(self, batch: int) -> list[range]:
        """The micro-batches of the rank that has the most; UserError where the batch does not go round."""
        return shares(batch, self.layout.data_size, self.micro_batch)[0]

    def samples(self, batch: int) -> int:
        return len(self.positions(batch)[0])

    def accumulate(self, batch: int) -> int:
        return len(self.positions(batch))

    def value(self, key: str) -> Any:
        """Of a key of the section `parallel`."""
        return getattr(self.layout if hasattr(self.layout, key) else self, key)

    def overrides(self) -> str:
        """As key=value for the command line."""
        values = {key: self.value(key) for key in KEYS}
        words = {None: "null", True: "true", False: "false"}
        return " ".join(
            f"parallel.{key}={words.get(v, v) if not isinstance(v, int) or isinstance(v, bool) else v}"
            for key, v in values.items()
        )


@dataclass(frozen=True)
class Job:
    """What is to be distilled: sections of the configuration that training reads."""

    settings: Settings
    network: Mapping[str, Any]
    latents: tuple[int, int, int, int]  # C, T, H, W
    words: int  # tokens of a text
    parallel: Mapping[str, Any]

    @cached_property
    def sizes(self) -> Network:
        return Network(self.network)

    @cached_property
    def objective(self) -> Objective:
        s = self.settings
        exact = s.derivative if s.consistency in ("scm", "meanflow") else "none"
        scale = s.guidance + (s.guidance_form == "conditional")
        gan, branch = s.gan_weight > 0, []
        if gan:
            with torch.device("meta"):
                read = Discriminator(self.network["width"], s.discriminator["heads"], len(s.discriminator["layers"]))
            branch = [p.shape for p in read.parameters()]
        return Objective(s.consistency_weight > 0, exact, s.dmd_weight > 0, gan, branch, scale != 1, s.max_rollout)

    def choice(self, gpus: int) -> Choice:
        """The configured one; UserError where it does not fit so many ranks."""
        p = self.parallel
        layout = fit(gpus, p["replicate"], p["shard"], p["context"])
        fixed = {key: p[key] for key in ("recompute", "micro_batch", "offload_teacher", "tangent_pass", "precision")}
        return self.checked(Choice(layout, **fixed))

    def checked(self, choice: Choice) -> Choice:
        """The choice; UserError where heads or batch do not divide so."""
        check_heads(self.sizes.heads, choice.layout.context)
        choice.positions(self.settings.batch)
        return choice

    def work(self, choice: Choice) -> Work:
        layout, batch = choice.layout, self.settings.batch
        return Work(
            network=self.sizes,
            latents=self.latents,
            words=self.words,
            samples=choice.samples(batch),
            accumulate=choice.accumulate(batch),
            sharing=layout.shard * layout.context,
            context=layout.context,
            recompute=choice.recompute,
            shared_tangents=choice.tangent_pass == "shared",
            itemsize=2 if choice.precision == "bfloat16" else 4,
            offload_teacher=choice.offload_teacher,
        )

    def phases(self, choice: Choice) -> dict[str, Bytes]:
        return phases(self.work(choice), self.objective)

    def peaks(self, choice: Choice) -> dict[str, Bytes]:
        """Bytes by category at the peak of the student's step, and of the critic's where there is one."""
        every = self.phases(choice)
        critic = {name: sizes for name, sizes in every.items() if name.startswith("critic")}
        student = {name: sizes for name, sizes in every.items() if name not in critic}
        return {role: some[peak(some)[0]] for role, some in (("student", student), ("critic", critic)) if some}

    def memory(self, choice: Choice) -> float:
        """Bytes of a rank at the peak of all."""
        return peak(self.phases(choice))[1]

    def steps(self, choice: Choice, cluster: Cluster) -> Steps:
        """What the three kinds of step cost: a student's with and without DMD, and a critic's."""
        return Steps.of(self.work(choice), choice.layout, self.objective, self.settings, cluster)


@dataclass(frozen=True)
class Proposal:
    choice: Choice
    bytes: float
    hours: float


def proposals(job: Job, cluster: Cluster, stated: Mapping[str, Any]) -> list[Proposal]:
    """All settings with the `stated` values, fastest first; within 1 %, those without offloading and with least memory.

    Those that do not fit are among them. Raises UserError where the stated values cannot be had on so many ranks.
    """
    found, refused = [], None
    for choice in _choices(job, cluster, stated):
        try:
            job.checked(choice)
        except UserError as error:
            refused = refused or error
            continue
        hours = job.steps(choice, cluster).hours(job.settings.schedule)
        found.append(Proposal(choice, job.memory(choice), hours))
    if not found:
        raise refused or UserError(
            f"{cluster.gpus} GPUs do not divide as stated: "
            + ", ".join(f"parallel.{key}={value}" for key, value in stated.items())
            + f"; parallel.context times parallel.shard times parallel.replicate must make {cluster.gpus}"
        )
    return sorted(found, key=lambda p: (round(math.log(p.hours) / 0.01), p.choice.offload_teacher, p.bytes))


def _choices(job: Job, cluster: Cluster, stated: Mapping[str, Any]) -> Iterator[Choice]:
    p, batch = job.parallel, job.settings.batch
    heads = job.sizes.heads
    for context in _values(stated, "context", [n for n in _divisors(cluster.gpus) if heads % n == 0]):
        if cluster.gpus % context:
            continue
        groups = cluster.gpus // context
        for replicate in _values(stated, "replicate", _divisors(groups)):
            shard = groups // replicate
            if groups % replicate or (stated.get("shard") or shard) != shard:
                continue
            layout = Layout(replicate, shard, context)
            share = -(-batch // layout.data_size)
            sizes = [2**k for k in range(share.bit_length()) if 2**k <= share]
            for recompute in _values(stated, "recompute", RECOMPUTE):
                for micro in _values(stated, "micro_batch", sizes):
                    for offload in _values(stated, "offload_teacher", (False, True)):
                        yield Choice(layout, recompute, micro, offload, p["tangent_pass"], p["precision"])


def _values(stated: Mapping[str, Any], key: str, otherwise: Sequence[Any]) -> Sequence[Any]:
    return [stated[key]] if key in stated else otherwise


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def fitting(job: Job, cluster: Cluster, stated: Mapping[str, Any]) -> list[Proposal]:
    """The proposals that fit, fastest first; UserError where none does, with what is missing and what would do."""
    found = proposals(job, cluster, stated)
    if fit_ := [p for p in found if p.bytes <= cluster.usable]:
        return fit_
    least = min(found, key=lambda p: p.bytes)
    raise UserError(
        f"{'the stated settings do not fit' if stated else 'nothing fits'} {cluster.gpus} GPUs: the least a rank "
        f"needs is {gib(least.bytes)} ({least.choice.overrides()}), {gib(least.bytes - cluster.usable)} more than "
        f"the {gib(cluster.usable)} that can be used of {gib(cluster.memory)}; {_remedy(job, cluster, stated)}"
    )


def _remedy(job: Job, cluster: Cluster, stated: Mapping[str, Any]) -> str:
    free = [p for p in proposals(job, cluster, {}) if p.bytes <= cluster.usable] if stated else []
    if free:
        return f"this fits: {free[0].choice.overrides()}"
    for factor in (2, 4, 8, 16, 32):
        larger = replace(cluster, gpus=cluster.gpus * factor)
        for allowed in (stated, {}):
            try:
                fits = [p for p in proposals(job, larger, allowed) if p.bytes <= larger.usable]
            except UserError:
                continue
            if fits:
                return f"{larger.gpus} GPUs would do: {fits[0].choice.overrides()}"
    return "use GPUs with more memory"


def gib(size: float) -> str:
    """Bytes, to be read."""
    return f"{size / 2**30:.1f} GiB"


__all__ = ["Choice", "Cluster", "Job", "Proposal", "Step", "fitting", "gib", "proposals"]
