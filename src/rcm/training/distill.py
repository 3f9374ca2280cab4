"""The distillation loop: a student learns from a teacher by sCM, DMD, or rCM as their weighted sum.

Algorithm 1 of the paper (arXiv 2510.08431). Nothing here lives on a generator: times, noise and the order of the data
are functions of (seed, purpose, update, position in the global batch), so that a resumed run repeats an uninterrupted
one bit for bit and the number of processes does not matter.
"""

import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rcm import randomness
from rcm.artefact import UserError, atomic_file
from rcm.data.shards import LatentDataset, batch_indices
from rcm.flow import Wrapped, time_distribution
from rcm.objectives import Rollout, balance, critic_loss, dmd_loss, rollout_times, scm_loss

from .ema import PowerEMA
from .metrics import MetricsLog
from .schedule import Schedule, learning_rate
from .state import load_state, save_state

EXIT_INTERRUPTED = 75  # exit status after SIGINT or SIGTERM: the state is saved, run again (EX_TEMPFAIL)


@dataclass(frozen=True)
class Settings:
    """The numbers of a run: sections `objective` and `distillation` of the configuration, and its `seed`."""

    seed: int
    student_updates: int  # length of the run, equal for all methods; the paper counts student and critic together
    batch: int  # samples of an update, over all processes
    guidance: float  # s of the teacher's velocity F_u + s (F_c - F_u), in both losses
    prompt_dropout: float  # share of prompts replaced by the empty one
    # the loss
    name: str  # scm, dmd or rcm: must agree with the weights
    scm_weight: float
    dmd_weight: float  # lambda, where scm_weight is 1; `balance` in the metrics is lambda sqrt(D)
    scm_time: Mapping[str, Any]  # p_G, times of the sCM loss: a distribution of rcm.flow
    dmd_time: Mapping[str, Any]  # p_D, times of the DMD and critic losses and of random rollouts
    tangent_constant: float  # c in g / (||g|| + c)
    max_rollout: int  # N_max: rollouts of 1, 2, ... N_max steps take turns
    rollout_times: Sequence[float] | None  # times behind pi/2 of the student's rollouts; null: drawn from p_D
    # phases; sCM alone has the first only, DMD alone starts with the critic's
    tangent_warmup: int  # H: student updates by sCM alone, in which the tangent's weight rises to 1
    scm_only: int  # rCM: further student updates by sCM alone, before DMD joins
    critic_warmup: int  # critic updates on the student's rollouts before DMD joins
    student_every: int  # F: afterwards every F-th iteration is the student's, the others are the critic's
    # optimisers: AdamW for each network, no clipping
    student_lr: float
    critic_lr: float
    lr_warmup: int  # own updates of a network in which its learning rate rises linearly
    lr_decay: str  # constant, or cosine to zero at the end
    beta2: float  # beta1 is 0
    weight_decay: float
    eps: float
    ema: float  # length of the power-function EMA: standard deviation of its profile, as a share of the training
    # what does not change the result
    state_every: int  # iterations between states to resume from
    preview_every: int  # student updates between previews; 0: none
    wandb: str  # disabled, offline or online

    def __post_init__(self) -> None:
        acting = {(True, False): "scm", (False, True): "dmd", (True, True): "rcm"}
        method = acting.get((self.scm_weight > 0, self.dmd_weight > 0))
        if method != self.name:
            raise UserError(
                f"objective {self.name} does not have scm_weight {self.scm_weight:g} and dmd_weight {self.dmd_weight:g}"
            )
        if method == "rcm" and self.tangent_warmup + self.scm_only >= self.student_updates:
            raise UserError(
                f"distillation.tangent_warmup {self.tangent_warmup} and distillation.scm_only {self.scm_only} "
                f"leave DMD none of the {self.student_updates} student_updates; "
                "allowed: a sum below distillation.student_updates"
            )
        if self.rollout_times is not None and len(self.rollout_times) < self.max_rollout - 1:
            need = self.max_rollout - 1
            raise UserError(
                f"distillation.max_rollout is {self.max_rollout}, rollouts of so many steps need {need} rollout_times; "
                f"objective.rollout_times has {len(self.rollout_times)}; allowed: null, or at least {need}"
            )
        if self.student_every < 1 or self.max_rollout < 1 or self.batch < 1:
            raise UserError("student_every, max_rollout and batch must be at least 1")
        if self.lr_decay not in ("constant", "cosine"):
            raise UserError(f"lr_decay must be constant or cosine, got {self.lr_decay}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Settings":
        """Read the sections; raises UserError for keys that are unknown or missing."""
        given = {"seed": config["seed"], **config["distillation"], **config["objective"]}
        known = {field.name for field in fields(cls)}
        for problem, keys in (("unknown", given.keys() - known), ("missing", known - given.keys())):
            if keys:
                raise UserError(f"{problem} in the sections objective and distillation: {', '.join(sorted(keys))}")
        return cls(**given)

    def identity(self) -> dict[str, Any]:
        """The settings on which the result depends."""
        free = ("state_every", "preview_every", "wandb")
        return {key: value for key, value in asdict(self).items() if key not in free}

    @property
    def schedule(self) -> Schedule:
        if self.name == "scm":
            return Schedule(self.student_updates, sole=self.student_updates)
        sole = self.tangent_warmup + self.scm_only if self.name == "rcm" else 0
        return Schedule(self.student_updates, sole, self.critic_warmup, self.student_every)


class Learner:
    """A network that learns: its optimiser, its learning rate and its own count of updates."""

    def __init__(self, network: nn.Module, peak: float, updates: int, settings: Settings):
        self.network, self.wrapped = network, Wrapped(network)
        self.peak, self.total, self.settings = peak, updates, settings
        self.updates = 0
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=peak,
            betas=(0.0, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def update(self) -> dict[str, float]:
        """Take a step along the gradients that are there, and forget them. No clipping; what is not finite is 0."""
        s = self.settings
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm, faulty = torch.nn.utils.get_total_norm(gradients).item(), 0
        if not math.isfinite(norm):
            faulty = int(sum((~g.isfinite()).sum() for g in gradients))
            for gradient in gradients:
                gradient.nan_to_num_(0.0, 0.0, 0.0)
            norm = torch.nn.utils.get_total_norm(gradients).item()
        self.updates += 1
        rate = learning_rate(self.peak, self.updates, self.total, s.lr_warmup, s.lr_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"lr": rate, "gradient_norm": norm, "nonfinite_gradients": faulty}

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


class Batches:
    """Everything random of an update, as functions of (seed, purpose, update, position in the global batch)."""

    def __init__(
        self, data: LatentDataset, null_text: Tensor, settings: Settings, positions: Sequence[int], device: Any
    ):
        self.data, self.null_text, self.settings = data, null_text.to(device), settings
        self.positions, self.device = list(positions), device
        self.dmd_time = time_distribution(settings.dmd_time)
        self.scm_time = time_distribution(settings.scm_time)

    def samples(self, role: str, update: int) -> tuple[Tensor, Tensor]:
        """Latents (B, C, T, H, W) and text (B, L, D); some prompts are dropped."""
        s = self.settings
        order = batch_indices(len(self.data), s.batch, s.seed, update)
        batch = self.data.batch([order[i] for i in self.positions], words=self.null_text.shape[1])
        latents, text = batch.latents_BCTHW.to(self.device), batch.text_BLD.to(self.device)
        if s.prompt_dropout > 0:
            dropped = self.uniform((), f"{role} dropout", update) < s.prompt_dropout
            text = torch.where(dropped[:, None, None], self.null_text, text)
        return latents, text

    def rollout(self, role: str, update: int, shape: Sequence[int]) -> Rollout:
        """Times (N, B) and noises (N, B, ...) of a rollout; N = 1, 2, ... N_max takes turns over a role's updates."""
        s = self.settings
        steps = update % s.max_rollout + 1
        if s.rollout_times is None:
            drawn = self.dmd_time.quantile(self.uniform((steps,), f"{role} rollout time", update))
            times = rollout_times(drawn.T)
        else:
            fixed = torch.tensor([math.pi / 2, *s.rollout_times][:steps], dtype=torch.float64, device=self.device)
            times = fixed[:, None].expand(-1, len(self.positions))
        return Rollout(times, self.normal((steps, *shape), f"{role} rollout noise", update).transpose(0, 1))

    def normal(self, shape: Sequence[int], purpose: str, update: int) -> Tensor:
        drawn = randomness.normal(
            tuple(shape), seed=self.settings.seed, purpose=purpose, step=update, indices=self.positions
        )
        return drawn.to(self.device)

    def uniform(self, shape: Sequence[int], purpose: str, update: int) -> Tensor:
        drawn = randomness.uniform(
            tuple(shape), seed=self.settings.seed, purpose=purpose, step=update, indices=self.positions
        )
        return drawn.to(self.device)


class Distillation:
    """Networks, optimisers, average and counters of a run, and its two kinds of update."""

    def __init__(
        self, settings: Settings, student: nn.Module, fake: nn.Module | None, teacher: nn.Module, batches: Batches
    ):
        schedule = settings.schedule
        if schedule.critic_updates and fake is None:
            raise ValueError(f"objective {settings.name} needs a fake score")
        self.settings, self.schedule, self.batches = settings, schedule, batches
        self.teacher = Wrapped(teacher.requires_grad_(False))
        self.student = Learner(student, settings.student_lr, settings.student_updates, settings)
        self.critic = Learner(fake, settings.critic_lr, schedule.critic_updates, settings) if fake is not None else None
        self.ema = PowerEMA(student, settings.ema)

    def step(self, iteration: int) -> dict[str, Any]:
        """One update of the student or the critic; returns its figures."""
        return self.student_step() if self.schedule.is_student(iteration) else self.critic_step()

    def student_step(self) -> dict[str, Any]:
        """Descend scm_weight · L_sCM + dmd_weight · L_DMD (DMD once it has joined), then average the weights."""
        s, update = self.settings, self.student.updates
        latents, text = self.batches.samples("student", update)
        row: dict[str, Any] = {"role": "student", "update": update + 1}
        if s.scm_weight > 0:
            warmup = min(1.0, (update + 1) / s.tangent_warmup) if s.tangent_warmup else 1.0
            loss, figures = self._scm(update, latents, text, warmup)
            (s.scm_weight * loss).backward()
            row |= {"scm_loss": loss, **figures, "warmup": warmup}
        if s.dmd_weight > 0 and update >= self.schedule.sole:
            loss, figures = self._dmd(update, latents, text)
            (s.dmd_weight * loss).backward()
            row |= {"dmd_loss": loss, **figures}
            if s.scm_weight > 0:
                row["balance"] = balance(s.dmd_weight / s.scm_weight, latents[0].numel())
        row |= self.student.update()
        self.ema.step(self.student.updates)
        return row

    def _scm(self, update: int, latents: Tensor, text: Tensor, warmup: float) -> tuple[Tensor, dict[str, Tensor]]:
        s, b = self.settings, self.batches
        return scm_loss(
            self.student.wrapped,
            self.teacher,
            latents,
            b.normal(latents.shape[1:], "student scm noise", update),
            b.scm_time.quantile(b.uniform((), "student scm time", update)),
            text,
            b.null_text,
            guidance=s.guidance,
            warmup=warmup,
            tangent_constant=s.tangent_constant,
        )

    def _dmd(self, update: int, latents: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.critic is not None
        s, b = self.settings, self.batches
        return dmd_loss(
            self.student.wrapped,
            self.critic.wrapped,
            self.teacher,
            b.rollout("student", update, latents.shape[1:]),
            b.normal(latents.shape[1:], "student dmd noise", update),
            b.dmd_time.quantile(b.uniform((), "student dmd time", update)),
            text,
            b.null_text,
            guidance=s.guidance,
        )

    def critic_step(self) -> dict[str, Any]:
        """Fit the fake score to samples of the student."""
        assert self.critic is not None
        b, update = self.batches, self.critic.updates
        latents, text = b.samples("critic", update)
        loss, figures = critic_loss(
            self.critic.wrapped,
            self.student.wrapped,
            b.rollout("critic", update, latents.shape[1:]),
            b.normal(latents.shape[1:], "critic noise", update),
            b.dmd_time.quantile(b.uniform((), "critic time", update)),
            text,
        )
        loss.backward()
        return {"role": "critic", "update": update + 1, "critic_loss": loss, **figures} | self.critic.update()

    def state_dict(self) -> dict[str, Any]:
        critic = {"critic": self.critic.state_dict()} if self.critic else {}
        return {"student": self.student.state_dict(), "ema": self.ema.state_dict()} | critic

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.ema.load_state_dict(state["ema"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])


def distill(
    config: Mapping[str, Any],
    *,
    student: nn.Module,
    teacher: nn.Module,
    fake: nn.Module | None,
    data: LatentDataset,
    null_text: Tensor,
    resume_dir: Path,
    metrics_path: Path,
    preview: Callable[[int, Callable[..., Tensor]], None] | None = None,
    advance: Callable[[int, str], None] | None = None,
    positions: Sequence[int] | None = None,
) -> None:
    """Train `student`, which carries the averaged weights on return; continues the run in `resume_dir`, if any.

    config      plain tree with `seed`, `objective`, `distillation` (see `Settings`) and optionally `inputs`, hashes of
                what the run starts from; a state of another config is refused
    fake        the fake score, initialised from the teacher; None will do for sCM
    null_text   (1, L, D), the empty prompt
    metrics_path  JSON lines, one an iteration, written when the run is complete (until then in `resume_dir`)
    preview     called every `preview_every` student updates with (update, denoiser of the averaged weights)
    advance     called with (iterations done, note) for a progress bar
    positions   which samples of the global batch this process computes; all by default

    The state stays in `resume_dir`; `remove_states` drops it once the result is safe. On SIGINT or SIGTERM the state is
    saved and SystemExit(EXIT_INTERRUPTED) raised. Raises UserError for settings that are impossible.
    """
    settings = Settings.of(config)
    identity = {**settings.identity(), "inputs": dict(config.get("inputs", {}))}
    device = next(student.parameters()).device
    batches = Batches(data, null_text, settings, range(settings.batch) if positions is None else positions, device)
    run = Distillation(settings, student, fake, teacher, batches)
    done = 0
    if (found := load_state(resume_dir, identity)) is not None:
        done, state = found
        run.load_state_dict(state)
    if advance is not None:
        advance(done, "")
    log = MetricsLog(resume_dir / "metrics.jsonl", step=done, wandb=settings.wandb, config=identity)
    with _caught_signals() as caught:
        for iteration in range(done + 1, settings.schedule.iterations + 1):
            start = time.perf_counter()
            row = _numbers(run.step(iteration))
            seconds = time.perf_counter() - start
            log.write(iteration, {**row, "wall": {"seconds": seconds, "samples_per_second": settings.batch / seconds}})
            if advance is not None:
                advance(1, _note(row))
            if preview is not None and _is_due(row, settings.preview_every):
                with run.ema.applied(), torch.no_grad():
                    preview(row["update"], run.student.wrapped.denoise)
            if caught or iteration % settings.state_every == 0 or iteration == settings.schedule.iterations:
                log.flush()
                save_state(resume_dir, iteration, run.state_dict(), identity)
            if caught:
                _leave(iteration, settings.schedule.iterations, resume_dir)
    log.close()
    with atomic_file(metrics_path) as path:
        shutil.copyfile(resume_dir / "metrics.jsonl", path)
    run.ema.copy_to_network()


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The row with every tensor as a number, fetched from the device at once."""
    tensors = {key: value.detach().double() for key, value in row.items() if isinstance(value, Tensor)}
    if not tensors:
        return row
    return {**row, **dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))}


def _note(row: Mapping[str, Any]) -> str:
    """The losses of a row, for a progress bar."""
    return ", ".join(f"{key} {row[key]:.3g}" for key in ("scm_loss", "dmd_loss", "critic_loss") if key in row)


def _is_due(row: Mapping[str, Any], every: int) -> bool:
    return every > 0 and row["role"] == "student" and row["update"] % every == 0


def _leave(iteration: int, iterations: int, resume_dir: Path) -> None:
    print(
        f"interrupted: the state after iteration {iteration} of {iterations} is in {resume_dir}, "
        "run the same command again to continue",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(EXIT_INTERRUPTED)


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are put into; the second of a kind acts as it did before."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, _frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
