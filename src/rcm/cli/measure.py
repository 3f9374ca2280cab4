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

from rcm.artefact import content_sha256, recording, stated_sha256
from rcm.cli.config import compose
from rcm.cli.evaluators import NAMES, subject, taken
from rcm.cli.models import device_name, device_of
from rcm.cli.progress import Progress
from rcm.evaluation.measured import VERSION, Measured, write_measured
from rcm.evaluation.samples import PromptSamples, list_samples, read_sampling

Rows = Iterator[dict[str, Any]]


def measure(arguments: Namespace) -> None:
    """Store what an evaluator's models see in the samples of one suite, or of some parts of it."""
    config = compose(arguments.overrides)
    what = subject(config["evaluation"]["scorer"], config["suite"])
    weights = taken(what, arguments.weights or {})
    inputs = {path: stated_sha256(path) for path in weights.values()}
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
    sampling = read_sampling(folders)
    frames = (sampling or {}).get("frames")
    by = _by(what, weights, device)
    header = {"measured": what, "version": VERSION, "by": by, "known": None, "sampling": sampling}
    with Progress("measure", sum(len(item.paths) for item in items), "samples") as progress:
        if what == "geneval":
            rows, header["known"] = _geneval(items, weights, device, config["evaluation"]["known_at_least"], progress)
        elif what == "vbench":
            from rcm.evaluation import vbench_native

            rows = vbench_native.measure(items, weights, device, progress.advance, frames=frames)
        elif what == "diversity":
            from rcm.evaluation import features

            rows = features.measure(items, weights, device, progress.advance, frames=frames)
        else:
            from rcm.evaluation import small_text

            rows = small_text.measure(items, progress.advance, frames=frames)
        return Measured(header, list(rows))


def _by(what: str, weights: Mapping[str, Path], device: torch.device) -> dict[str, Any]:
    """Who measures."""
    if what == "text":
        from rcm.evaluation import small_text

        return small_text.by()
    return {
        "name": NAMES[what],
        "models": {name: stated_sha256(path) for name, path in weights.items()},
        "device": device_name(device),
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
