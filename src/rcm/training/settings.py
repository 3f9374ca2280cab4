"""The numbers of a distillation, read from the configuration and checked for what cannot be."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rcm.artefact import UserError
from rcm.objectives.scm import TANGENT_PASSES
from rcm.parallel import RECOMPUTE

from .schedule import Schedule

METHODS = ("scm", "dcm", "meanflow", "dmd", "dmd2", "rcm")
CONSISTENCY = ("scm", "dcm", "meanflow")


@dataclass(frozen=True)
class Settings:
    """Sections `objective` and `distillation` of the configuration, and its `seed`."""

    seed: int
    student_updates: int  # length of the run, equal for all methods; the paper counts student and critic together
    batch: int  # samples of an update, over all processes
    guidance: float  # s of the teacher's velocity
    guidance_form: str  # unconditional: F_u + s (F_c - F_u); conditional: F_c + s (F_c - F_u)
    prompt_dropout: float  # share of prompts replaced by the empty one
    # the loss
    name: str  # one of METHODS: must agree with the weights
    consistency: str | None  # which consistency loss is weighed, one of CONSISTENCY
    consistency_weight: float
    dmd_weight: float  # lambda, where consistency_weight is 1; `balance` in the metrics is lambda sqrt(D)
    gan_weight: float  # DMD2's adversarial loss
    discriminator: Mapping[str, Any]  # DMD2's branch: layers, heads, critic_weight
    scm_time: Mapping[str, Any]  # p_G, times of sCM and MeanFlow: a distribution of rcm.flow
    dmd_time: Mapping[str, Any]  # p_D, times of the DMD and critic losses and of random rollouts
    derivative: str  # of F_- along the trajectory: exact, semi_continuous or discrete
    derivative_step: float  # delta of the finite differences, radians
    tangent_constant: float  # c in g / (||g|| + c)
    tangent_normalisation: str  # norm: g / (||g|| + c); squared_norm: g / (||g||^2 + c)
    tangent_warmup_terms: str  # what the warm-up ratio multiplies: both terms, or position alone
    dcm_steps: int  # dCM's grid: steps, shift, and how many steps lie between the two times of a pair
    dcm_shift: float
    dcm_skip: int
    max_rollout: int  # N_max
    rollout_steps: str  # N of a rollout: cycle (1, 2, ... N_max take turns) or random
    rollout_times: Sequence[float] | None  # times behind pi/2 of the student's rollouts; null: drawn from p_D
    # phases; consistency alone has the first only, DMD alone starts with the critic's
    tangent_warmup: int  # H: student updates by the consistency loss alone, in which the tangent's weight rises to 1
    scm_only: int  # rCM: further student updates by the consistency loss alone, before DMD joins
    critic_warmup: int  # critic updates on the student's rollouts before DMD joins
    student_every: int  # F: afterwards every F-th iteration is the student's, the others are the critic's
    phase: str  # whose turn it is: after_warmup, paper or reference (see `Schedule`)
    # optimisers: AdamW for each network, no clipping
    optimizer: str  # auto, torch or transformer_engine
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
    profile: Sequence[int] | None  # first and last iteration of a profiler's trace
    wandb: str  # disabled, offline or online

    def __post_init__(self) -> None:
        self._check_weights()
        if self.name == "rcm" and self.tangent_warmup + self.scm_only >= self.student_updates:
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
        _check_choices(self, _CHOICES, "distillation")

    def _check_weights(self) -> None:
        acting = self.consistency_weight > 0, self.dmd_weight > 0, self.gan_weight > 0
        expected = {"dmd": (False, True, False), "dmd2": (False, True, True), "rcm": (True, True, False)}
        alone = self.name in CONSISTENCY and self.consistency == self.name
        if acting != (expected.get(self.name) or (alone, False, False)) or (acting[0] and self.consistency is None):
            raise UserError(
                f"objective {self.name} does not have consistency {self.consistency} with consistency_weight "
                f"{self.consistency_weight:g}, dmd_weight {self.dmd_weight:g} and gan_weight {self.gan_weight:g}"
            )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Settings":
        """Read the sections; raises UserError for keys that are unknown or missing."""
        given = {"seed": config["seed"], **config["distillation"], **config["objective"]}
        return cls(**_exactly(cls, given, "the sections objective and distillation"))

    def identity(self) -> dict[str, Any]:
        """The settings on which the result depends."""
        free = ("state_every", "preview_every", "profile", "wandb")
        return {key: value for key, value in asdict(self).items() if key not in free}

    @property
    def schedule(self) -> Schedule:
        if self.dmd_weight == 0:
            return Schedule(self.student_updates, sole=self.student_updates)
        sole = self.tangent_warmup + self.scm_only if self.consistency_weight > 0 else 0
        return Schedule(self.student_updates, sole, self.critic_warmup, self.student_every, self.phase)


_CHOICES = {
    "guidance_form": ("unconditional", "conditional"),
    "derivative": ("exact", "semi_continuous", "discrete"),
    "tangent_normalisation": ("norm", "squared_norm"),
    "tangent_warmup_terms": ("both", "position"),
    "rollout_steps": ("cycle", "random"),
    "phase": ("after_warmup", "paper", "reference"),
    "optimizer": ("auto", "torch", "transformer_engine"),
    "lr_decay": ("constant", "cosine"),
}


@dataclass(frozen=True)
class Parallel:
    """Section `parallel`: how the processes share the work; changes no result beyond rounding, except `precision`."""

    replicate: int = 1
    shard: int | None = None  # null: all processes that remain
    context: int = 1
    recompute: str = "none"  # what the backward pass computes again: none, blocks or matmuls
    tangent_pass: str = "shared"  # sCM: tangent and gradient from one forward pass, or separate
    precision: str = "float32"  # of the parameters in forward and backward: float32 or bfloat16
    micro_batch: int | None = None  # samples that a process takes at once; null: all of its own
    offload_teacher: bool = False
    compile: bool = False
    workers: int = 0  # threads that read batches ahead
    timeout: float = 600  # seconds after which ranks that wait for another one give up
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one

    def __post_init__(self) -> None:
        _check_choices(self, _PARALLEL_CHOICES, "parallel")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Parallel":
        """Read the section; raises UserError for keys that are unknown or missing."""
        return cls(**_exactly(cls, config["parallel"], "the section parallel"))


_PARALLEL_CHOICES = {
    "recompute": RECOMPUTE,
    "tangent_pass": TANGENT_PASSES,
    "precision": ("float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
}


def _check_choices(settings: Any, choices: Mapping[str, Sequence[str]], section: str) -> None:
    for key, allowed in choices.items():
        if (given := getattr(settings, key)) not in allowed:
            raise UserError(f"{section}.{key} is {given!r}; allowed: {' or '.join(allowed)}")


def _exactly(cls: Any, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = {field.name for field in fields(cls)}
    for problem, keys in (("unknown", given.keys() - known), ("missing", known - given.keys())):
        if keys:
            raise UserError(f"{problem} in {where}: {', '.join(sorted(keys))}")
    return dict(given)
