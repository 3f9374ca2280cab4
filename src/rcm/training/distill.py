"""The distillation loop: a student learns from a teacher by a consistency loss, by DMD, or by both (rCM).

Algorithm 1 of the paper (arXiv 2510.08431). Nothing here lives on a generator: times, noise and the order of the data
are functions of (seed, purpose, update, position in the global batch), so that a resumed run repeats an uninterrupted
one bit for bit and the number of processes does not matter.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rcm.artefact import atomic_file, beside
from rcm.data.shards import LatentDataset
from rcm.data.stream import stream
from rcm.parallel import COUNTER, Mesh
from rcm.usage import peak_mib

from .alarms import Alarms
from .batches import Draws, shares
from .learner import optimizer_kind
from .metrics import MetricsLog, means, totals
from .profiler import Profiler
from .settings import Parallel, Settings
from .signals import Caught, caught_signals, leave
from .state import States
from .updates import Distillation

Preview = Callable[[int, Callable[..., Tensor]], None]  # (update, denoiser of the averaged weights) -> nothing


def distill(
    config: Mapping[str, Any],
    *,
    student: Any,
    teacher: nn.Module,
    fake: nn.Module | None,
    data: LatentDataset,
    null_text: Tensor,
    resume_dir: Path,
    metrics_path: Path,
    mesh: Mesh,
    caught: Caught | None = None,
    preview: Preview | None = None,
    raw: Callable[[], None] | None = None,
    advance: Callable[[int, str], None] | None = None,
) -> None:
    """Train `student`, which carries the averaged weights on return; continues the run in `resume_dir`, if any.

    config      plain tree with `seed`, `network`, `text`, `objective`, `distillation` (see `Settings`), `parallel` (see
                `Parallel`) and optionally `inputs`, hashes of what the run starts from; a state of another config is
                refused
    student, teacher, fake  built, on the device of `mesh` and shared over its ranks (`rcm.parallel.parallelize`); the
                fake score, initialised from the teacher, may be None where there is no DMD
    null_text   (1, L, D), the empty prompt
    metrics_path  JSON lines, one an iteration, written when the run is complete (until then in `resume_dir`)
    caught      where the caller catches signals (`caught_signals`): from the first iteration on they are only noted
    preview     called on every rank each `preview_every` student updates
    raw         called on every rank at the end, while the student still has its last weights
    advance     called with (iterations done, note) for a progress bar

    Every rank calls this; rank 0 writes. The state stays in `resume_dir`; `remove_states` drops it once the result is
    safe. On SIGINT, SIGTERM or SIGUSR1 to any rank the state is saved and SystemExit(EXIT_INTERRUPTED) raised on all.
    Raises UserError for settings that are impossible.
    """
    settings, parallel = Settings.of(config), Parallel.of(config)
    identity = {
        **settings.identity(),
        "optimizer": optimizer_kind(settings.optimizer, mesh.device.type),  # the one that auto chose
        "precision": parallel.precision,
        "network": config["network"],
        "text": config["text"],
        "inputs": dict(config.get("inputs", {})),
    }
    mine = shares(settings.batch, mesh.data_size, parallel.micro_batch)[mesh.data_rank]
    draws = [Draws(null_text, settings, positions, mesh.device) for positions in mine]
    run = Distillation(settings, student, fake, teacher, draws, tangent_pass=parallel.tangent_pass)
    iterations = settings.schedule.iterations
    with ExitStack() as stack:
        states = stack.enter_context(States(resume_dir, identity, mesh, timeout=parallel.timeout))
        state = run.state()
        if (done := states.load(state)) is not None:
            run.resume(state)
            if mesh.is_main:
                told = f"goes on after iteration {done} of {iterations}, whose state is in {resume_dir}"
                print(told, file=sys.stderr, flush=True)
        done = done or 0
        if advance is not None:
            advance(done, "")
        for role, learner in run.learners.items():
            reading = stream(
                data, batch=settings.batch, positions=[i for part in mine for i in part], seed=settings.seed,
                start=learner.updates, words=null_text.shape[1], workers=parallel.workers, device=mesh.device,
            )  # fmt: skip
            run.feeds[role] = stack.enter_context(reading)
        tokens = settings.batch * math.prod(data.samples[0].latents_CTHW.shape[1:]) // math.prod(student.patch)
        record = _Record(settings, identity, resume_dir, done, tokens, mesh.device) if mesh.is_main else None
        if record is not None:
            stack.callback(record.log.close)
        span = settings.profile if mesh.is_main else None
        profiler = stack.enter_context(Profiler(span, beside(resume_dir, ".trace.json")))
        caught = caught or stack.enter_context(caught_signals())
        caught.at_once = False
        for iteration in range(done + 1, iterations + 1):
            start = time.perf_counter()
            with profiler.step(iteration):
                row, sums = run.step(iteration)
                figures, interrupted = totals(sums, len(caught.numbers), mesh)
            row |= means(figures, settings.batch)
            if record is not None:
                record.write(iteration, row, time.perf_counter() - start)
            if advance is not None:
                advance(1, _note(row))
            if preview is not None and _is_due(row, settings.preview_every):
                with run.ema.applied(), torch.no_grad():
                    preview(row["update"], run.student.wrapped.denoise)
            last = iteration == iterations
            if interrupted or last or iteration % settings.state_every == 0:
                if record is not None:
                    record.log.flush()
                states.save(iteration, run.state(), wait=last or interrupted > 0)
            if interrupted:
                leave(iteration, iterations, resume_dir, speak=mesh.is_main)
    if mesh.is_main:
        with atomic_file(metrics_path) as path:
            shutil.copyfile(resume_dir / "metrics.jsonl", path)
    if raw is not None:
        raw()
    run.ema.copy_to_network()


class _Record:
    """What rank 0 writes down of every step: the row of figures, with the alarms that it sets off."""

    def __init__(
        self, settings: Settings, identity: Mapping[str, Any], resume_dir: Path, done: int, tokens: int, device: Any
    ):
        self.batch, self.tokens, self.device = settings.batch, tokens, device
        self.log = MetricsLog(resume_dir / "metrics.jsonl", step=done, wandb=settings.wandb, config=identity)
        self.alarms = Alarms(settings.batch)
        for row in self.log.rows():
            self.alarms.look(row, speak=False)

    def write(self, iteration: int, row: dict[str, Any], seconds: float) -> None:
        row["alarms"] = self.alarms.look(row)
        wall = {
            "seconds": seconds,
            "samples_per_second": self.batch / seconds,
            "tokens_per_second": self.tokens / seconds,
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else peak_mib(),
            "forwards": COUNTER.equivalents(),
        }
        self.log.write(iteration, {**row, "wall": wall})


def _note(row: Mapping[str, Any]) -> str:
    """The losses of a row, for a progress bar."""
    return ", ".join(f"{key} {value:.3g}" for key, value in row.items() if key.endswith("_loss"))


def _is_due(row: Mapping[str, Any], every: int) -> bool:
    return every > 0 and row["role"] == "student" and row["update"] % every == 0
