"""Prompt files of any origin: lines of text, JSON lines or a table.

    X.txt     a prompt a line
    X.jsonl   an object a line, with the prompt under "prompt"; whatever else it holds is kept (GenEval's metadata)
    X.csv     a table with the column `prompt`; of the others, `name` is kept

Where a prompt is the longer form of another, that one may stand under "name" (VBench names samples by it). Empty lines
are dropped, equal prompts stay: a prompt is known by its number.
"""

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rcm.artefact import UserError, json_value

Line = tuple[int, Any]  # its number from 1, what stands there
NAME_BYTES = 255  # of a file's name, on nearly every file system


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file: {"prompt": TEXT, ...} each. Raises UserError that names the file and the line."""
    readers: dict[str, Callable[[str], Iterator[Line]]] = {".txt": _text, ".jsonl": _objects, ".csv": _table}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} is no prompt file: expected the suffix {', '.join(readers)}")
    prompts = []
    with _named(path):
        for number, item in readers[path.suffix.lower()](_decoded(path)):
            if fault := _fault(item):
                raise _Mistake(number, fault)
            prompts.append(item)
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text with their numbers, but for empty ones. Raises UserError as `read_prompt_file`."""
    with _named(path):
        return list(_lines(_decoded(path)))


def file_name_fault(name: str) -> str | None:
    """Why a file cannot have this name, or None."""
    if "/" in name or "\0" in name:
        return f"it holds {'a slash' if '/' in name else 'a zero byte'}"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it holds half of a surrogate pair, which is no text"
    return f"it has {size} bytes, and a file system takes {NAME_BYTES}" if size > NAME_BYTES else None


class _Mistake(Exception):
    """Number of the line, and what is wrong there."""


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except _Mistake as mistake:
        raise UserError(f"{path}, line {mistake.args[0]}: {mistake.args[1]}") from None


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")  # without the mark that some editors write
    except UnicodeDecodeError as error:
        raise _Mistake(content.count(b"\n", 0, error.start) + 1, "not UTF-8 text") from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a prompt may hold U+2028
        if line.strip():
            yield number, line.strip()


def _text(text: str) -> Iterator[Line]:
    for number, line in _lines(text):
        yield number, {"prompt": line}


def _objects(text: str) -> Iterator[Line]:
    for number, line in _lines(text):
        try:
            yield number, json_value(line)
        except ValueError as error:
            raise _Mistake(number, f"not JSON ({error})") from None


def _table(text: str) -> Iterator[Line]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if "prompt" not in (rows.fieldnames or []):
            raise _Mistake(1, f"no column `prompt`, but {', '.join(rows.fieldnames or []) or 'nothing'}")
        for row in rows:
            if any(isinstance(value, str) and value.strip() for value in row.values()):
                kept = {key: row[key].strip() for key in ("prompt", "name") if row.get(key)}
                yield rows.line_num, {"prompt": "", **kept}
    except csv.Error as error:
        raise _Mistake(rows.reader.line_num, f"not a table of comma-separated values ({error})") from None


def _fault(item: Any) -> str | None:
    """What is wrong with a line, or None."""
    if not isinstance(item, dict):
        return 'expected an object such as {"prompt": "a photo of a red circle"}'
    for key in ("prompt", "name"):
        value = item.get(key, None if key == "prompt" else "-")
        if not isinstance(value, str) or not value.strip():
            return f"{key!r} must be a text that is not empty"
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{key!r} holds half of a surrogate pair, which is no text"
    return None
