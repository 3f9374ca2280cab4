"""The stage `throughput`: how long samples take one by one, as table 2 of the paper has it."""

from argparse import Namespace
from typing import Any

import torch

import rcm
from rcm.artefact import UserError, recording, write_json
from rcm.cli.config import compose
from rcm.cli.models import clock, codec, decoded, device_name, device_of, sampling
from rcm.cli.names import model_and_steps
from rcm.cli.progress import Progress
from rcm.data.prompt_files import read_prompt_file


def throughput(arguments: Namespace) -> None:
    """Time the sampling and the decoding of single samples, the first one left out.

    Prompts are encoded before; loading and writing do not count either.
    """
    config = compose(arguments.overrides)
    model, steps = model_and_steps(arguments.out)
    if steps != arguments.steps:
        raise UserError(f"--steps is {arguments.steps}, but --out is called {arguments.out.name}; make them agree")
    seed, number = config["suites"][config["suite"]]["seed"], config["evaluation"]["throughput"]
    sections = ("frames", "height", "width", "codec", "network", "text", "teacher")
    numbers = {key: config[key] for key in sections} | {"steps": steps, "samples": number}
    numbers["inference"] = config["inference"]
    inputs = [path for path in (arguments.checkpoint, arguments.codec, arguments.prompts, arguments.text) if path]
    with recording(arguments.out, stage="throughput", inputs=inputs, config=numbers, seed=seed):
        captions = read_prompt_file(arguments.prompts)
        device = device_of(config["inference"]["device"])
        timed = sampling(config, arguments.checkpoint, arguments.text, steps=steps)
        decoder = codec(config["codec"], arguments.codec, device=config["inference"]["device"])
        seconds = []
        with Progress("throughput", 1 + number, "samples") as progress:
            for count in range(1 + number):  # the first chooses kernels and fills caches
                sample, prompt = divmod(max(count - 1, 0), len(captions))
                jobs = [(prompt, sample)]
                text_BLD = timed.text(captions, jobs)
                start = clock(device)
                latents = timed.draw(text_BLD, jobs, seed=seed)
                between = clock(device)
                decoded(decoder, latents)
                seconds.append((between - start, clock(device) - between))
                progress.advance()
        write_json(
            arguments.out,
            {
                "model": model,
                "steps": steps,
                "media": config["media"],
                "frames": config["frames"],
                **_means(seconds[1:], config["frames"]),
                "batch": 1,
                "device": device_name(device),
                "precision": config["inference"]["precision"],
                "versions": {"rcm": rcm.__version__, "torch": torch.__version__},
                "samples": number,
            },
        )


def _means(seconds: list[tuple[float, float]], frames: int) -> dict[str, Any]:
    """Frames per second, and the mean seconds of a sample and of their parts."""
    drawing, decoding = (sum(part) / len(seconds) for part in zip(*seconds, strict=True))
    total = drawing + decoding
    return {
        "fps": frames / total,
        "seconds": total,
        "sampling_seconds": drawing,
        "decoding_seconds": decoding,
    }
