"""What figures are made of, as files: scores, what was noted of training, and numbers that the paper printed."""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rcm.artefact import UserError, json_value, read_json
from rcm.report.scores import Score, run_of

ROUNDED = "bfloat16", "bfloat16, time in float32", "float32"  # what is compared with float64, the most rounded first


def sorted_out(paths: Iterable[Path]) -> tuple[list[Score], list[Path]]:
    """The scores (`MODEL-STEPS.json`) among files, and the paths of metrics (`metrics.jsonl`)."""
    paths = list(paths)
    for path in paths:
        if path.suffix not in (".json", ".jsonl"):
            raise UserError(f"{path} is neither a score, MODEL-STEPS.json, nor a metrics.jsonl")
    return [read_score(path) for path in paths if path.suffix == ".json"], [p for p in paths if p.suffix == ".jsonl"]


def read_score(path: Path) -> Score:
    """A score, with its file, by which a mistake in it is named."""
    keys = {"model": _is_text, "media": _is_text, **dict.fromkeys(("steps", "n_prompts", "n_samples"), _is_count)}
    more = {"per_prompt": _are_values, "evaluator": lambda value: isinstance(value, dict)}
    return _read(path, "score", "evaluate", {**keys, "metrics": _are_metrics}, more)


def read_speed(path: Path) -> Score:
    """Frames per second of a model, with its file."""
    keys = {"model": _is_text, "steps": _is_count, "media": _is_text, "fps": _is_number, "batch": _is_count}
    return _read(path, "speed", "throughput", {**keys, "device": _is_text})


def read_rounding(path: Path) -> Score:
    """Rounding errors of a network, with its file."""
    keys = {"model": _is_text, "times": _are_numbers, "errors": lambda value: isinstance(value, dict)}
    found = _read(path, "rounding errors", "precision", keys)
    for precision in ROUNDED:
        for part in ("output", "tangent"):
            bounds = [_at(found["errors"], precision, part, bound) for bound in ("low", "median", "high")]
            if not all(_are_numbers(values) and len(values) == len(found["times"]) for values in bounds):
                raise _no_such(path, "rounding errors", "precision", f"lacks the {part} in {precision} at its times")
    return found


Fits = Callable[[Any], bool]


def _read(path: Path, what: str, stage: str, keys: Mapping[str, Fits], more: Mapping[str, Fits] | None = None) -> Score:
    """An object whose `keys` are there and, as those of `more` where they are, what they have to be."""
    found = read_json(path)
    if lacking := [key for key in keys if not isinstance(found, dict) or key not in found]:
        raise _no_such(path, what, stage, f"lacks {', '.join(lacking)}")
    if wrong := [key for key, fits in {**keys, **(more or {})}.items() if key in found and not fits(found[key])]:
        raise _no_such(path, what, stage, f"has another {wrong[0]} than such files have")
    return {**found, "file": str(path)}


def _no_such(path: Path, what: str, stage: str, why: str) -> UserError:
    return UserError(f"{path} holds no {what}, for it {why}; expected a file that `rcm {stage}` wrote")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # JSON has numbers that a float has not


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _are_metrics(value: Any) -> bool:
    """Values with bounds by name; each may be None, and only the value must be there."""
    return isinstance(value, dict) and all(
        isinstance(entry, dict)
        and "value" in entry
        and all(entry.get(key) is None or _is_number(entry[key]) for key in ("value", "low", "high"))
        for entry in value.values()
    )


def _are_values(value: Any) -> bool:
    """A list by name, a number or None a prompt; `tag` says what the prompts are about."""
    return isinstance(value, dict) and all(
        isinstance(values, list) and (name == "tag" or all(x is None or _is_number(x) for x in values))
        for name, values in value.items()
    )


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def noted(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, one an update."""
    try:
        rows = [json_value(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"the metrics {path} cannot be read: {error}") from error
    if not rows:
        raise UserError(f"the metrics {path} hold no updates; train again to write them anew")
    if strange := [number for number, row in enumerate(rows, 1) if not _is_update(row)]:
        raise UserError(
            f"line {strange[0]} of the metrics {path} is no JSON object of an update; train again to write them anew"
        )
    return rows


def _is_update(row: Any) -> bool:
    """Whether a row has the number of an update, and numbers under all other names but these."""
    if not isinstance(row, dict) or not _is_count(row.get("update")):
        return False
    return all(x is None or _is_number(x) for key, x in row.items() if key not in ("role", "alarms", "wall"))


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
