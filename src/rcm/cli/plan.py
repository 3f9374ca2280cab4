"""The stage `plan`: which settings of a distillation fit a cluster, before anything is started."""

import math
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rcm.artefact import UserError, write_json
from rcm.cli.config import compose
from rcm.cli.models import latent_shape
from rcm.training.plan import KEYS, Cluster, Job, Proposal, fitting, gib
from rcm.training.plan_cost import Step
from rcm.training.plan_memory import CATEGORIES
from rcm.training.settings import Settings


def read(overrides: Iterable[str]) -> Job:
    """The job that a configuration describes."""
    tree = compose(overrides)
    return Job(Settings.of(tree), tree["network"], latent_shape(tree), tree["text"]["tokens"], tree["parallel"])


def plan(arguments: Namespace) -> None:
    """Print the settings that fit, fastest first, and what the first of them needs; UserError where none does."""
    job = read(arguments.overrides)
    cluster = _cluster(arguments)
    words = (word.partition("=")[0].lstrip("+") for word in arguments.overrides)
    given = {word.removeprefix("parallel.") for word in words}
    stated = {key: job.parallel[key] for key in KEYS if key in given and (key, job.parallel[key]) != ("shard", None)}
    print(_head(job, cluster))
    found = fitting(job, cluster, stated)
    print(_configured(job, cluster))
    print(_ranking(found[: arguments.count], stated, len(found)))
    print(_details(job, cluster, found[0]))
    if arguments.json:
        write_json(arguments.json, {"cluster": asdict(cluster), "proposals": [_json(job, cluster, p) for p in found]})


def _cluster(given: Namespace) -> Cluster:
    per_node = min(given.gpus_per_node, given.gpus)
    if given.gpus < 1 or per_node < 1 or given.gpus % per_node:
        raise UserError(f"--gpus {given.gpus} is no multiple of --gpus-per-node {given.gpus_per_node}")
    return Cluster(
        gpus=given.gpus,
        per_node=per_node,
        memory=given.memory,
        peak=given.tflops * 1e12,
        utilisation=given.utilisation,
        node=given.node_bandwidth * 1e9,
        network=given.network_bandwidth * 1e9,
    )


# --- What is printed -----------------------------------------------------------------------------------------------


def _head(job: Job, cluster: Cluster) -> str:
    s, schedule = job.settings, job.settings.schedule
    size = " x ".join(map(str, job.latents))
    tokens = math.prod(n // p for n, p in zip(job.latents[1:], job.network["patch"], strict=True))
    alone = min(schedule.alone, schedule.student_updates)
    return "\n".join(
        [
            f"{s.name}: {job.sizes.total:,} parameters, latents {size}, {tokens:,} tokens, batch {s.batch}, "
            f"{schedule.student_updates:,} updates of the student ({alone:,} without DMD), "
            f"{schedule.critic_updates:,} of the critic",
            f"{cluster.gpus} GPUs, {cluster.per_node} a node, {gib(cluster.memory)} each, "
            f"{cluster.reserve:.0%} kept free; assumed: {cluster.peak / 1e12:g} TFLOP/s at {cluster.utilisation:.0%},",
            f"{cluster.node / 1e9:g} GB/s inside a node, {cluster.network / 1e9:g} GB/s a GPU between nodes, traffic "
            "of weights hidden behind products",
        ]
    )


def _configured(job: Job, cluster: Cluster) -> str:
    """What becomes of the settings as they stand."""
    try:
        choice = job.choice(cluster.gpus)
    except UserError as error:
        return f"as configured: impossible: {error}"
    need = job.memory(choice)
    verdict = "fits" if need <= cluster.usable else f"does not fit, {gib(need - cluster.usable)} too much"
    hours = job.steps(choice, cluster).hours(job.settings.schedule)
    return f"as configured: {verdict}: {gib(need)} a rank, {hours:,.1f} hours ({choice.overrides()})"


def _ranking(found: list[Proposal], stated: Mapping[str, Any], count: int) -> str:
    what = "with " + ", ".join(f"{k}={v}" for k, v in stated.items()) if stated else "of all"
    lines = [f"\n{count} settings fit {what}; the fastest:", f"  {'GiB a rank':>10} {'hours':>9}  settings"]
    lines += [f"  {p.bytes / 2**30:10.1f} {p.hours:9,.1f}  {p.choice.overrides()}" for p in found]
    return "\n".join(lines)


def _details(job: Job, cluster: Cluster, best: Proposal) -> str:
    peaks, steps = job.peaks(best.choice), job.steps(best.choice, cluster)
    lines = ["\nThe first of them. Memory of a rank at the peak of each step, GiB:"]
    lines.append(f"  {'':16}" + "".join(f"{role:>12}" for role in peaks))
    for key in CATEGORIES:
        if any(sizes[key] for sizes in peaks.values()):
            lines.append(f"  {key:16}" + "".join(f"{sizes[key] / 2**30:12.2f}" for sizes in peaks.values()))
    lines.append(f"  {'sum':16}" + "".join(f"{sum(sizes.values()) / 2**30:12.2f}" for sizes in peaks.values()))
    kinds = {"student, no DMD": steps.alone, "student": steps.joint, "critic": steps.critic}
    some = {name: step for name, step in kinds.items() if step}
    rows: dict[str, Any] = {
        "expected seconds": lambda s: s.seconds,
        "PFLOP, products": lambda s: s.products / 1e15,
        "PFLOP, attention": lambda s: s.attention / 1e15,
        "forward-equivalents": lambda s: s.equivalents,
    }
    moved = {kind: None for step in some.values() for kind, size in step.bytes.items() if size}
    lines.append(
        "\nA step of a rank; forward-equivalents are those of a sample (plain 1, with tangents 3, backward 2):"
    )
    lines.append(f"  {'':20}" + "".join(f"{name:>17}" for name in some))
    lines += [f"  {row:20}" + "".join(f"{of(step):17,.2f}" for step in some.values()) for row, of in rows.items()]
    lines += [
        f"  {'GB, ' + kind:20}" + "".join(f"{s.bytes[kind] / 1e9:17,.2f}" for s in some.values()) for kind in moved
    ]
    lines.append(f"\nThe run: {best.hours:,.1f} hours, {best.hours * cluster.gpus:,.0f} GPU hours")
    return "\n".join(lines)


def _json(job: Job, cluster: Cluster, p: Proposal) -> dict[str, Any]:
    steps = job.steps(p.choice, cluster)
    return {
        "parallel": {key: p.choice.value(key) for key in KEYS},
        "bytes": p.bytes,
        "hours": p.hours,
        "peaks": job.peaks(p.choice),
        "steps": {name: asdict(step) for name, step in vars(steps).items() if isinstance(step, Step)},
    }
