"""Raw measurements of models on samples, as JSON lines: what was seen, nothing of it judged.

The first line is the header, every other one the row of a sample or of a prompt:

    {"measured": "geneval", "version": "1", "by": {...}, "known": {...} | null, "sampling": {...} | null}
    {"prompt": 12, "filename": "00012/samples/0003.png", ...}

`by` says who measured (name, hashes of the models' weights, device, versions), `known` how the known images went, and
`sampling` how the samples were made. What the rows hold is the business of the module that measures.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rcm.artefact import UserError, atomic_file

WHAT = ("geneval", "vbench", "diversity", "text")
VERSION = "1"  # of the format
_SHARED = ("by", "known", "sampling")  # what all parts of a measurement have in common


@dataclass(frozen=True)
class Measured:
    """The header and the rows, ordered by prompt and file."""

    header: dict[str, Any]
    rows: list[dict[str, Any]]


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
    before, or with a sample (where rows have no file name, a prompt) that was there already.
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
            prompt = row.get("prompt")
            if isinstance(prompt, bool) or not isinstance(prompt, int) or prompt < 0:
                raise UserError(f"{path}, line {number}: key 'prompt' must be the number of a prompt; got {prompt!r}")
            name = row.get("filename", prompt)
            if name in origin:
                raise UserError(f"{path}, line {number}: {name} was measured already, in {origin[name]}")
            origin[name] = path
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
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object")
            found.append(value)
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
