"""Prompt files of every form give their prompts, and mistakes name file and line."""

import json
from pathlib import Path

import pytest

from rcm.artefact import UserError
from rcm.data.prompt_files import file_name_fault, read_lines, read_prompt_file
from rcm.data.prompts import COCO, geneval, to_jsonl


def read(tmp_path: Path, name: str, content: bytes | str) -> list[dict]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompt_file(path)


def test_lines_of_text(tmp_path: Path) -> None:
    content = "\ufeffa cat\r\n\n  a dog, running \na cat\n\t\n猫\u2028が走る\n"
    assert [item["prompt"] for item in read(tmp_path, "x.txt", content)] == [
        "a cat",
        "a dog, running",
        "a cat",
        "猫\u2028が走る",
    ]
    assert read(tmp_path, "x.TXT", '{"a": 1}') == [{"prompt": '{"a": 1}'}]


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("\ufeffa cat\n\n  a dog \r\n\n", encoding="utf-8")
    assert read_lines(tmp_path / "x") == [(1, "a cat"), (3, "a dog")]
    (tmp_path / "x").write_bytes(b"a\n\n\xff")
    with pytest.raises(UserError, match="x, line 3: not UTF-8"):
        read_lines(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a" * 255, None),
        ("a" * 256, "it has 256 bytes"),
        ("猫" * 85, None),
        ("猫" * 86, "it has 258 bytes"),
        ("a/b", "a slash"),
        ("a\0b", "a zero byte"),
        ("a\ud800", "half of a surrogate pair"),
    ],
)
def test_names_of_files(tmp_path: Path, name: str, fault: str | None) -> None:
    assert (fault is None and file_name_fault(name) is None) or str(fault) in str(file_name_fault(name))
    if fault is None:
        (tmp_path / name).touch()
    else:
        with pytest.raises((OSError, ValueError)):
            (tmp_path / name).touch()


def test_json_lines_stay_whole(tmp_path: Path) -> None:
    suite = geneval(COCO)
    assert read(tmp_path, "x.jsonl", to_jsonl(suite)) == suite
    long = {"prompt": "a long description of a cat", "name": "a cat", "anything": [1, None]}
    assert read(tmp_path, "x.jsonl", f"\n{json.dumps(long)}\r\n\n{json.dumps(long)}") == [long, long]


def test_tables(tmp_path: Path) -> None:
    content = 'id,prompt,name\n1,"a cat, ""asleep""\nin the sun",cat\n\n2, a dog ,\n'
    assert read(tmp_path, "x.csv", content) == [
        {"prompt": 'a cat, "asleep"\nin the sun', "name": "cat"},
        {"prompt": "a dog"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", b"a cat\na d\xffg\n", "x.txt, line 2: not UTF-8"),
        ("x.txt", "", "x.txt holds no prompts"),
        ("x.txt", " \n\n", "x.txt holds no prompts"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt"\n', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", "[" * 10**5, "x.jsonl, line 1: not JSON"),
        ("x.jsonl", "1" * 5000, "x.jsonl, line 1: not JSON"),
        ("x.jsonl", '{"prompt": "a", "seed": Infinity}', "x.jsonl, line 1: not JSON (Infinity is no number of JSON)"),
        ("x.jsonl", "\n[]", "x.jsonl, line 2: expected an object"),
        ("x.jsonl", '{"text": "a"}', "x.jsonl, line 1: 'prompt' must be a text"),
        ("x.jsonl", '{"prompt": " "}', "x.jsonl, line 1: 'prompt' must be a text"),
        ("x.jsonl", '{"prompt": "a", "name": 3}', "x.jsonl, line 1: 'name' must be a text"),
        ("x.jsonl", '{"prompt": "\\ud800"}', "x.jsonl, line 1: 'prompt' holds half of a surrogate"),
        ("x.csv", "text\na cat\n", "x.csv, line 1: no column `prompt`, but text"),
        ("x.csv", "", "x.csv, line 1: no column `prompt`, but nothing"),
        ("x.csv", "prompt\n", "x.csv holds no prompts"),
        ("x.csv", 'prompt,name\na cat,b\n"",b\n', "x.csv, line 3: 'prompt' must be a text"),
        ("x.csv", 'prompt\na\n"b" c\n', "x.csv, line 3: not a table"),
        ("x.json", "[]", "expected the suffix .txt, .jsonl, .csv"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, name: str, content: bytes | str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, content)
    assert said in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        read_prompt_file(tmp_path / "nowhere.txt")
