"""What several stages open: networks and codecs from configuration and checkpoint, and how they are sampled.

A job is one sample: the number of its prompt in the file, and its number among the samples of that prompt. Its noise
follows from seed and job alone, so that it is the same for every model, whatever part or batch it is drawn in.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rcm.codecs
import rcm.networks
import rcm.text
from rcm.artefact import UserError
from rcm.checkpoints import load_weights, read_settings
from rcm.data.shards import part_indices
from rcm.flow import Wrapped, guided
from rcm.parallel.gpu import own_gpu
from rcm.randomness import normal
from rcm.sampling import consistency_sample, few_step_times, teacher_sample

Job = tuple[int, int]

SAMPLES_PER_PROMPT = 2**16  # at most: sample s of prompt p has the index p * 2**16 + s


def jobs_of(part: str, prompts: int, samples: int | Sequence[int]) -> list[Job]:
    """The jobs of part K-of-N: every N-th prompt, all of its samples. UserError where these are too many.

    `samples` is how many a prompt has, or for each prompt how many.
    """
    counts = [samples] * prompts if isinstance(samples, int) else samples
    if (most := max(counts, default=0)) > SAMPLES_PER_PROMPT:
        raise UserError(f"{most} samples of a prompt asked for, but it has noise for {SAMPLES_PER_PROMPT}")
    return [(prompt, sample) for prompt in part_indices(part, prompts) for sample in range(counts[prompt])]


def noise_of(jobs: Sequence[Job], shape: Sequence[int], *, seed: int, step: int = 0) -> Tensor:
    """Noise (B, ...) of the jobs; `step` counts the noises of a few-step sampler, 0 is the initial one."""
    indices = [prompt * SAMPLES_PER_PROMPT + sample for prompt, sample in jobs]
    return normal(shape, seed=seed, purpose="sample", step=step, indices=indices)


def latent_shape(settings: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latents of one sample."""
    codec = settings["codec"]
    sides = (settings[name] // codec["cell"] for name in ("height", "width"))
    return codec["channels"], 1 + (settings["frames"] - 1) // codec["stride"], *sides


def device_of(name: str) -> torch.device:
    """The device that `inference.device` names: cpu, cuda (`own_gpu`), or auto, cuda where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("inference.device is cuda, but there is no GPU here; allowed on this machine: cpu or auto")
    return torch.device(name, own_gpu()) if name == "cuda" else torch.device(name)


def device_name(device: torch.device) -> str:
    """What files and tables call a device: the card's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def clock(device: torch.device) -> float:
    """Seconds on a clock, once a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def network(settings: Mapping[str, Any], path: Path, *, device: str = "cpu", precision: str = "float32") -> nn.Module:
    """The network of a configuration with the weights of a checkpoint of any format, for inference.

    In bfloat16 the modules that the network names `precise` stay in float32, as in training.
    """
    try:
        with torch.device("meta"):
            built: Any = rcm.networks.build(settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"the network of {path} cannot be built: {error}") from error
    if precision == "bfloat16":
        built.bfloat16()
        for name in built.precise:
            built.get_submodule(name).float()
    load_weights(built, path, device=device_of(device))
    return built.eval().requires_grad_(False)


def codec(settings: Mapping[str, Any], path: Path, *, device: str = "cpu") -> Any:
    """The codec of a configuration with the weights of a checkpoint."""
    built = rcm.codecs.build(settings)
    load_weights(built, path)
    return built.to(device_of(device)).eval().requires_grad_(False)


def text_encoder(settings: Mapping[str, Any], embeddings: Path | None) -> Any:
    """What encodes prompts: texts encoded before, or the encoder itself where that has no weights."""
    if embeddings is not None:
        return rcm.text.Embeddings(embeddings)
    if settings["text"]["kind"] != "words":
        raise UserError("prompts are encoded before, by `rcm embed`: name its output with --text FILE.safetensors")
    return rcm.text.build(settings["text"])


def bare_text_encoder(settings: Mapping[str, Any], tokenizer: Path | None) -> Any:
    """The text encoder of a section `text` with its tokenizer, and without memory for weights: see `filled`."""
    with torch.device("meta"):
        encoder: Any = rcm.text.build(settings)
    if tokenizer is not None:
        encoder.tokenizer = rcm.text.tokenizer(tokenizer)
    return encoder


def filled(bare: nn.Module, path: Path, place: Mapping[str, str], *, verified: bool = False) -> Any:
    """An encoder of the meta device with the weights of a checkpoint, for inference: see `placed`, `load_weights`."""
    bare.to(getattr(torch, place["precision"]))
    load_weights(bare, path, device=device_of(place["device"]), verified=verified)
    return bare.eval().requires_grad_(False)


def home(network: nn.Module) -> torch.device:
    """Where a network computes; that of its conditions, if any, for one of two experts may wait elsewhere."""
    return next(chain(network.buffers(), network.parameters())).device


@dataclass(frozen=True)
class Teacher:
    """A rectified-flow teacher, sampled with guidance as `sampler` says, a section `teacher` or `synthesis`."""

    network: nn.Module
    encoder: Any
    settings: Mapping[str, Any]
    sampler: Mapping[str, Any]

    @torch.no_grad()
    def sample(
        self, text_BLD: Tensor, jobs: Sequence[Job], *, seed: int, progress: Callable[..., Any] | None = None
    ) -> Tensor:
        """Latents (B, C, T, H, W) of the jobs, on the network's device."""
        words = ("sampler", "steps", "shift", "sigma_max")
        device = home(self.network)
        text = text_BLD.to(device)
        null_text = self.encoder.encode([self.sampler["negative_prompt"]]).to(device)
        velocity = Wrapped(self.network).rf_velocity
        scale, form = self.sampler["guidance"], self.sampler["guidance_form"]
        return teacher_sample(
            lambda x, r: guided(velocity, x, r, text, null_text, scale, form),
            noise_of(jobs, latent_shape(self.settings), seed=seed).to(device),
            progress=progress,
            **{word: self.sampler[word] for word in words},
        )


def teacher(config: Mapping[str, Any], path: Path, text: Path | None = None, *, synthesis: bool = False) -> Teacher:
    """Open a teacher, as the configuration samples it for the tables or for the training data."""
    sizes, sampler = ("synthesizer", "synthesis") if synthesis else ("network", "teacher")
    built = network(config[sizes], path, **placed(config))
    return Teacher(built, text_encoder(config, text), config, config[sampler])


def placed(config: Mapping[str, Any]) -> dict[str, str]:
    """Where and in which precision `inference` has the network."""
    return {key: config["inference"][key] for key in ("device", "precision")}


def times_of(sampler: Mapping[str, Any], steps: int) -> list[float]:
    """The trig times of a section `sampler`; ValueError where it has none for so many steps."""
    return few_step_times(**{key: value for key, value in sampler.items() if key != "ode"}, steps=steps)


@dataclass(frozen=True)
class Student:
    """A few-step student; `settings` are those exported with it."""

    network: nn.Module
    encoder: Any
    settings: Mapping[str, Any]

    def times(self, steps: int) -> list[float]:
        """The sampler's trig times, or UserError where the student has none for so many steps."""
        try:
            return times_of(self.settings["sampler"], steps)
        except ValueError as error:
            raise UserError(str(error)) from error

    @torch.no_grad()
    def sample(self, text_BLD: Tensor, jobs: Sequence[Job], *, steps: int, seed: int) -> Tensor:
        """Latents (B, C, T, H, W) of the jobs, on the network's device."""
        wrapped, shape = Wrapped(self.network), latent_shape(self.settings)
        device = home(self.network)
        text = text_BLD.to(device)
        noises = [noise_of(jobs, shape, seed=seed, step=k).to(device) for k in range(steps)]
        ode = self.settings["sampler"].get("ode", False)
        return consistency_sample(lambda x, t: wrapped.denoise(x, t, text), self.times(steps), noises, ode=ode)


# sections that an export carries
EXPORTED = ("media", "frames", "height", "width", "network", "codec", "text", "sampler")


def student(path: Path, text: Path | None = None, *, device: str = "cpu", precision: str = "float32") -> Student:
    """Open an exported student."""
    settings = read_settings(path)
    if lacking := [key for key in EXPORTED if key not in settings]:
        raise UserError(f"{path} does not say its {', '.join(lacking)}; export the student again with `rcm export`")
    built = network(settings["network"], path, device=device, precision=precision)
    return Student(built, text_encoder(settings, text), settings)


@dataclass(frozen=True)
class Sampling:
    """A model at a number of steps: `draw(text_BLD, jobs, seed=SEED)` gives latents (B, C, T, H, W).

    `facts` are those on which samples depend beside seed and job: sampler, sigma_max, and a student's times.
    """

    model: Student | Teacher
    draw: Callable[..., Tensor]
    facts: Mapping[str, Any]

    def text(self, captions: Sequence[Mapping[str, Any]], jobs: Sequence[Job]) -> Tensor:
        """The encoded prompts (B, L, D) of the jobs."""
        return self.model.encoder.encode([captions[prompt]["prompt"] for prompt, _ in jobs])


def sampling(config: Mapping[str, Any], checkpoint: Path, text: Path | None, *, steps: int) -> Sampling:
    """Open the teacher (a DCP folder) or an exported student, which must fit the experiment, for so many steps."""
    if checkpoint.is_dir():
        section = config["teacher"]
        if steps != section["steps"]:
            raise UserError(f"--steps is {steps}, but the teacher takes {section['steps']} steps")
        slow = teacher(config, checkpoint, text)
        return Sampling(slow, slow.sample, {"sampler": section, "sigma_max": section["sigma_max"], "times": None})
    few = student(checkpoint, text, **placed(config))
    if (makes := _size(few.settings)) != (wanted := _size(config)):
        raise UserError(f"{checkpoint} makes samples of {makes}, but the experiment of {wanted}")
    if few.settings["codec"] != config["codec"]:
        made, here = (json.dumps(settings["codec"]) for settings in (few.settings, config))
        raise UserError(f"{checkpoint} was made for the codec {made}, but the experiment has {here}")
    section = few.settings["sampler"]
    facts = {"sampler": section, "sigma_max": section["sigma_max"], "times": few.times(steps)}
    return Sampling(few, partial(few.sample, steps=steps), facts)


def _size(settings: Mapping[str, Any]) -> str:
    return f"{settings['frames']} frames of {settings['width']} x {settings['height']} pixels"


@torch.no_grad()
def decoded(decoder: Any, latents_BCTHW: Tensor) -> np.ndarray:
    """Frames of a batch, uint8 (B, T, H, W, 3), sample by sample where a codec takes far more memory than a network.

    The tiny codec takes none, and rounds otherwise one by one.
    """
    at_once = len(latents_BCTHW) if isinstance(decoder, rcm.codecs.CellCodec) else 1
    return np.concatenate([rcm.codecs.to_pixels(decoder.decode(latents)) for latents in latents_BCTHW.split(at_once)])
