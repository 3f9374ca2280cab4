"""Tables say what the scores say, keep the paper's numbers apart, and refuse when the controls fail."""

import csv
import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcm.artefact import UserError
from rcm.evaluation.scores import evaluate
from rcm.report.panels import panels
from rcm.report.rows import from_csv, to_csv
from rcm.report.scores import CONTROLS
from rcm.report.tables import make_table

Scores = dict[str, list[dict[str, Any]]]


def split(scores: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [s for s in scores if s["model"] not in CONTROLS], [s for s in scores if s["model"] in CONTROLS]


@pytest.fixture(scope="module")
def made(scores: Scores, published: Path) -> dict[str, dict[str, str]]:
    return {
        "table1": make_table("table1", *split(scores["images"]), published),
        "table2": make_table("table2", *split(scores["clips"]), published),
    }


def test_csv_holds_every_number(made: dict[str, dict[str, str]], scores: Scores) -> None:
    rows = list(csv.DictReader(io.StringIO(made["table1"]["csv"])))
    found = {(r["model"], r["seed"], r["steps"], r["metric"]): r for r in rows}
    for score in split(scores["images"])[0]:
        model, _, seed = score["model"].partition("-")
        for metric, entry in score["metrics"].items():
            row = found[model, seed, str(score["steps"]), metric]
            if entry["value"] is None:
                assert row["value"] == row["low"] == row["high"] == ""
                continue
            assert float(row["value"]) == pytest.approx(entry["value"], abs=1e-6)
            assert float(row["low"]) == pytest.approx(entry["low"], abs=1e-6)
            assert row["kind"] == entry["kind"]
    teacher = next(s for s in scores["images"] if s["model"] == "teacher")["metrics"]["shapeeval.overall"]["value"]
    rcm = next(s for s in scores["images"] if s["model"] == "rcm-0" and s["steps"] == 4)
    share = found["rcm", "0", "4", "shapeeval.relative_to_teacher"]
    assert float(share["value"]) == pytest.approx(rcm["metrics"]["shapeeval.overall"]["value"] / teacher, abs=1e-6)
    assert float(share["low"]) < float(share["value"]) < float(share["high"])


def test_csv_is_read_back_as_written(made: dict[str, dict[str, str]]) -> None:
    for texts in made.values():
        assert to_csv(from_csv(texts["csv"])) == texts["csv"]


def test_order_of_inputs_does_not_matter(made: dict[str, dict[str, str]], scores: Scores, published: Path) -> None:
    models, controls = split(scores["images"])
    assert make_table("table1", models[::-1], controls[::-1], published) == made["table1"]


def test_published_numbers_have_panels_of_their_own(made: dict[str, dict[str, str]]) -> None:
    for texts in made.values():
        *own, paper = panels(from_csv(texts["csv"]))
        assert paper.published and not any(panel.published for panel in own)
        for panel in own:
            assert "GenEval" not in panel.title and "VBench" not in panel.title
            assert not any("GenEval" in head or "VBench" in head for head in panel.head)
        assert [cell.text for cell in paper.groups[0][1][2]][:5] == [
            *("Cosmos-Predict2 + rCM", "0.6B, 1360×768", "4", "0.79", "1.00")  # digits as printed
        ]
        assert paper.groups[0][1][1][2].text == "35×2"


def test_shapebench_names_the_kind(made: dict[str, dict[str, str]]) -> None:
    panel = next(p for p in panels(from_csv(made["table2"]["csv"])) if p.title == "ShapeBench")
    assert {line[0].text: line[1].text for _, lines in panel.groups for line in lines} == {
        "Dynamic degree": "substituted model",
        "Temporal flickering": "same formula",
        "Motion": "analogue",
    }


def test_markdown_rows_have_the_columns_of_their_heading(made: dict[str, dict[str, str]]) -> None:
    for texts in made.values():
        for block in texts["md"].split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1


def test_seeds_get_rows_of_their_own_and_a_mean(
    scored: Callable[..., dict[str, Any]], scores: Scores, published: Path
) -> None:
    _, controls = split(scores["images"])
    models = [scored("rcm-0", 4, "images", 0.8), scored("rcm-1", 4, "images", 0.9, seed=1)]
    rows = from_csv(make_table("table1", models, controls, published)["csv"])
    overall = {row.seed: float(row.value) for row in rows if (row.model, row.metric) == ("rcm", "shapeeval.overall")}
    assert overall["mean"] == pytest.approx((overall["0"] + overall["1"]) / 2, abs=1e-6)
    assert panels(rows)[0].head[1] == "Seed"


@pytest.mark.parametrize(("model", "quality"), [("oracle", 0.90), ("shuffled", 0.30)])
def test_no_table_when_the_controls_fail(
    model: str, quality: float, scored: Callable[..., dict[str, Any]], scores: Scores, published: Path
) -> None:
    models, controls = split(scores["images"])
    controls = [c for c in controls if c["model"] != model] + [scored(model, 0, "images", quality)]
    with pytest.raises(UserError, match=r"ground truth has|renders of other prompts have"):
        make_table("table1", models, controls, published)
    assert make_table("table1", models, controls, published, oracle_at_least=0.5, floor_at_most=0.5)


def test_no_table_without_controls(scores: Scores, published: Path) -> None:
    with pytest.raises(UserError, match="oracle"):
        make_table("table1", split(scores["images"])[0], [], published)


@pytest.mark.parametrize(("media", "name"), [("images", "table1"), ("clips", "table2")])
def test_scores_of_the_evaluation_fit(
    media: str, name: str, sampled: Callable[..., Path], published: Path, tmp_path: Path
) -> None:
    found = {}
    for model, steps, quality in (("teacher", 20, 1.0), ("rcm-0", 4, 1.0), ("oracle", 0, 1.0), ("shuffled", 0, 0.0)):
        folder = sampled(tmp_path / f"{model}-{steps}" / "report" / "1-of-1", media, quality, per_task=1)
        found[model] = evaluate([folder], media=media, model=model, steps=steps, resamples=50).scores
    made = make_table(name, [found["teacher"], found["rcm-0"]], [found["oracle"], found["shuffled"]], published)
    rows = {(row.model, row.metric): row for row in from_csv(made["csv"])}
    assert float(rows["rcm", "shapeeval.relative_to_teacher"].value) == pytest.approx(1.0)
    measured = {row.metric for row in rows.values() if row.block != "published"}
    assert measured == {*found["oracle"]["metrics"], "shapeeval.relative_to_teacher"}
    shown = {(line[0].text) for panel in panels(list(rows.values())) for _, lines in panel.groups for line in lines}
    assert "rCM" in shown and "Ground truth" in shown
    if media == "clips":
        assert {"Dynamic degree", "Temporal flickering", "Spatial relationship strict", "Colour"} <= shown


def test_mistakes_are_one_sentence(scores: Scores, published: Path, tmp_path: Path) -> None:
    models, controls = split(scores["images"])
    with pytest.raises(UserError, match="table3"):
        make_table("table3", models, controls, published)
    with pytest.raises(UserError, match="clips"):
        make_table("table2", models, controls, published)
    with pytest.raises(UserError, match="nowhere"):
        make_table("table1", models, controls, tmp_path / "nowhere.csv")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="group"):
        make_table("table1", models, controls, tmp_path / "bad.csv")


def test_latex_escapes_what_it_must(made: dict[str, dict[str, str]]) -> None:
    tex = made["table1"]["tex"]
    assert r"SD\_X \& L" in tex
    assert "×" not in tex and "÷" not in tex and "–" not in tex
    assert tex.count("{") == tex.count("}")
    assert tex.isascii()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_within_the_page(made: dict[str, dict[str, str]], tmp_path: Path) -> None:
    body = "\n\\clearpage\n".join(texts["tex"] for texts in made.values())
    head = r"\documentclass{article}\usepackage[margin=2.2cm]{geometry}\usepackage{booktabs}\begin{document}"
    (tmp_path / "page.tex").write_text(head + body + r"\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, errors="replace")
    assert run.returncode == 0, run.stdout[-2000:]
    assert "Overfull \\hbox" not in run.stdout
