"""Stored measurements: parts joined, and files that do not belong."""

import json
from pathlib import Path
from typing import Any

import pytest

from rcm.artefact import UserError
from rcm.evaluation.measured import read_measured, write_measured

HEADER = {
    "measured": "geneval",
    "by": {"name": "GenEval (HF Mask2Former)", "models": {"detector": "ab"}, "device": "cpu", "versions": {}},
    "known": {"score": 0.9},
    "sampling": {"sigma_max": 80.0},
}


def _row(prompt: int, number: int = 0) -> dict[str, Any]:
    return {"prompt": prompt, "filename": f"{prompt:05d}/samples/{number:04d}.png", "metadata": {}, "detections": []}


ROWS: dict[str, dict[str, Any]] = {
    "geneval": {**_row(4), "detections": [["dog", 0.0, 1, 2, 1, 0.9, None]]},
    "vbench": {
        "prompt": 4,
        "filename": "00004/samples/0000.mp4",
        "name": "a dog",
        "dimension": ["subject_consistency", "scene"],
        "values": {"subject_consistency": 0.9},
    },
    "diversity": {
        "prompt": 4,
        "samples": 8,
        "values": {"clip_distance": 0.1, "dino_distance": None, "vbench2": 0.3},
    },
    "text": {"prompt": 4, "filename": "00004/samples/0000.png", "wanted": "EXIT", "read": "", "cer": 1},
}


def _write(path: Path, *rows: dict[str, Any], **changed: Any) -> Path:
    write_measured(path, HEADER | changed, rows)
    return path


def test_parts_are_joined_by_prompt(tmp_path: Path) -> None:
    first = _write(tmp_path / "1.jsonl", _row(2), _row(0, 1), _row(0))
    second = _write(tmp_path / "2.jsonl", _row(1))
    found = read_measured([first, second], "geneval")
    assert found.header == {"measured": "geneval", "version": "1", **HEADER}
    assert [row["filename"][:5] + row["filename"][-5] for row in found.rows] == ["000000", "000001", "000010", "000020"]
    assert found.rows[2] == _row(1)
    assert json.loads(first.read_text().splitlines()[0])["version"] == "1"


def test_a_writer_that_dies_leaves_nothing(tmp_path: Path) -> None:
    def dying():
        yield _row(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_measured(tmp_path / "x.jsonl", HEADER, dying())
    with pytest.raises(ValueError, match="not JSON compliant"):
        _write(tmp_path / "x.jsonl", {**_row(0), "score": float("nan")})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="measured"):
        write_measured(tmp_path / "x.jsonl", HEADER | {"measured": "beauty"}, [])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": "0"}, r"b.jsonl is of version '0', expected '1'"),
        ({"measured": "text"}, r"b.jsonl is a measurement of text, expected one of geneval"),
        ({"by": HEADER["by"] | {"device": "NVIDIA H100"}}, r"b.jsonl and .*a.jsonl were not measured alike: by"),
        ({"known": {"score": 0.8}}, r"b.jsonl .* not measured alike: known"),
        ({"sampling": {"sigma_max": 800.0}}, r"b.jsonl .* not measured alike: sampling"),
        ({"by": {}}, r"b.jsonl does not say under 'by' who measured"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    files = [_write(tmp_path / "a.jsonl", _row(0)), _write(tmp_path / "b.jsonl", _row(1), **changed)]
    with pytest.raises(UserError, match=message):
        read_measured(files, "geneval")


@pytest.mark.parametrize("what", ROWS)
def test_rows_hold_what_they_must(tmp_path: Path, what: str) -> None:
    path = _write(tmp_path / "x.jsonl", ROWS[what], measured=what)
    assert read_measured([path], what).rows == [ROWS[what]]
    for key in ROWS[what]:
        less = {name: value for name, value in ROWS[what].items() if name != key}
        with pytest.raises(UserError, match=rf"x.jsonl, line 2: key '{key}' must be .*; got null"):
            read_measured([_write(path, less, measured=what)], what)


@pytest.mark.parametrize(
    ("what", "key", "value"),
    [
        ("geneval", "detections", [["car", 0, 0, 10, 0.9]]),
        ("geneval", "detections", [["car", 0, 0, 10, 10, "sure", "red"]]),
        ("geneval", "detections", 7),
        ("geneval", "detections", [["car", 0, 0, 10, 10, 90, "red"]]),
        ("geneval", "detections", [["car", 10, 0, 0, 10, 0.9, "red"]]),
        ("geneval", "detections", [["car", 0, 10, 10, 0, 0.9, "red"]]),
        ("geneval", "detections", [[5, 0, 0, 10, 10, 0.9, "red"]]),
        ("geneval", "detections", [["car", 0, 0, 10, 10, 0.9, 3]]),
        ("geneval", "metadata", "a dog"),
        ("geneval", "prompt", True),
        ("vbench", "values", {"subject_consistency": None}),
        ("vbench", "values", {"subject_consistency": "high"}),
        ("vbench", "dimension", "scene"),
        ("diversity", "samples", 8.5),
        ("diversity", "values", {"clip_distance": 0.1, "dino_distance": 0.2}),
        ("diversity", "values", {"clip_distance": 0.1, "dino_distance": 0.2, "vbench2": "x"}),
        ("text", "cer", 7),
        ("text", "read", None),
    ],
)
def test_rows_with_what_cannot_be_are_named(tmp_path: Path, what: str, key: str, value: Any) -> None:
    path = _write(tmp_path / "x.jsonl", {**ROWS[what], key: value}, measured=what)
    with pytest.raises(UserError, match=rf"x.jsonl, line 2: key '{key}' must be"):
        read_measured([path], what)


def test_a_row_is_of_its_prompt_and_has_the_dimensions_that_are_measured_here(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", {**_row(1), "prompt": 0})
    with pytest.raises(UserError, match=r"line 2: 00001/samples/0000.png is no sample of prompt 0"):
        read_measured([path], "geneval")
    path = _write(path, {**ROWS["vbench"], "values": {}}, measured="vbench")
    with pytest.raises(UserError, match=r"line 2: key 'values' lacks subject_consistency, which its prompt is about"):
        read_measured([path], "vbench")
    for key in ("known", "sampling"):
        with pytest.raises(UserError, match=rf"x.jsonl: key '{key}' of the first line must be an object or null"):
            read_measured([_write(path, _row(0), **{key: 3})], "geneval")


@pytest.mark.parametrize("cer", ["NaN", "-Infinity", "1e999", "1" * 5000, "[" * 100_000])
def test_numbers_that_are_none_are_named(tmp_path: Path, cer: str) -> None:
    path = _write(tmp_path / "x.jsonl", {**ROWS["text"], "cer": 0.125}, measured="text")
    path.write_text(path.read_text().replace("0.125", cer))
    with pytest.raises(UserError, match=r"x.jsonl, line 2: (not JSON|key 'cer' must be a number in \[0, 1\])"):
        read_measured([path], "text")


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "a.jsonl", _row(0)), _write(tmp_path / "b.jsonl", _row(1), _row(0))
    with pytest.raises(UserError, match=r"b.jsonl, line 3: 00000/samples/0000.png was measured already, in .*a.jsonl"):
        read_measured([first, second], "geneval")
    with pytest.raises(UserError, match=r"c.jsonl, line 3: 4 was measured already"):
        read_measured([_write(tmp_path / "c.jsonl", *[ROWS["diversity"]] * 2, measured="diversity")], "diversity")
    other = {**_row(0), "filename": "00000/samples/00000.png"}  # the same sample with another number of zeros
    with pytest.raises(UserError, match=r"d.jsonl, line 3: 00000/samples/00000.png was measured already"):
        read_measured([_write(tmp_path / "d.jsonl", _row(0), other)], "geneval")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x.jsonl is no measurement"),
        (b'{"filename": "a.png", "correct": true}\n', r"x.jsonl is no measurement"),
        (b'{"measured": "geneval", "vers', r"x.jsonl, line 1: not JSON"),
        (b"[1, 2]\n", r"x.jsonl, line 1: expected a JSON object"),
        (b"\x89PNG\r\n", r"x.jsonl is not UTF-8 text"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_measured([tmp_path / "x.jsonl"], "geneval")


def test_a_cut_line_and_a_row_without_prompt_are_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", _row(0), {"filename": "a.png"})
    with pytest.raises(UserError, match=r"x.jsonl, line 3: key 'prompt'"):
        read_measured([path], "geneval")
    path.write_text(path.read_text()[:-8])
    with pytest.raises(UserError, match=r"x.jsonl, line 3: not JSON"):
        read_measured([path], "geneval")
    with pytest.raises(UserError, match=r"cannot read .*nowhere.jsonl"):
        read_measured([tmp_path / "nowhere.jsonl"], "geneval")
    with pytest.raises(UserError, match=r"no measurement of text is given"):
        read_measured([], "text")
