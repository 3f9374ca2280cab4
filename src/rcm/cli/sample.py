"""The stage `sample`: pictures or clips of a suite of prompts, in GenEval's folder layout."""

import json
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rcm.artefact import UserError, atomic_folder, recording
from rcm.cli.config import compose
from rcm.cli.models import Job, Student, Teacher, codec, jobs_of, placed, student, teacher
from rcm.cli.pictures import encode, frame_rate
from rcm.cli.progress import Progress
from rcm.codecs import CellCodec, from_pixels, to_pixels
from rcm.data import world
from rcm.data.prompt_files import read_prompt_file
from rcm.data.prompts import Metadata

Maker = Callable[[Sequence[Job]], np.ndarray]  # jobs -> frames, uint8 (B, T, H, W, 3)


def sample(arguments: Namespace) -> None:
    """Sample every prompt of one part as often as the suite says."""
    config = compose(arguments.overrides)
    suite, batch = config["suites"][config["suite"]], config["inference"]["batch"]
    of_teacher = arguments.checkpoint is not None and arguments.checkpoint.is_dir()
    sections = ("frames", "height", "width", "codec", *(("network", "text", "teacher") if of_teacher else ()))
    numbers = {key: config[key] for key in sections}
    numbers |= {"samples": suite["samples"], "steps": arguments.steps, "part": arguments.part}
    numbers |= {"control": arguments.control}
    given = (arguments.checkpoint, arguments.codec, arguments.prompts, arguments.text)
    inputs = [path for path in given if path is not None]
    with recording(arguments.out, stage="sample", inputs=inputs, config=numbers, seed=suite["seed"]) as facts:
        captions = read_prompt_file(arguments.prompts)
        make = _maker(arguments, config, captions, suite["seed"])
        jobs = jobs_of(arguments.part, len(captions), suite["samples"])
        seconds, suffix, rate = 0.0, f".{config['inference']['format']}", frame_rate(config["codec"])
        with atomic_folder(arguments.out) as folder, Progress("sample", len(jobs), "samples") as progress:
            for start in range(0, len(jobs), batch):
                chosen = jobs[start : start + batch]
                began = time.perf_counter()
                made = make(chosen)
                seconds += time.perf_counter() - began
                for job, frames in zip(chosen, made, strict=True):
                    _write(folder, job, captions[job[0]], encode(frames, suffix, rate=rate), suffix)
                progress.advance(len(chosen))
        facts |= {"samples": len(jobs), "sampling_seconds": round(seconds, 3)}


def _write(folder: Path, job: Job, caption: Metadata, content: bytes, suffix: str) -> None:
    """Write one sample as `00012/samples/0003.png`, beside it the caption as GenEval's evaluator expects it."""
    of_prompt = folder / f"{job[0]:05d}"
    (of_prompt / "samples").mkdir(parents=True, exist_ok=True)
    if job[1] == 0:
        (of_prompt / "metadata.jsonl").write_text(json.dumps(caption) + "\n", encoding="utf-8")
    (of_prompt / "samples" / f"{job[1]:04d}{suffix}").write_bytes(content)


def _maker(arguments: Namespace, config: Mapping[str, Any], captions: Sequence[Metadata], seed: int) -> Maker:
    """What makes the frames: a student, the teacher, or a control."""
    if arguments.control == "oracle":
        return lambda jobs: _truth(captions, jobs, config["frames"], seed)
    if arguments.control == "shuffled":
        return lambda jobs: _truth(captions, _shuffled(captions, jobs, seed), config["frames"], seed)
    decoder = codec(config["codec"], arguments.codec, device=config["inference"]["device"])
    if arguments.control == "codec":
        return lambda jobs: _decoded(
            decoder, decoder.encode(from_pixels(_truth(captions, jobs, config["frames"], seed)))
        )
    if arguments.checkpoint.is_dir():
        model = teacher(config, arguments.checkpoint, arguments.text)
        if arguments.steps != config["teacher"]["steps"]:
            raise UserError(f"--steps is {arguments.steps}, but the teacher takes {config['teacher']['steps']} steps")
        return lambda jobs: _decoded(decoder, model.sample(_text(model, captions, jobs), jobs, seed=seed))
    few = student(arguments.checkpoint, arguments.text, **placed(config))
    if (makes := _size(few.settings)) != (wanted := _size(config)):
        raise UserError(f"{arguments.checkpoint} makes samples of {makes}, but the experiment of {wanted}")
    if few.settings["codec"] != config["codec"]:
        made, here = (json.dumps(settings["codec"]) for settings in (few.settings, config))
        raise UserError(f"{arguments.checkpoint} was made for the codec {made}, but the experiment has {here}")
    few.times(arguments.steps)  # before any work is done
    steps = arguments.steps
    return lambda jobs: _decoded(decoder, few.sample(_text(few, captions, jobs), jobs, steps=steps, seed=seed))


def _size(settings: Mapping[str, Any]) -> str:
    return f"{settings['frames']} frames of {settings['width']} x {settings['height']} pixels"


def _text(model: Student | Teacher, captions: Sequence[Metadata], jobs: Sequence[Job]) -> Tensor:
    """The encoded prompts (B, L, D) of the jobs."""
    return model.encoder.encode([captions[prompt]["prompt"] for prompt, _ in jobs])


@torch.no_grad()
def _decoded(decoder: Any, latents_BCTHW: Tensor) -> np.ndarray:
    """Frames of a batch, sample by sample where a codec takes far more memory than a network.

    The tiny codec takes none, and rounds otherwise one by one.
    """
    at_once = len(latents_BCTHW) if isinstance(decoder, CellCodec) else 1
    return np.concatenate([to_pixels(decoder.decode(latents)) for latents in latents_BCTHW.split(at_once)])


def _truth(captions: Sequence[Metadata], jobs: Sequence[Job], frames: int, seed: int) -> np.ndarray:
    """Ground truth: a scene of each job's caption, drawn by seed and job."""
    try:
        scenes = [world.sample_scene(captions[p], np.random.default_rng([seed, p, s])) for p, s in jobs]
        return np.stack([world.render(scene, frames) for scene in scenes])
    except ValueError as error:
        raise UserError(f"no ground truth for these prompts: {error}") from error


def _shuffled(captions: Sequence[Metadata], jobs: Sequence[Job], seed: int) -> list[Job]:
    """For each job one of another prompt, whose caption differs."""
    moved = []
    for prompt, sample_number in jobs:
        others = [k for k, caption in enumerate(captions) if caption["prompt"] != captions[prompt]["prompt"]]
        if not others:
            raise UserError("the control `shuffled` needs at least two different prompts")
        rng = np.random.default_rng([seed, prompt, sample_number, 1])
        moved.append((others[rng.integers(len(others))], sample_number))
    return moved
