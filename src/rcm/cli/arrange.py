"""The stage `arrange`: samples as an official evaluator looks for them, without a second copy of their bytes."""

import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rcm.artefact import UserError, atomic_folder, recording
from rcm.cli.config import compose
from rcm.cli.progress import Progress
from rcm.data.prompt_files import file_name_fault
from rcm.evaluation.samples import PromptSamples, list_samples, read_frames, read_sampling


def arrange(arguments: Namespace) -> None:
    """Lay out all parts of a suite in one folder.

    GenEval reads `00012/metadata.jsonl` and `00012/samples/0003.png`, VBench `NAME-3.mp4`, named by the short prompt.
    Every sample is read first: the evaluators do not ask whether a film is whole.
    """
    scorer = compose(arguments.overrides)["evaluation"]["scorer"]
    numbers = {"layout": "vbench" if scorer.startswith("vbench") else "geneval"}
    with recording(arguments.out, stage="arrange", inputs=arguments.samples, config=numbers) as facts:
        items = list_samples(arguments.samples)
        frames = (read_sampling(arguments.samples) or {}).get("frames")
        places = _flat(items) if numbers["layout"] == "vbench" else _by_prompt(items)
        count = sum(len(item.paths) for item in items)
        with Progress("arrange", count, "samples") as progress:
            for path in chain.from_iterable(item.paths for item in items):
                read_frames(path, frames)
                progress.advance()
        with atomic_folder(arguments.out) as folder:
            for name, source in places.items():
                _link(source, folder / name)
        facts["samples"] = count


def _by_prompt(items: Sequence[PromptSamples]) -> dict[str, Path]:
    """GenEval's places, and what lies there."""
    places = {}
    for item in items:
        places[f"{item.index:05d}/metadata.jsonl"] = item.paths[0].parents[1] / "metadata.jsonl"
        places |= {item.name(path): path for path in item.paths}
    return places


def _flat(items: Sequence[PromptSamples]) -> dict[str, Path]:
    """VBench's places, and what lies there."""
    places: dict[str, Path] = {}
    owners: dict[str, int] = {}
    for item in items:
        name = str(item.metadata.get("name") or item.metadata["prompt"])
        if (other := owners.setdefault(name, item.index)) != item.index:
            raise UserError(f"the prompts {other} and {item.index} are both called {name!r}; expected a name for each")
        for path in item.paths:
            place = f"{name}-{int(path.stem)}{path.suffix}"
            if fault := file_name_fault(place):
                raise UserError(
                    f"no file can be named after the prompt {item.index}, {name!r}, for {fault}; give it a shorter "
                    "`name`, or sample another suite"
                )
            places[place] = path
    return places


def _link(source: Path, place: Path) -> None:
    """A hard link, or a copy where there can be none: on another file system, or on one without links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), place)
    except OSError:
        shutil.copyfile(source, place)
