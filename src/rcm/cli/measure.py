"""The stage `measure`: models look at samples, and what they see is stored; `rcm evaluate` judges it.

What is measured follows from suite and scorer: `rcm.cli.evaluators`. The measurers stand in
`rcm.evaluation`, a module each.
"""

import importlib.metadata
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rcm.artefact import content_sha256, recording
from rcm.cli.config import compose
from rcm.cli.evaluators import NAMES, subject, taken
from rcm.cli.generate import identity
from rcm.cli.models import device_of
from rcm.cli.progress import Progress
from rcm.evaluation.measured import VERSION, Measured, write_measured
from rcm.evaluation.samples import PromptSamples, list_samples, read_sampling

Rows = Iterator[dict[str, Any]]


def measure(arguments: Namespace) -> None:
    """Store what an evaluator's models see in the samples of one suite, or of some parts of it."""
    config = compose(arguments.overrides)
    what = subject(config["evaluation"]["scorer"], config["suite"])
    weights = taken(what, arguments.weights or {})
    inputs = {path: identity(path) for path in weights.values()}
    inputs |= {folder: content_sha256(folder) for folder in arguments.samples}
    numbers = {"measured": what, "device": config["inference"]["device"]}
    with recording(arguments.out, stage="measure", inputs=inputs, config=numbers) as facts:
        found = measured(what, arguments.samples, weights, config)
        write_measured(arguments.out, found.header, found.rows)
        facts |= {"rows": len(found.rows)}


def measured(what: str, folders: Sequence[Path], weights: Mapping[str, Path], config: Mapping[str, Any]) -> Measured:
    """Open what is needed and look at all samples of the folders."""
    items = list_samples(folders)
    device = device_of("cpu" if what == "text" else config["inference"]["device"])
    header = {"measured": what, "version": VERSION, "by": _by(what, weights, device), "known": None}
    header |= {"sampling": read_sampling(folders)}
    with Progress("measure", sum(len(item.paths) for item in items), "samples") as progress:
        if what == "geneval":
            rows, header["known"] = _geneval(items, weights, device, config["evaluation"]["known_at_least"], progress)
        else:
            rows = _LOOKING[what](items, weights, device, progress)
        return Measured(header, list(rows))


def _by(what: str, weights: Mapping[str, Path], device: torch.device) -> dict[str, Any]:
    """Who measures."""
    if what == "text":
        from rcm.evaluation import small_text

        return small_text.by()
    return {
        "name": NAMES[what],
        "models": {name: identity(path) for name, path in weights.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def _geneval(
    items: Sequence[PromptSamples], weights: Mapping[str, Path], device: torch.device, least: float, progress: Progress
) -> tuple[Rows, dict[str, Any]]:
    """By a detector that first shows on known images what it can."""
    from rcm.evaluation import known, mask2former
    from rcm.evaluation.clip import Clip

    detector, clip = mask2former.Mask2Former(weights["detector"], device), Clip(weights["clip_large"], device)
    found = known.check(detector, clip)
    known.trusted(found, least)
    return mask2former.measure(items, detector, clip, progress.advance), found


def _vbench(
    items: Sequence[PromptSamples], weights: Mapping[str, Path], device: torch.device, progress: Progress
) -> Rows:
    from rcm.evaluation import vbench_native

    return vbench_native.measure(items, weights, device, progress.advance)


def _diversity(
    items: Sequence[PromptSamples], weights: Mapping[str, Path], device: torch.device, progress: Progress
) -> Rows:
    from rcm.evaluation import features

    return features.measure(items, weights, device, progress.advance)


def _text(items: Sequence[PromptSamples], _: Mapping[str, Path], __: torch.device, progress: Progress) -> Rows:
    from rcm.evaluation import small_text

    return small_text.measure(items, progress.advance)


_LOOKING = {"vbench": _vbench, "diversity": _diversity, "text": _text}
