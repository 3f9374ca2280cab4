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
    return {"prompt": prompt, "filename": f"{prompt:05d}/samples/{number:04d}.png", "detections": []}


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


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "a.jsonl", _row(0)), _write(tmp_path / "b.jsonl", _row(1), _row(0))
    with pytest.raises(UserError, match=r"b.jsonl, line 3: 00000/samples/0000.png was measured already, in .*a.jsonl"):
        read_measured([first, second], "geneval")
    rows = [{"prompt": 4, "samples": 8, "values": {}}] * 2
    with pytest.raises(UserError, match=r"c.jsonl, line 3: 4 was measured already"):
        read_measured([_write(tmp_path / "c.jsonl", *rows, measured="diversity")], "diversity")


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
