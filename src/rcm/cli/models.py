"""What several stages open: networks and codecs from configuration and checkpoint, and how they are sampled.

A job is one sample: the number of its prompt in the file, and its number among the samples of that prompt. Its noise
follows from seed and job alone, so that it is the same for every model, whatever part or batch it is drawn in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rcm.codecs
import rcm.networks
import rcm.text
from rcm.artefact import UserError
from rcm.checkpoints import State, load_dcp, load_into, load_pth, read_export
from rcm.data import world
from rcm.data.shards import part_indices
from rcm.flow import Wrapped, guided
from rcm.randomness import normal
from rcm.sampling import consistency_sample, euler_sample, few_step_times

Job = tuple[int, int]

SAMPLES_PER_PROMPT = 2**16  # at most: sample s of prompt p has the index p * 2**16 + s


def jobs_of(part: str, prompts: int, samples: int) -> list[Job]:
    """The jobs of part K-of-N: every N-th prompt, all of its samples."""
    return [(prompt, sample) for prompt in part_indices(part, prompts) for sample in range(samples)]


def noise_of(jobs: Sequence[Job], shape: Sequence[int], *, seed: int, step: int = 0) -> Tensor:
    """Noise (B, ...) of the jobs; `step` counts the noises of a few-step sampler, 0 is the initial one."""
    indices = [prompt * SAMPLES_PER_PROMPT + sample for prompt, sample in jobs]
    return normal(shape, seed=seed, purpose="sample", step=step, indices=indices)


def latent_shape(settings: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latents of one sample."""
    codec, cells = settings["codec"], world.SIZE // settings["codec"]["cell"]
    return codec["channels"], 1 + (settings["frames"] - 1) // codec["stride"], cells, cells


def network(settings: Mapping[str, Any], state: State, where: Path) -> nn.Module:
    """The network of a configuration with the weights of a checkpoint, for inference."""
    try:
        built = rcm.networks.build(settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"the network of {where} cannot be built: {error}") from error
    load_into(built, state, str(where))
    return built.eval().requires_grad_(False)


def codec(settings: Mapping[str, Any], path: Path) -> Any:
    """The codec of a configuration with the weights of a `.pth`."""
    built = rcm.codecs.build(settings)
    load_into(built, load_pth(path), str(path))
    return built.eval().requires_grad_(False)


@dataclass(frozen=True)
class Teacher:
    """A rectified-flow teacher, sampled with guidance by Euler steps as the section `teacher` says."""

    network: nn.Module
    encoder: Any
    settings: Mapping[str, Any]

    @torch.no_grad()
    def sample(self, text_BLD: Tensor, jobs: Sequence[Job], *, seed: int) -> Tensor:
        """Latents (B, C, T, H, W) of the jobs."""
        sampler = dict(self.settings["teacher"])
        guidance, null_text = sampler.pop("guidance"), self.encoder.encode([""])
        velocity = Wrapped(self.network).rf_velocity
        return euler_sample(
            lambda x, r: guided(velocity, x, r, text_BLD, null_text, guidance),
            noise_of(jobs, latent_shape(self.settings), seed=seed),
            **sampler,
        )


def teacher(config: Mapping[str, Any], folder: Path) -> Teacher:
    """Open a teacher in a DCP folder."""
    return Teacher(network(config["network"], load_dcp(folder), folder), rcm.text.build(config["text"]), config)


@dataclass(frozen=True)
class Student:
    """A few-step student; `settings` are those exported with it."""

    network: nn.Module
    encoder: Any
    settings: Mapping[str, Any]

    def times(self, steps: int) -> list[float]:
        """The sampler's trig times, or UserError where the student has none for so many steps."""
        try:
            return few_step_times(**self.settings["sampler"], steps=steps)
        except ValueError as error:
            raise UserError(str(error)) from error

    @torch.no_grad()
    def sample(self, text_BLD: Tensor, jobs: Sequence[Job], *, steps: int, seed: int) -> Tensor:
        """Latents (B, C, T, H, W) of the jobs."""
        wrapped, shape = Wrapped(self.network), latent_shape(self.settings)
        noises = [noise_of(jobs, shape, seed=seed, step=k) for k in range(steps)]
        return consistency_sample(lambda x, t: wrapped.denoise(x, t, text_BLD), self.times(steps), noises)


EXPORTED = ("media", "frames", "network", "codec", "text", "sampler")  # sections that an export carries


def student(path: Path) -> Student:
    """Open an exported student."""
    state, settings = read_export(path)
    if lacking := [key for key in EXPORTED if key not in settings]:
        raise UserError(f"{path} does not say its {', '.join(lacking)}; export the student again with `rcm export`")
    return Student(network(settings["network"], state, path), rcm.text.build(settings["text"]), settings)
