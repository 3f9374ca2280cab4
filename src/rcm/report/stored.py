"""What figures are made of, as files: scores, what was noted of training, and numbers that the paper printed."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rcm.artefact import UserError, read_json
from rcm.report.scores import Score, run_of


def sorted_out(paths: Iterable[Path]) -> tuple[list[Score], list[Path]]:
    """The scores (`MODEL-STEPS.json`) among files, and the paths of metrics (`metrics.jsonl`)."""
    paths = list(paths)
    for path in paths:
        if path.suffix not in (".json", ".jsonl"):
            raise UserError(f"{path} is neither a score, MODEL-STEPS.json, nor a metrics.jsonl")
    return [read_score(path) for path in paths if path.suffix == ".json"], [p for p in paths if p.suffix == ".jsonl"]


def read_score(path: Path) -> Score:
    """A score, with its file, by which a mistake in it is named."""
    return _read(path, "score", "evaluate", "model", "steps", "media", "n_prompts", "n_samples", "metrics")


def read_speed(path: Path) -> Score:
    """Frames per second of a model, with its file."""
    return _read(path, "speed", "throughput", "model", "steps", "media", "fps", "batch", "device")


def read_rounding(path: Path) -> Score:
    """Rounding errors of a network, with its file."""
    return _read(path, "rounding errors", "precision", "model", "times", "errors")


def _read(path: Path, what: str, stage: str, *keys: str) -> Score:
    found = read_json(path)
    lacking = [key for key in keys if not isinstance(found, dict) or key not in found]
    if lacking:
        raise UserError(
            f"{path} holds no {what}, for it lacks {', '.join(lacking)}; expected a file that `rcm {stage}` wrote"
        )
    return {**found, "file": str(path)}


def noted(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, one an update."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"the metrics {path} cannot be read: {error}") from error
    strange = [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]
    if strange:
        raise UserError(f"line {strange[0]} of the metrics {path} is no JSON object; train again to write them anew")
    return rows


def whose(path: Path) -> tuple[str, str]:
    """Medium and method of `.../MEDIUM/METHOD-SEED/metrics.jsonl`."""
    medium, model = path.absolute().parts[-3:-1]
    return medium, run_of(model, 0).method


def printed(path: Path, *columns: str) -> list[dict[str, str]]:
    """The lines of a table of the paper, which has these columns among its own."""
    try:
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the published table {path} cannot be read: {getattr(error, 'strerror', 'it is no text in UTF-8')}"
        ) from error
    missing = [column for column in columns if not lines or column not in lines[0]]
    if missing:
        raise UserError(f"the published table {path} lacks the column {missing[0]!r}")
    return lines
