"""The two kinds of update of a distillation: the student's and the critic's.

A rank takes its share of the global batch in micro-batches; each is back-propagated at once, so that one graph is in
memory at a time, and gradients add up: over micro-batches here, over ranks in FSDP. Every loss is therefore a sum over
the samples at hand, divided by the global batch.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rcm.data.shards import Batch
from rcm.flow import Wrapped
from rcm.objectives import (
    adversarial_critic_loss,
    adversarial_loss,
    balance,
    critic_loss,
    dcm_loss,
    dcm_times,
    dmd_loss,
    meanflow_loss,
    roll_out,
    scm_loss,
)
from rcm.parallel import COUNTER, constant_weights

from .batches import Draws
from .ema import PowerEMA
from .learner import Learner
from .settings import Settings

Row = dict[str, Any]


class Distillation:
    """Networks, optimisers, average and counters of a run, and its updates.

    `draws` are those of each micro-batch of this rank. `feeds` give the samples of this rank's share, update by
    update, for student and critic; they are set before the first update.
    """

    def __init__(
        self,
        settings: Settings,
        student: nn.Module,
        fake: nn.Module | None,
        teacher: nn.Module,
        draws: list[Draws],
        *,
        tangent_pass: str = "shared",
    ):
        schedule = settings.schedule
        if schedule.critic_updates and fake is None:
            raise ValueError(f"objective {settings.name} needs a fake score")
        self.settings, self.schedule, self.draws, self.tangent_pass = settings, schedule, draws, tangent_pass
        self.teacher = Wrapped(teacher.requires_grad_(False))
        self.student = Learner(student, settings.student_lr, settings.student_updates, settings)
        self.critic = Learner(fake, settings.critic_lr, schedule.critic_updates, settings) if fake is not None else None
        self.ema = PowerEMA(student, settings.ema)
        self.learners = {"student": self.student} | ({"critic": self.critic} if self.critic else {})
        self.feeds: dict[str, Iterator[Batch]] = {}

    def step(self, iteration: int) -> tuple[Row, dict[str, Tensor]]:
        """One update: what is known of it, and sums over this rank's samples (losses are divided by the batch)."""
        return self.student_step() if self.schedule.is_student(iteration) else self.critic_step()

    def student_step(self) -> tuple[Row, dict[str, Tensor]]:
        """Descend consistency_weight L + dmd_weight L_DMD + gan_weight L_GAN (once DMD has joined), then average."""
        s, update, sums = self.settings, self.student.updates, _Sums()
        joined = s.dmd_weight > 0 and update >= self.schedule.alone
        row: Row = {"role": "student", "update": update + 1}
        if s.consistency_weight > 0:
            row["warmup"] = min(1.0, (update + 1) / s.tangent_warmup) if s.tangent_warmup else 1.0
        for draws, latents, text in self._micro_batches("student", update):
            if s.consistency_weight > 0:
                with COUNTER.part(str(s.consistency), len(latents)):
                    loss, figures = self._consistency(draws, update, latents, text, row["warmup"])
                    (s.consistency_weight * loss).backward()
                sums.add({f"{s.consistency}_loss": loss, **figures})
            if joined:
                with COUNTER.part("dmd", len(latents)):
                    loss, figures = self._distribution(draws, update, latents, text)
                    loss.backward()
                sums.add(figures)
        if joined and s.consistency_weight > 0:
            row["balance"] = balance(s.dmd_weight / s.consistency_weight, latents[0].numel())
        row |= self.student.update()
        self.ema.step(self.student.updates)
        return row, sums.total

    def _consistency(
        self, draws: Draws, update: int, latents: Tensor, text: Tensor, warmup: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        s, purpose = self.settings, "student scm time"
        noise = draws.normal(latents.shape[1:], "student scm noise", update)
        networks, common = (self.student.wrapped, self.teacher, latents, noise), self._guidance
        if s.consistency == "dcm":
            times = dcm_times(draws.uniform((), purpose, update), steps=s.dcm_steps, shift=s.dcm_shift, skip=s.dcm_skip)
            return dcm_loss(*networks, times, text, draws.null_text, **common)
        common |= {
            "warmup": warmup,
            "tangent_constant": s.tangent_constant,
            "tangent_normalisation": s.tangent_normalisation,
            "tangent_warmup_terms": s.tangent_warmup_terms,
            "derivative": s.derivative,
            "derivative_step": s.derivative_step,
            "tangent_pass": self.tangent_pass,
        }
        if s.consistency == "meanflow":
            s_B, t_B = draws.scm_time.quantile(draws.uniform((2,), purpose, update)).sort(dim=1).values.unbind(1)
            return meanflow_loss(*networks, t_B, s_B, text, draws.null_text, **common)
        t_B = draws.scm_time.quantile(draws.uniform((), purpose, update))
        return scm_loss(*networks, t_B, text, draws.null_text, **common)

    @property
    def _guidance(self) -> dict[str, Any]:
        s = self.settings
        return {"batch": s.batch, "guidance": s.guidance, "guidance_form": s.guidance_form}

    def _distribution(self, draws: Draws, update: int, latents: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """dmd_weight L_DMD + gan_weight L_GAN of one sample of the student for each prompt."""
        assert self.critic is not None
        s, fake = self.settings, self.critic.wrapped
        rollout = draws.rollout("student", update, latents.shape[1:])
        x0 = roll_out(self.student.wrapped, rollout, text, grad_last=True)
        noise = draws.normal(latents.shape[1:], "student dmd noise", update)
        t_B = draws.dmd_time.quantile(draws.uniform((), "student dmd time", update))
        loss, figures = dmd_loss(x0, fake, self.teacher, noise, t_B, text, draws.null_text, **self._guidance)
        figures = {"dmd_loss": loss, **figures}
        weighted = s.dmd_weight * loss
        if s.gan_weight > 0:
            # the gradient passes through the fake score, whose own weights must not collect any
            x = x0.detach().requires_grad_()
            with constant_weights():
                gan, more = adversarial_loss(x, fake, noise, t_B, text, batch=s.batch)
            (gradient,) = torch.autograd.grad(gan, x)
            weighted = weighted + s.gan_weight * (x0 * gradient).sum()
            figures |= {"gan_loss": gan, **more}
        return weighted, figures

    def critic_step(self) -> tuple[Row, dict[str, Tensor]]:
        """Fit the fake score to samples of the student, and DMD2's branch to tell them from the data."""
        assert self.critic is not None
        s, update, sums = self.settings, self.critic.updates, _Sums()
        for draws, latents, text in self._micro_batches("critic", update):
            with COUNTER.part("critic", len(latents)):
                rollout = draws.rollout("critic", update, latents.shape[1:])
                x0 = roll_out(self.student.wrapped, rollout, text, grad_last=False)
                noise = draws.normal(latents.shape[1:], "critic noise", update)
                t_B = draws.dmd_time.quantile(draws.uniform((), "critic time", update))
                if s.gan_weight > 0:
                    loss, figures = adversarial_critic_loss(
                        x0, latents, self.critic.wrapped, noise, t_B, text,
                        batch=s.batch, critic_weight=s.discriminator["critic_weight"],
                    )  # fmt: skip
                else:
                    loss, figures = critic_loss(x0, self.critic.wrapped, noise, t_B, text, batch=s.batch)
                loss.backward()
            sums.add({"critic_loss": loss, **figures})
        return {"role": "critic", "update": update + 1} | self.critic.update(), sums.total

    def _micro_batches(self, role: str, update: int) -> Iterator[tuple[Draws, Tensor, Tensor]]:
        """Draws, latents (B, C, T, H, W) and text (B, L, D) of each; some prompts are dropped."""
        batch, first = next(self.feeds[role]), 0
        for draws in self.draws:
            mine = slice(first, first := first + len(draws.positions))
            latents, text = (x[mine].to(draws.device, non_blocking=True) for x in (batch.latents_BCTHW, batch.text_BLD))
            yield draws, latents, draws.drop(text, role, update)

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, in the memory where it is used."""
        return {"ema": self.ema.average} | {role: learner.state() for role, learner in self.learners.items()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, whose tensors have been filled."""
        for role, learner in self.learners.items():
            learner.resume(state[role]["updates"])


class _Sums:
    """Figures of micro-batches, added up."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        for key, value in figures.items():
            value = value.detach().double()
            self.total[key] = self.total[key] + value if key in self.total else value
