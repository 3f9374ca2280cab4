"""The stage `sample`: pictures or clips of a suite of prompts, in GenEval's folder layout."""

import json
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcm.artefact import UserError, atomic_folder, recording, verified_sha256
from rcm.cli.config import compose
from rcm.cli.models import Job, codec, decoded, device_of, jobs_of, sampling
from rcm.cli.pictures import encode, frame_rate
from rcm.cli.progress import Progress
from rcm.codecs import from_pixels
from rcm.data import world
from rcm.data.prompt_files import read_prompt_file
from rcm.data.prompts import Metadata

Maker = Callable[[Sequence[Job]], np.ndarray]  # jobs -> frames, uint8 (B, T, H, W, 3)


def sample(arguments: Namespace) -> None:
    """Sample every prompt of one part as often as it says itself, or else the suite."""
    config = compose(arguments.overrides)
    suite, batch = config["suites"][config["suite"]], config["inference"]["batch"]
    of_teacher = arguments.checkpoint is not None and arguments.checkpoint.is_dir()
    sections = ("frames", "height", "width", "codec", *(("network", "text", "teacher") if of_teacher else ()))
    numbers = {key: config[key] for key in sections}
    numbers |= {"samples": suite["samples"], "steps": arguments.steps, "part": arguments.part}
    numbers |= {"control": arguments.control, "suite": config["suite"], "inference": config["inference"]}
    given = (arguments.checkpoint, arguments.codec, arguments.prompts, arguments.text)
    hashes = {path: "" for path in given if path is not None}
    with recording(arguments.out, stage="sample", inputs=hashes, config=numbers, seed=suite["seed"]) as facts:
        hashes |= {path: verified_sha256(path) for path in hashes}
        captions = read_prompt_file(arguments.prompts)
        jobs = jobs_of(arguments.part, len(captions), _counts(arguments.prompts, captions, suite["samples"]))
        make, by = _maker(arguments, config, captions, suite["seed"])
        about = _about(arguments, config, hashes, by)
        seconds, suffix, rate = 0.0, f".{config['inference']['format']}", frame_rate(config["codec"])
        with atomic_folder(arguments.out) as folder, Progress("sample", len(jobs), "samples") as progress:
            (folder / "sampling.json").write_text(
                json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            for start in range(0, len(jobs), batch):
                chosen = jobs[start : start + batch]
                began = time.perf_counter()
                made = make(chosen)
                seconds += time.perf_counter() - began
                for job, frames in zip(chosen, made, strict=True):
                    _write(folder, job, captions[job[0]], encode(frames, suffix, rate=rate), suffix)
                progress.advance(len(chosen))
        facts |= {"samples": len(jobs), "sampling_seconds": round(seconds, 3)}


def _counts(path: Path, captions: Sequence[Metadata], samples: int) -> list[int]:
    """How many samples each prompt has."""
    counts = [caption.get("samples", samples) for caption in captions]
    if wrong := [number for number, count in enumerate(counts) if type(count) is not int or count < 1]:
        raise UserError(
            f"{path}, prompt {wrong[0] + 1}: 'samples' is {counts[wrong[0]]!r}; expected a whole number of 1 or more"
        )
    return counts


def _about(
    arguments: Namespace, config: Mapping[str, Any], hashes: Mapping[Path, str], by: Mapping[str, Any]
) -> dict[str, Any]:
    """What the samples depend on; but for `part` the same in all parts of a suite."""
    return {
        "checkpoint_sha256": hashes.get(arguments.checkpoint),
        **by,
        "steps": arguments.steps,
        "seed": config["suites"][config["suite"]]["seed"],
        "precision": config["inference"]["precision"],
        "prompts_sha256": hashes[arguments.prompts],
        "suite": config["suite"],
        **{key: config[key] for key in ("width", "height", "frames")},
        "part": arguments.part,
    }


def _write(folder: Path, job: Job, caption: Metadata, content: bytes, suffix: str) -> None:
    """Write one sample as `00012/samples/0003.png`, beside it the caption as GenEval's evaluator expects it."""
    of_prompt = folder / f"{job[0]:05d}"
    (of_prompt / "samples").mkdir(parents=True, exist_ok=True)
    if job[1] == 0:
        (of_prompt / "metadata.jsonl").write_text(json.dumps(caption) + "\n", encoding="utf-8")
    (of_prompt / "samples" / f"{job[1]:04d}{suffix}").write_bytes(content)


def _maker(
    arguments: Namespace, config: Mapping[str, Any], captions: Sequence[Metadata], seed: int
) -> tuple[Maker, dict[str, Any]]:
    """What makes the frames, a student, the teacher or a control; and its sampler, its times and the device."""
    control, frames = arguments.control, config["frames"]
    by: dict[str, Any] = {"sampler": None, "sigma_max": None, "times": None, "device": "cpu"}
    if control == "oracle":
        return lambda jobs: _truth(captions, jobs, frames, seed), by
    if control == "shuffled":
        return lambda jobs: _truth(captions, _shuffled(captions, jobs, seed), frames, seed), by
    device = config["inference"]["device"]
    decoder, by["device"] = codec(config["codec"], arguments.codec, device=device), device_of(device).type
    if control == "codec":
        truth = lambda jobs: decoder.encode(from_pixels(_truth(captions, jobs, frames, seed)))  # noqa: E731
        return lambda jobs: decoded(decoder, truth(jobs)), by
    model = sampling(config, arguments.checkpoint, arguments.text, steps=arguments.steps)
    return lambda jobs: decoded(decoder, model.draw(model.text(captions, jobs), jobs, seed=seed)), {**by, **model.facts}


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
