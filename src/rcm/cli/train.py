"""Stages that train: pretrain, distill."""

import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rcm.codecs
import rcm.networks
import rcm.text
from rcm.artefact import UserError, atomic_file, atomic_folder, beside, recording, verified_sha256
from rcm.checkpoints import load_into, load_pth, save_dcp, save_pth
from rcm.cli.config import compose
from rcm.cli.models import codec, jobs_of, latent_shape, noise_of, text_encoder, times_of
from rcm.cli.networks import open_networks
from rcm.cli.pictures import grid, png
from rcm.cli.progress import Progress
from rcm.cli.ranks import rank
from rcm.cli.sources import code_digest
from rcm.codecs import to_pixels
from rcm.collective import everywhere
from rcm.data.shards import manifest_path, read_shards
from rcm.parallel import Mesh, start
from rcm.sampling import consistency_sample
from rcm.training.distill import Preview
from rcm.training.settings import Parallel, Settings
from rcm.training.signals import caught_signals
from rcm.training.state import remove_states
from rcm.usage import usage


def pretrain(arguments: Namespace) -> None:
    """Train a teacher on scenes of the tiny world, from where an earlier call was stopped."""
    from rcm.training.pretrain import draw_world
    from rcm.training.pretrain import pretrain as train

    config = compose(arguments.overrides)
    if config["pretrain"] is None:
        raise UserError("this experiment has an official teacher: fetch it with `rcm download --name transformer`")
    numbers = {key: config[key] for key in ("media", "frames", "network", "codec", "text", "prompts", "pretrain")}
    inputs = [arguments.codec] if arguments.codec is not None else []
    outputs, seed = (arguments.out, arguments.codec_out), config["pretrain"]["seed"]
    resume = arguments.resume
    with recording(*outputs, stage="pretrain", inputs=inputs, config=numbers, seed=seed, resume=resume):
        decoder, encoder = rcm.codecs.build(config["codec"]), text_encoder(config, None)
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
    """Distil a teacher on the synthetic data, from where an earlier call was stopped; every rank runs this."""
    from rcm.training.distill import distill as train
    from rcm.training.learner import optimizer_kind

    with ExitStack() as stack:
        caught = stack.enter_context(caught_signals(at_once=True, speak=rank() == 0))
        config = compose(arguments.overrides)
        settings, parallel = Settings.of(config), Parallel.of(config)
        mesh = start(
            replicate=parallel.replicate,
            shard=parallel.shard,
            context=parallel.context,
            timeout=parallel.timeout,
            device=parallel.device,
        )
        stack.callback(mesh.close)
        sections = ("media", "frames", "height", "width", "network", "codec", "text", "objective", "distillation")
        numbers = {key: config[key] for key in sections} | {"parallel": {"precision": parallel.precision}}
        numbers["teacher"] = {"negative_prompt": config["teacher"]["negative_prompt"]}
        others = [*map(manifest_path, arguments.data), *filter(None, (arguments.codec, arguments.text))]
        inputs = dict.fromkeys([arguments.teacher, *arguments.data, *others], "")  # hashed once, by all ranks together
        outputs = [*filter(None, (arguments.out, arguments.raw)), arguments.metrics, arguments.previews]
        known: dict[str, Any] = {"inputs": inputs, "config": numbers, "seed": config["seed"]}
        known |= {"ranks": mesh.world, "resume": arguments.resume}
        main = mesh.is_main  # what is written and shown is rank 0's
        facts = stack.enter_context(recording(*outputs, stage="distill", **known)) if main else {}
        data = read_shards(arguments.data, group=mesh.group)
        if data.samples[0].latents_CTHW.shape != latent_shape(config):
            raise UserError(
                f"{arguments.data[0]} holds latents of another shape than this experiment has; make it again"
            )
        teacher = verified_sha256(arguments.teacher)
        inputs |= {arguments.teacher: teacher, **dict(zip(arguments.data, data.sha256, strict=True))}
        inputs |= everywhere(lambda: {path: verified_sha256(path) for path in others} if main else {}, mesh.group)[0]
        made_of = {"teacher": teacher, "data": [*data.sha256], "code": code_digest("distill")}
        encoder = text_encoder(config, arguments.text)
        networks = open_networks(config, arguments.teacher, mesh)
        iterations = settings.schedule.iterations
        progress = stack.enter_context(Progress("distill", iterations, "iterations")) if main else None
        train(
            {**config, "inputs": made_of},
            **networks._asdict(),
            data=data,
            null_text=encoder.encode([config["teacher"]["negative_prompt"]]),
            resume_dir=arguments.resume,
            metrics_path=arguments.metrics,
            mesh=mesh,
            caught=caught,
            preview=_previewer(config, encoder, arguments.codec, arguments.resume / "previews", mesh),
            raw=lambda: save_dcp(arguments.raw, networks.student.state_dict(), mesh) if arguments.raw else None,
            advance=progress.advance if progress else None,
        )
        if main:
            _copy_folder(arguments.resume / "previews", arguments.previews)
        save_dcp(arguments.out, networks.student.state_dict(), mesh)
        facts |= {
            "iterations": iterations,
            "optimizer": optimizer_kind(settings.optimizer, mesh.device.type),
            "parallel": {**asdict(parallel), **asdict(mesh.layout)},
            "ranks": everywhere(usage, mesh.group)[1:],
        }
    if mesh.is_main:
        remove_states(arguments.resume)


def _copy_folder(source: Path, out: Path) -> None:
    """Copy the files of a folder, which may not be there."""
    with atomic_folder(out) as folder:
        for path in sorted(source.glob("*.png")):
            shutil.copyfile(path, folder / path.name)


def _previewer(config: Mapping[str, Any], encoder: Any, codec_path: Path, folder: Path, mesh: Mesh) -> Preview | None:
    """What draws a grid of samples during training: a row a prompt of the suite `dev`, always the same noise.

    The prompts are those that were encoded before, or else one of each task of GenEval. Every rank computes it, as the
    network is shared over them; rank 0 writes.
    """
    if config["distillation"]["preview_every"] == 0:
        return None
    sampler, suite, shape = config["sampler"], config["suites"]["dev"], latent_shape(config)
    prompts = _encoded(encoder, config) if isinstance(encoder, rcm.text.Embeddings) else _tasks(config)
    jobs = jobs_of("1-of-1", len(prompts), suite["samples"])
    text_BLD = encoder.encode([prompts[prompt] for prompt, _ in jobs]).to(mesh.device)
    times = times_of(sampler, 1 + len(sampler["mid_times"]))
    noises = [noise_of(jobs, shape, seed=suite["seed"], step=k).to(mesh.device) for k in range(len(times))]
    decoder = codec(config["codec"], codec_path, device=mesh.device.type)

    def preview(update: int, denoise: Callable[..., Tensor]) -> None:
        ode = sampler.get("ode", False)
        latents = consistency_sample(lambda x, t: denoise(x, t, text_BLD), times, noises, ode=ode)
        if mesh.is_main:
            frames = np.concatenate([to_pixels(decoder.decode(latent[None])) for latent in latents])
            with atomic_file(folder / f"{update:06d}.png") as path:
                path.write_bytes(png(grid(frames.reshape(len(prompts), suite["samples"], *frames.shape[1:]))))

    return preview


def _encoded(encoder: rcm.text.Embeddings, config: Mapping[str, Any]) -> list[str]:
    """The prompts that were encoded before, without those of guidance."""
    guiding = {"", *(config[section]["negative_prompt"] for section in ("teacher", "synthesis"))}
    return [prompt for prompt in encoder.prompts if prompt not in guiding]


def _tasks(config: Mapping[str, Any]) -> list[str]:
    """A prompt of each task of GenEval."""
    from rcm.data.prompts import VOCABULARIES, evaluation_suite

    common, seed = config["prompts"], config["suites"]["dev"]["seed"]
    drawn = evaluation_suite(
        VOCABULARIES[common["vocabulary"]], seed=seed, per_task=1, media=config["media"], still=common["still"]
    )
    return [item["prompt"] for item in drawn]
