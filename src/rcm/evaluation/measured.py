"""Raw measurements of models on samples, as JSON lines: what was seen, nothing of it judged.

The first line is the header, every other one the row of a sample or of a prompt:

    {"measured": "geneval", "version": "1", "by": {...}, "known": {...} | null, "sampling": {...} | null}
    {"prompt": 12, "filename": "00012/samples/0003.png", ...}

`by` says who measured (name, hashes of the models' weights, device, versions), `known` how the known images went, and
`sampling` how the samples were made. `_ROWS` says what the rows of each kind hold.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rcm.artefact import UserError, atomic_file, json_value
from rcm.evaluation.samples import numbers_of

WHAT = ("geneval", "vbench", "diversity", "text")
VERSION = "1"  # of the format
_SHARED = ("by", "known", "sampling")  # what all parts of a measurement have in common


@dataclass(frozen=True)
class Measured:
    """The header and the rows, ordered by prompt and file."""

    header: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def evaluator(self) -> dict[str, Any]:
        """Who measured what, as a score JSON says it under "evaluator"."""
        by = {key: self.header["by"].get(key) for key in ("name", "models", "device", "versions")}
        return {**by, "known": self.header.get("known"), "sampling": self.header.get("sampling")}


def write_measured(path: str | Path, header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a measurement; nothing is left under the name unless all rows come. `version` need not be given."""
    if header.get("measured") not in WHAT:
        raise ValueError(f"a header's `measured` is one of {', '.join(WHAT)}, not {header.get('measured')!r}")
    first = {"measured": header["measured"], "version": VERSION, **header}
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for line in chain([first], rows):
            file.write(json.dumps(line, allow_nan=False) + "\n")


def read_measured(paths: Sequence[str | Path], what: str) -> Measured:
    """Join the parts of a measurement.

    Raises UserError that names the file: not such a measurement, of another version, measured otherwise than the part
    before, with a row that lacks something or holds what cannot be, or with a sample (where rows have no file name, a
    prompt) that was there already.
    """
    if not paths:
        raise UserError(f"no measurement of {what} is given; make it with `rcm measure`")
    header: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = []
    origin: dict[Any, Path] = {}
    for path in map(Path, paths):
        first, *others = read_lines(path) or [{}]
        _check(path, first, what)
        if header is None:
            header = first
        for key in _SHARED:
            if first.get(key) != header.get(key):
                raise UserError(
                    f"{path} and {paths[0]} were not measured alike: {key} is {_short(first.get(key))} and "
                    f"{_short(header.get(key))}; measure the parts of one model in the same way"
                )
        for number, row in enumerate(others, start=2):
            _check_row(row, what, f"{path}, line {number}")
            name = row.get("filename", row["prompt"])
            known = numbers_of(name) if "filename" in row else name
            if known in origin:
                raise UserError(f"{path}, line {number}: {name} was measured already, in {origin[known]}")
            origin[known] = path
            rows.append(row)
    assert header is not None
    return Measured(header, sorted(rows, key=lambda row: (row["prompt"], str(row.get("filename", "")))))


def _check(path: Path, header: Mapping[str, Any], what: str) -> None:
    if header.get("measured") not in WHAT:
        raise UserError(f"{path} is no measurement: its first line has no key 'measured'; make it with `rcm measure`")
    if header["measured"] != what:
        raise UserError(f"{path} is a measurement of {header['measured']}, expected one of {what}")
    if header.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {header.get('version')!r}, expected {VERSION!r}; measure again with this version"
        )
    if not isinstance(header.get("by"), dict) or not isinstance(header["by"].get("name"), str):
        raise UserError(f"{path} does not say under 'by' who measured; measure again")
    for key in ("known", "sampling"):
        if not isinstance(header.get(key), dict | None):
            raise UserError(f"{path}: key {key!r} of the first line must be an object or null; measure again")


# --- Rows ----------------------------------------------------------------------------------------------------------


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_numbers(value: Any) -> bool:
    return _is_object(value) and all(map(_is_number, value.values()))


def _are_detections(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_detection, value))


def _is_detection(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 7:
        return False
    cls, *box, score, color = value
    if not _is_text(cls) or not all(map(_is_number, box)) or not _is_share(score) or not isinstance(color, str | None):
        return False
    return box[0] <= box[2] and box[1] <= box[3]


def _is_diversity(value: Any) -> bool:
    from rcm.evaluation.features import MEASURES

    return _is_object(value) and all(value.get(name, "") is None or _is_number(value.get(name)) for name in MEASURES)


Check = tuple[Callable[[Any], bool], str]  # what a value must be, and its name
_ROWS: dict[str, dict[str, Check]] = {
    "geneval": {
        "filename": (_is_text, "a text"),
        "metadata": (_is_object, "an object"),
        "detections": (_are_detections, "a list of [class, x0, y0, x1, y1, score in [0, 1], colour or null]"),
    },
    "vbench": {
        "filename": (_is_text, "a text"),
        "name": (_is_text, "a text"),
        "dimension": (_are_texts, "a list of texts"),
        "values": (_are_numbers, "an object of numbers"),
    },
    "diversity": {
        "samples": (_is_count, "a whole number"),
        "values": (_is_diversity, "an object with a number or null for each measure"),
    },
    "text": {
        "filename": (_is_text, "a text"),
        "wanted": (_is_text, "a text"),
        "read": (_is_text, "a text"),
        "cer": (_is_share, "a number in [0, 1]"),
    },
}


def _check_row(row: Mapping[str, Any], what: str, where: str) -> None:
    """Raise UserError unless a row holds what such rows hold."""
    for key, (fits, wanted) in {"prompt": (_is_count, "the number of a prompt"), **_ROWS[what]}.items():
        if not fits(row.get(key)):
            raise UserError(f"{where}: key {key!r} must be {wanted}; got {_short(row.get(key))}")
    if "filename" in row and numbers_of(row["filename"])[0] != row["prompt"]:
        raise UserError(f"{where}: {row['filename']} is no sample of prompt {row['prompt']}; measure again")
    if what == "vbench":
        from rcm.evaluation.vbench_native import DIMENSIONS

        lacking = [name for name in DIMENSIONS if name in row["dimension"] and name not in row["values"]]
        if lacking:
            raise UserError(f"{where}: key 'values' lacks {', '.join(lacking)}, which its prompt is about")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; UserError names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; expected JSON lines") from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a prompt may hold U+2028
        if line.strip():
            try:
                value = json_value(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object")
            found.append(value)
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
