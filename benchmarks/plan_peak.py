"""The memory that `rcm plan` foretells, against the live tensors of the trainer's own steps.

    python benchmarks/plan_peak.py experiment=wan2.1-1.3b-clips --gpus 8
    python benchmarks/plan_peak.py experiment=wan2.1-14b-clips --gpus 32 parallel.context=1 --layers 4

One rank of many is run in this process (collectives do nothing) on tensors without memory, so that any size will do.
With a GPU a step on one rank is run as well, and the plan compared with the allocator's peak.

The tracker is ours: PyTorch's MemTracker sums by module calls, which dual tensors and recomputed units do not make, and
cannot tell kept from passing. Two things are put right for it: norms by root mean square are layer norms here, because
what the CPU has instead of the fused kernel keeps four times as much; and zero tangents stay on the device of the
others, where FakeTensorMode loses track.
"""

import argparse
import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rcm.parallel.context
import rcm.training.learner
from rcm.cli.plan import read
from rcm.flow import time_distribution
from rcm.networks import build
from rcm.networks.discriminator import FakeScore
from rcm.objectives import Rollout
from rcm.parallel import Mesh, parallelize
from rcm.training import updates
from rcm.training.plan import Choice, Job
from rcm.training.updates import Distillation

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, by category, and the largest sum since the last look.

    `guess` names the category of a new tensor where the code that makes it does not (`inside`).
    """

    def __init__(self, guess: Callable[[Tensor], str]):
        super().__init__()
        self.guess, self.category = guess, ""
        self.sizes: dict[int, list[Any]] = {}  # address of a storage -> bytes, category
        self.live: Counter[str] = Counter()
        self.now, self.largest, self.at_largest = 0, 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._efficientzerotensor.default:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            func, kwargs = aten.alias.default, {}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.note(x)
        return out

    def note(self, x: Tensor) -> None:
        x = getattr(x, "_local_tensor", x)  # a DTensor itself has the size of the whole
        if x.device.type == "meta" or x._is_zerotensor():
            return
        storage = x.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = [0, self.category or self.guess(x)]
            weakref.finalize(storage, self._drop, storage._cdata).atexit = False
        self._resized(storage)

    def mark(self, tensors: Sequence[Tensor], category: str) -> None:
        """These tensors belong to a category."""
        for x in tensors:
            x = getattr(x, "_local_tensor", x)
            self.note(x)
            entry = self.sizes[x.untyped_storage()._cdata]
            self.live[entry[1]] -= entry[0]
            self.live[category] += entry[0]
            entry[1] = category

    @contextmanager
    def inside(self, category: str) -> Iterator[None]:
        """What is made inside belongs to a category."""
        before, self.category = self.category, category
        yield
        self.category = before

    def look(self) -> dict[str, int]:
        """The categories at the largest sum since the last look."""
        found = {k: v for k, v in self.at_largest.items() if v}
        self.largest, self.at_largest = self.now, Counter(self.live)
        return found

    def _resized(self, storage: Any) -> None:
        entry = self.sizes[storage._cdata]
        more = storage.nbytes() - entry[0]
        if more:
            entry[0] += more
            self.live[entry[1]] += more
            self.now += more
            if self.now > self.largest:
                self.largest, self.at_largest = self.now, Counter(self.live)

    def _drop(self, key: int) -> None:
        size, category = self.sizes.pop(key)
        self.live[category] -= size
        self.now -= size

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow also what does not pass through the dispatcher, and name what FSDP and the context group make."""
        from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
        from torch.distributed.tensor._sharding_prop import ShardingPropagator

        resize, exchange = torch.UntypedStorage.resize_, rcm.parallel.context._all_to_all
        scattered = 0

        def resized(storage: Any, size: int) -> Any:
            out = resize(storage, size)
            if storage._cdata in self.sizes:
                self._resized(storage)
            return out

        def allocate(buffers: Any, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            nonlocal scattered
            scattered += isinstance(buffers, collectives.DefaultReduceScatter)
            result = isinstance(buffers, collectives.DefaultReduceScatter) and scattered % 2 == 0
            with self.inside("gradients" if result else "communication"):
                return torch.empty(*size, dtype=dtype, device=device)

        def exchanged(*arguments: Any) -> tuple[Tensor, ...]:
            with self.inside("communication"):
                out = exchange(*arguments)
            self.mark(out, "activations")
            return out

        def named(function: Callable[..., Any], category: str) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                with self.inside(category):
                    return function(*arguments, **options)

            return call

        def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                with torch.utils._python_dispatch._disable_current_modes():
                    return function(*arguments, **options)

            return call

        shapes = unseen(ShardingPropagator._propagate_tensor_meta_non_cached)
        gather = named(groups.foreach_all_gather, "communication")
        make = named(FSDPParam.init_all_gather_outputs, "gathered")
        with (
            mock.patch.object(torch.UntypedStorage, "resize_", resized),
            mock.patch.object(collectives.DefaultAllocMixin, "allocate", allocate),
            mock.patch.object(groups, "foreach_all_gather", gather),
            mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", shapes),
            mock.patch.object(FSDPParam, "init_all_gather_outputs", make),
            mock.patch.object(rcm.parallel.context, "_all_to_all", exchanged),
            mock.patch.object(F, "rms_norm", lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps)),
            self,
        ):
            yield


class Draws:
    """Stands in for `rcm.training.batches.Draws`: tensors of the same shapes, as nothing looks at the numbers."""

    def __init__(self, job: Job, samples: int, device: str):
        s = job.settings
        self.dmd_time, self.scm_time = time_distribution(s.dmd_time), time_distribution(s.scm_time)
        self.null_text = torch.randn(1, job.words, job.network["text_width"], device=device)
        self.positions, self.device, self.steps = range(samples), torch.device(device), s.max_rollout

    def normal(self, shape: Sequence[int], purpose: str, update: int) -> Tensor:
        return torch.randn(len(self.positions), *shape, device=self.device)

    def uniform(self, shape: Sequence[int], purpose: str, update: int) -> Tensor:
        return torch.rand(len(self.positions), *shape, dtype=torch.float64, device=self.device)

    def rollout(self, role: str, update: int, shape: Sequence[int]) -> Rollout:
        """The longest one."""
        times = torch.rand(self.steps, len(self.positions), dtype=torch.float64, device=self.device)
        return Rollout(times, self.normal((self.steps, *shape), "", update).transpose(0, 1))

    def drop(self, text: Tensor, role: str, update: int) -> Tensor:
        return text


class _Batch:
    def __init__(self, latents: Tensor, text: Tensor):
        self.latents_BCTHW, self.text_BLD = latents, text


def prepared(job: Job, choice: Choice, mesh: Mesh) -> Distillation:
    """One rank's networks, optimisers and draws, ready for a step with DMD."""
    s, device = job.settings, str(mesh.device)
    options: dict[str, Any] = {"precision": choice.precision}
    student, teacher, fake = (build(job.network) for _ in range(3))
    if s.gan_weight > 0:
        branch = {key: s.discriminator[key] for key in ("layers", "heads")}
        fake = FakeScore(fake, width=job.network["width"], **branch)
    parallelize(student, mesh, recompute=choice.recompute, **options)
    parallelize(fake, mesh, recompute=choice.recompute, **options)
    parallelize(teacher, mesh, trainable=False, offload=choice.offload_teacher, **options)
    for network in (student, teacher, fake):
        network.to(device)
    samples = choice.samples(s.batch)
    draws: list[Any] = [Draws(job, samples, device) for _ in range(choice.accumulate(s.batch))]
    needed = fake if s.dmd_weight > 0 else None
    made = Distillation(s, student, needed, teacher, draws, tangent_pass=choice.tangent_pass)
    for learner in made.learners.values():
        learner.updates = s.schedule.alone  # DMD has joined
    everything = samples * len(draws)
    batch: Any = _Batch(
        torch.randn(everything, *job.latents), torch.randn(everything, job.words, job.network["text_width"])
    )
    made.feeds = {role: iter([batch, batch]) for role in ("student", "critic")}
    return made


def held(made: Distillation) -> dict[str, list[Tensor]]:
    """The tensors of a prepared rank, by category."""
    moments = [
        state[key]
        for learner in made.learners.values()
        for state in learner.optimizer.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    return {
        "student": list(made.student.network.parameters()),
        "fake score": list(made.critic.network.parameters()) if made.critic else [],
        "teacher": list(made.teacher.network.parameters()),
        "EMA": list(made.ema.average.values()),
        "moments": moments,
        "loss": [made.draws[0].null_text],
    }


PARTS = {  # of a step: the function that begins with it, what is run inside, and what comes behind
    "scm_loss": ("student: forward", "student: backward"),
    "roll_out": ("{}: rollout", ""),
    "dmd_loss": ("DMD: teacher", "DMD: backward"),
    "adversarial_loss": ("GAN: forward", "GAN: backward"),  # and that of DMD, which follows
    "critic_loss": ("critic: forward", "critic: backward"),
    "adversarial_critic_loss": ("critic: forward", "critic: backward"),
}


def steps(made: Distillation, look: Callable[[], Mapping[str, int]]) -> dict[str, Mapping[str, int]]:
    """What `look` says behind each part of a student's and of a critic's step; the most, where there are several."""
    found: dict[str, Mapping[str, int]] = {}
    part = ""

    def turn(following: str) -> None:
        nonlocal part
        seen = look()
        if part and sum(seen.values()) > sum(found.get(part, {}).values()):
            found[part] = seen
        part = following

    def wrapped(function: Callable[..., Any], inside: str, behind: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            turn(inside.format("DMD" if options.get("grad_last") else "critic"))
            result = function(*arguments, **options)
            turn(behind)
            return result

        return call

    with ExitStack() as patches:
        for name, parts in PARTS.items():
            patches.enter_context(mock.patch.object(updates, name, wrapped(getattr(updates, name), *parts)))
        update = wrapped(updates.Learner.update, "optimiser", "")
        patches.enter_context(mock.patch.object(updates.Learner, "update", update))
        for role in made.learners:
            getattr(made, f"{role}_step")()
    return found


class _Zero:
    """The norm of gradients that have no numbers."""

    def item(self) -> float:
        return 0.0


def live(job: Job, choice: Choice, *, fake: bool) -> dict[str, dict[str, int]]:
    """Live bytes by category at the peak of each part of a step of rank 0; `fake`: of tensors without memory.

    Where there is no process group, it is one in which collectives do nothing.
    """
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("fake", rank=0, world_size=choice.layout.world, store=FakeStore())
    mesh = Mesh(choice.layout, torch.device("cpu"))
    assert mesh.parameters is not None  # made before tensors are fake
    latents, text = tuple(job.latents), (job.words, job.network["text_width"])
    tokens = [n // p for n, p in zip(latents[1:], job.network["patch"], strict=True)]
    rotary = (tokens[0] * tokens[1] * tokens[2], job.network["width"] // job.network["heads"])

    def guess(x: Tensor) -> str:
        shape = tuple(x.shape)
        outside = x.dtype == torch.float64 or latents in (shape[1:], shape[2:]) or shape[1:] == text or shape == rotary
        return "loss" if outside else "activations"

    norm = mock.patch.object(rcm.training.learner, "total_norm", lambda _: _Zero())
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    tracker = LiveBytes(guess)
    try:
        with mode or nullcontext(), norm:
            made = prepared(job, choice, mesh)
            with tracker.following():
                for category, tensors in held(made).items():
                    tracker.mark(tensors, category)
                return steps(made, tracker.look)
    finally:
        if alone:
            dist.destroy_process_group()


def foretold(job: Job, choice: Choice) -> dict[str, dict[str, float]]:
    """The plan's bytes for the same parts: of phases that are one part here, the largest."""
    parts: dict[str, dict[str, float]] = {}
    for phase, sizes in job.phases(choice).items():
        part = {"student: teacher": "student: forward", "student: second forward": "student: forward"}.get(phase, phase)
        part = part.replace("end of ", "")
        if job.settings.gan_weight > 0 and part == "DMD: backward":
            part = "GAN: backward"
        if sum(sizes.values()) > sum(parts.get(part, {}).values()):
            parts[part] = sizes
    return parts


def compare(planned: Mapping[str, float], found: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Planned and found bytes by category, all activations as one."""
    merged: Counter[str] = Counter()
    for key, value in planned.items():
        merged["activations" if key in ("kept", "at work") else key] += value  # type: ignore[assignment]
    names = [*dict.fromkeys([*merged, *found])]
    return {name: (merged[name], found.get(name, 0)) for name in names} | {
        "total": (sum(planned.values()), sum(found.values()))
    }


def table(title: str, rows: Mapping[str, tuple[float, float]]) -> str:
    lines = [f"{title:32} {'planned GB':>12} {'found GB':>12} {'ratio':>7}"]
    for name, (planned, found) in rows.items():
        if planned or found:
            ratio = f"{planned / found:7.3f}" if found else f"{'':7}"
            lines.append(f"  {name:30} {planned / 1e9:12.4f} {found / 1e9:12.4f} {ratio}")
    return "\n".join(lines)


def on_gpu(job: Job) -> None:
    """A student's and a critic's step on one rank of one GPU, against the allocator's peak."""
    choice = job.choice(gpus=1)
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    mesh = Mesh(choice.layout, torch.device("cuda", 0))

    def look() -> dict[str, int]:
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return {"total": found}

    found = steps(prepared(job, choice, mesh), look)
    print(f"{torch.cuda.get_device_name()}, allocator's peak:")
    for part, planned in foretold(job, choice).items():
        print(table(part, {"total": (sum(planned.values()), found[part]["total"])}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--layers", type=int, help="blocks of the networks; all unless given")
    parser.add_argument("--real", action="store_true", help="tensors with memory, which a context group needs")
    parser.add_argument("--json", type=Path)
    given = parser.parse_intermixed_args()
    job = read([*given.overrides, *([f"network.layers={given.layers}"] if given.layers else [])])
    choice = job.choice(gpus=given.gpus)
    print(f"torch {torch.__version__}; {' '.join(given.overrides)}; {choice}")
    found, written = live(job, choice, fake=not given.real), {}
    for part, planned in foretold(job, choice).items():
        rows = written[part] = compare(planned, found[part])
        print(table(part, rows), flush=True)
    if given.json:
        given.json.write_text(json.dumps(written, indent=1))
    if torch.cuda.is_available():
        on_gpu(job)
    else:
        print("no CUDA device here: the allocator's peak was not measured")


if __name__ == "__main__":
    sys.exit(main())
