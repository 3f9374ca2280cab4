"""Stages that train: pretrain, distill, and export of what came out."""

import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rcm.codecs
import rcm.networks
import rcm.text
from rcm.artefact import UserError, atomic_file, atomic_folder, beside, content_sha256, recording
from rcm.checkpoints import export_safetensors, load_dcp, load_into, load_pth, save_dcp, save_pth
from rcm.cli.config import compose
from rcm.cli.models import EXPORTED, codec, jobs_of, latent_shape, network, noise_of
from rcm.cli.pictures import grid, png
from rcm.cli.progress import Progress
from rcm.cli.sources import code_digest
from rcm.codecs import to_pixels
from rcm.data.shards import read_shards
from rcm.sampling import consistency_sample, few_step_times
from rcm.training.state import remove_states

PREVIEW_COLUMNS = 6  # samples of each prompt in a preview


def pretrain(arguments: Namespace) -> None:
    """Train a teacher on scenes of the tiny world, from where an earlier call was stopped."""
    from rcm.training.pretrain import draw_world
    from rcm.training.pretrain import pretrain as train

    config = compose(arguments.overrides)
    numbers = {key: config[key] for key in ("media", "frames", "network", "codec", "text", "prompts", "pretrain")}
    inputs = [arguments.codec] if arguments.codec is not None else []
    outputs, seed = (arguments.out, arguments.codec_out), config["pretrain"]["seed"]
    with recording(*outputs, stage="pretrain", inputs=inputs, config=numbers, seed=seed):
        decoder, encoder = rcm.codecs.build(config["codec"]), rcm.text.build(config["text"])
        if arguments.codec is not None:
            load_into(decoder, load_pth(arguments.codec), str(arguments.codec))
        scenes = draw_world(config, decoder, encoder)
        save_pth(arguments.codec_out, decoder.state_dict())
        torch.manual_seed(seed)
        teacher = rcm.networks.build(config["network"])
        with Progress("pretrain", config["pretrain"]["iterations"], "iterations") as progress:
            train(
                config,
                teacher,
                scenes,
                resume_dir=arguments.resume,
                metrics_path=arguments.resume / "metrics.jsonl",
                advance=progress.advance,
            )
        save_pth(arguments.out, {name: value.bfloat16() for name, value in teacher.state_dict().items()})
        with atomic_file(beside(arguments.out, ".metrics.jsonl")) as path:
            shutil.copyfile(arguments.resume / "metrics.jsonl", path)
    remove_states(arguments.resume)


def distill(arguments: Namespace) -> None:
    """Distil a teacher on the synthetic data, from where an earlier call was stopped."""
    from rcm.training.distill import Settings
    from rcm.training.distill import distill as train

    config = compose(arguments.overrides)
    numbers = {key: config[key] for key in ("network", "text", "objective", "distillation")}
    inputs = [arguments.teacher, *arguments.data]
    outputs, seed = (arguments.out, arguments.previews), config["seed"]  # metrics hold times, so they have no identity
    with recording(*outputs, stage="distill", inputs=inputs, config=numbers, seed=seed) as facts:
        data = read_shards(arguments.data)
        if data.samples[0].latents_CTHW.shape != latent_shape(config):
            raise UserError(
                f"{arguments.data[0]} holds latents of another shape than this experiment has; make it again"
            )
        shards = [content_sha256(path) for path in arguments.data]
        inputs_of_state = {"teacher": content_sha256(arguments.teacher), "data": shards, "code": code_digest("distill")}
        teacher = network(config["network"], load_dcp(arguments.teacher), arguments.teacher)
        student, fake = (deepcopy(teacher).train().requires_grad_(True) for _ in range(2))
        iterations = Settings.of(config).schedule.iterations
        with Progress("distill", iterations, "iterations") as progress:
            train(
                {**config, "inputs": inputs_of_state},
                student=student,
                teacher=teacher,
                fake=None if config["objective"]["name"] == "scm" else fake,
                data=data,
                null_text=rcm.text.build(config["text"]).encode([""]),
                resume_dir=arguments.resume,
                metrics_path=arguments.metrics,
                preview=_previewer(config, arguments.codec, arguments.resume / "previews"),
                advance=progress.advance,
            )
        _copy_folder(arguments.resume / "previews", arguments.previews)
        save_dcp(arguments.out, student.state_dict())
        facts["iterations"] = iterations
    remove_states(arguments.resume)


def _copy_folder(source: Path, out: Path) -> None:
    """Copy the files of a folder, which may not be there."""
    with atomic_folder(out) as folder:
        for path in sorted(source.glob("*.png")):
            shutil.copyfile(path, folder / path.name)


Preview = Callable[[int, Callable[..., Tensor]], None]  # (update, denoiser) -> nothing


def _previewer(config: Mapping[str, Any], codec_path: Path, folder: Path) -> Preview:
    """What draws a grid of samples during training: a row a task of GenEval, always the same noise."""
    from rcm.data.prompts import VOCABULARIES, evaluation_suite

    common, sampler, seed = config["prompts"], config["sampler"], config["suites"]["dev"]["seed"]
    captions = evaluation_suite(
        VOCABULARIES[common["vocabulary"]], seed=seed, per_task=1, media=config["media"], still=common["still"]
    )
    jobs = jobs_of("1-of-1", len(captions), PREVIEW_COLUMNS)
    text_BLD = rcm.text.build(config["text"]).encode([captions[prompt]["prompt"] for prompt, _ in jobs])
    times = few_step_times(**sampler, steps=1 + len(sampler["mid_times"]))
    noises = [noise_of(jobs, latent_shape(config), seed=seed, step=k) for k in range(len(times))]
    decoder = codec(config["codec"], codec_path)

    def preview(update: int, denoise: Callable[..., Tensor]) -> None:
        latents = consistency_sample(lambda x, t: denoise(x, t, text_BLD), times, noises)
        frames: np.ndarray = to_pixels(decoder.decode(latents))
        with atomic_file(folder / f"{update:06d}.png") as path:
            path.write_bytes(png(grid(frames.reshape(len(captions), PREVIEW_COLUMNS, *frames.shape[1:]))))

    return preview


def export(arguments: Namespace) -> None:
    """Write a student as .safetensors with all that sampling needs, and as a plain .pth."""
    config = compose(arguments.overrides)
    if arguments.out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, got {str(arguments.out)!r}")
    plain = arguments.out.with_suffix(".pth")
    settings = {key: config[key] for key in EXPORTED} | {"objective": config["objective"], "seed": config["seed"]}
    outputs, seed = (arguments.out, plain), config["seed"]
    with recording(*outputs, stage="export", inputs=[arguments.student], config=settings, seed=seed):
        state = load_dcp(arguments.student)
        network(config["network"], state, arguments.student)
        settings["student_sha256"] = content_sha256(arguments.student)
        export_safetensors(arguments.out, state, settings)
        save_pth(plain, state)
