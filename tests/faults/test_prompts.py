"""200 hostile prompts through every stage that has prompts: as many samples as prompts, each score with its own."""

import csv
import io
import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.conftest import Mini, Run, fail, mini, run  # noqa: F401  fixtures
from tests.cli.test_score import BY, KNOWN

from rcm.artefact import beside
from rcm.cli.pictures import encode
from rcm.data.world import COLORS, SHAPES
from rcm.evaluation.measured import write_measured
from rcm.evaluation.samples import list_samples
from rcm.text import Embeddings

COUNT = 200
FIRST = [  # one of each task: those that figures and the page show
    "<script>alert(1)</script><img src=x onerror=alert(1)></td></table>",
    "x" * 10_000,
    "$\\frac{1}{$(touch sprung)}$ {{ 7 * 7 }} {% raw %} `touch sprung`",
    '=HYPERLINK("http://localhost/?"&A1,"open") | cell | cell',
    "\u202eright to left\u202c שלום مرحبا \u200f\u061c",
    "-rf --out /etc/passwd; touch sprung\r\n\x00\x1b[2J\x07 ../../../../sprung",
]
PIECES = [
    *("🟥", "👩‍👩‍👧‍👦", "🏳️‍🌈", "e\u0301\u0327\u0330", "z\u0335\u0321\u0358" * 40, "Å Å ﬁ ½", "日本語の赤い丸", "Ω≈ç√∫"),
    *("\u202e", "\u2066abc\u2069", "עברית", "العربية", "\ufeff", "\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x00"),
    *("\n", "\r", "\r\n", "\t", "\\n", "\\", "/", "//", "..", "../..", "C:\\nul", "~", "~root", "%2e%2e%2f", "a/b\\c"),
    *(
        "'",
        '"',
        "`",
        "''",
        '""',
        "$(touch sprung)",
        "`touch sprung`",
        "; touch sprung",
        "| touch sprung",
        "$HOME",
        "${x}",
    ),
    *(
        "-",
        "--",
        "--out",
        "-rf",
        "@file",
        "#",
        "&",
        "&amp;",
        "<",
        ">",
        "<b>",
        "</script>",
        "<!--",
        "]]>",
        "<svg onload=x>",
    ),
    *(
        "{",
        "}",
        "{0}",
        "%s",
        "%(x)s",
        "{{x}}",
        "null",
        "NaN",
        '{"prompt": "x"}',
        "[]",
        "\\frac{a}{b}",
        "$x_1^2$",
        "\\\\",
    ),
    *(
        "| a | b |",
        "**bold**",
        "[x](javascript:alert(1))",
        "![](x)",
        "=1+1",
        "+1",
        "@SUM(A1)",
        "\t=1",
        ",",
        ";",
        '",",',
    ),
    *("\ud7ff\ue000", "\U0010ffff", "\uffff", "ü" * 300, "word " * 300, "_", "*", "?", "[a-z]", "None", "0"),
]


def hostile() -> list[str]:
    """200 texts: the worst alone, then others put together, and some that are there twice."""
    chance, prompts = random.Random(0), [*FIRST, *(piece for piece in PIECES if piece.strip())]
    while len(prompts) < COUNT - 10:
        prompts.append("".join(chance.choices(PIECES, k=chance.randint(2, 6))) + chance.choice(["", "x"]))
    prompts = [prompt if prompt.strip() else f"{prompt}." for prompt in prompts]
    return [*prompts[: COUNT - 10], *prompts[:10]]


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def asked(index: int, prompt: str) -> dict[str, Any]:
    """GenEval's metadata, of a scene that follows from the number; no two neighbours have the same."""
    shape, color = list(SHAPES)[index % len(SHAPES)], list(COLORS)[index % len(COLORS)]
    task = TASKS[index] if index < len(TASKS) else "colors"
    return {"prompt": prompt, "tag": task, "include": [{"class": shape, "color": color, "count": 1}]}


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    found = [asked(index, prompt) for index, prompt in enumerate(hostile())]
    assert len(found) == COUNT and len({line["prompt"] for line in found}) == COUNT - 10
    return found


def written(path: Path, lines: list[dict[str, Any]], *, ascii: bool = True) -> Path:
    path.write_text(
        "".join(json.dumps(line, ensure_ascii=ascii) + "\n" for line in lines), encoding="utf-8", newline=""
    )
    return path


CLIPS = ["experiment=tiny-clips", "suite=report", "suites.report.samples=1", "evaluation.bootstrap=2"]
CLIPS += ["evaluation.oracle_at_least=0", "evaluation.floor_at_most=1"]


class Page(HTMLParser):
    """Elements and texts, as a browser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, list[str]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, [name for name, _ in attrs]))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.slow
def test_from_prompts_to_the_report(
    mini: Mini,  # noqa: F811
    run: Run,  # noqa: F811
    lines: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts, text = tmp_path / "report.jsonl", tmp_path / "report.safetensors"
    run("prompts", *CLIPS, "--source", written(tmp_path / "hostile.jsonl", lines, ascii=False), "--out", prompts)
    assert [json.loads(line) for line in prompts.read_text(encoding="utf-8").split("\n") if line] == lines
    run("embed", *CLIPS, "--prompts", prompts, "--out", text)
    assert set(Embeddings(text).prompts) >= {line["prompt"] for line in lines}

    folder = Path("data/tiny/clips/samples")
    students = ("--checkpoint", mini.clips, "--text", text, "--steps", 1)
    models = {"rcm-0-1": students, "oracle-0": ("--control", "oracle", "--steps", 0)}
    for model, by in models.items():
        for part in ("1-of-2", "2-of-2"):
            out = ("--part", part, "--out", folder / model / "report" / part)
            run("sample", *CLIPS, "inference.batch=50", "--codec", mini.codec, "--prompts", prompts, *by, *out)
        parts = sorted((folder / model / "report").glob("*-of-2"))
        found = list_samples(parts)
        assert [(item.index, item.metadata) for item in found] == list(enumerate(lines))
        assert sum(len(item.paths) for item in found) == COUNT

    wrong = {3, 7, 60, 61, 150, COUNT - 1}  # of ground truth, these become noise
    for index in wrong:
        (path,) = folder.glob(f"oracle-0/report/*/{index:05d}/samples/0000.png")
        noise = np.random.default_rng(index).integers(0, 256, (9, 24, 24, 3)).astype(np.uint8)
        path.write_bytes(encode(noise, ".png"))
        beside(path.parents[2], ".prov.json").unlink(missing_ok=True)
    scores = Path("results/tiny/clips/scores")
    for model in models:
        out, results = scores / f"{model}.json", scores / f"{model}.results.jsonl"
        given = ("--samples", *sorted((folder / model / "report").glob("*-of-2")), "--prompts", prompts)
        run("evaluate", *CLIPS, *given, "--out", out, "--results", results)
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        assert [(row["prompt"], row["filename"]) for row in rows] == [
            (line["prompt"], f"{index:05d}/samples/0000.png") for index, line in enumerate(lines)
        ]
        values = json.loads(out.read_text())["per_prompt"]["shapeeval.overall"]
        if model == "oracle-0":
            assert {index for index, row in enumerate(rows) if not row["correct"]} == wrong
            assert {index for index, value in enumerate(values) if value < 0.5} == wrong

    blind = json.loads((scores / "oracle-0.json").read_text()) | {"model": "shuffled"}
    (scores / "shuffled-0.json").write_text(json.dumps(blind))  # a table wants this control
    made = sorted(scores.glob("*-[01].json"))
    controls = ("--controls", *(path for path in made if not path.name.startswith("rcm")))
    published = ("--published", Path(__file__).parents[2] / "config/published/table2.csv")
    tables = Path("results/tiny/tables")
    run(
        "table",
        *CLIPS,
        "--name",
        "table2",
        "--scores",
        scores / "rcm-0-1.json",
        *controls,
        *published,
        "--out-dir",
        tables,
    )
    rows = list(csv.reader(io.StringIO((tables / "table2.csv").read_text(), newline="")))
    assert len({len(row) for row in rows}) == 1
    run(
        "figure",
        "--name",
        "figure_clips",
        "--inputs",
        *folder.glob("*/report/*-of-2"),
        "--out",
        "results/tiny/figures/figure_clips.png",
    )
    run(
        "report",
        "experiment=tiny-clips",
        "--scores",
        *made,
        "--results",
        "results/tiny",
        "data/tiny",
        "--out",
        "page.html",
    )
    page = Page(Path("page.html").read_text(encoding="utf-8"))
    plain = Page(Path("page.html").read_text(encoding="utf-8").replace("alert(1)", ""))
    assert [name for name, _ in page.elements] == [name for name, _ in plain.elements]
    assert not [names for _, names in page.elements if any(name.startswith("on") for name in names)]
    assert all(any(prompt.split()[0] in text for text in page.texts) for prompt in FIRST)
    assert not list(tmp_path.rglob("sprung*"))


def test_stored_measurements_keep_their_prompts(run: Run, lines: list[dict[str, Any]], tmp_path: Path) -> None:  # noqa: F811
    """Of a scale of real models: what was seen in sample 17 is told of prompt 17."""
    prompts = written(tmp_path / "report.jsonl", lines)
    rows = [
        {
            "prompt": index,
            "filename": f"{index:05d}/samples/0000.png",
            "metadata": {**line, "tag": "single_object"},
            "detections": [[line["include"][0]["class"], 0.0, 0.0, 9.0, 9.0, 0.95, line["include"][0]["color"]]]
            if index % 3
            else [],
        }
        for index, line in enumerate(lines)
    ]
    written(prompts, [row["metadata"] for row in rows])
    stored = tmp_path / "measured.jsonl"
    write_measured(stored, {"measured": "geneval", "by": BY, "known": KNOWN, "sampling": None}, rows)
    big = ["experiment=cosmos-predict2-2b-images", "suites.report.samples=1", "evaluation.bootstrap=2"]
    out = ("--out", tmp_path / "rcm-0-4.json", "--results", tmp_path / "results.jsonl")
    run("evaluate", *big, "--measured", stored, "--prompts", prompts, *out)
    values = json.loads((tmp_path / "rcm-0-4.json").read_text())["per_prompt"]["geneval.overall"]
    assert [index for index, value in enumerate(values) if not value] == list(range(0, COUNT, 3))
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in results] == [line["prompt"] for line in lines]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_every_kind_of_file_gives_the_prompts_that_it_holds(
    suffix: str,
    run: Run,  # noqa: F811
    lines: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """A text has a prompt a line, and no blanks about it; what has line breaks cannot stand in it."""
    source, texts = tmp_path / f"hostile{suffix}", [line["prompt"] for line in lines]
    if suffix == ".txt":
        texts = [text.strip() for text in texts if "\n" not in text and text.strip()]
        source.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8", newline="")
    elif suffix == ".csv":
        texts = [text.strip() for text in texts if "\0" not in text]
        with source.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["prompt"], *([text] for text in texts)])
    else:
        written(source, lines)
    run("prompts", "suite=report", "--source", source, "--out", tmp_path / "report.jsonl")
    made = (tmp_path / "report.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["prompt"] for line in made if line] == texts


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "\\ud800"}',
        '{"prompt": "a\\udfff"}',
        '{"prompt": "   "}',
        '{"prompt": ""}',
        '{"prompt": 3}',
        "[]",
        "NaN",
        "[" * 100_000,
        '{"prompt": "a',
        '{"prompt": "a"} {"prompt": "b"}',
        "\ufffe",
        '{"name": "a"}',
        '"a"',
    ],
    ids=lambda line: line[:16],
)
def test_what_is_no_prompt_is_refused_by_its_line(line: str, fail: Run, tmp_path: Path) -> None:  # noqa: F811
    source = tmp_path / "hostile.jsonl"
    source.write_text(f'{{"prompt": "a red circle"}}\n{line}\n', encoding="utf-8")
    said = fail("prompts", "suite=report", "--source", source, "--out", tmp_path / "report.jsonl")
    assert f"{source}, line 2: " in said and not (tmp_path / "report.jsonl").exists()
