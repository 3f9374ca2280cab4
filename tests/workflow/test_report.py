"""`snakemake --report`: the page, tables and figures with the words of the page; and the picture of the rules."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from rcm.report.legends import LEGENDS

ROOT = Path(__file__).parents[2]
FIGURES = {f"figure_{name}" for name in ("samples", "clips", "quality_diversity", "steps", "training", "precision")}
Run = Callable[..., str]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a workflow needs, without results."""
    for name in ("workflow", "config", "src", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    return tmp_path


@pytest.fixture
def snakemake(clone: Path) -> Run:
    environment = {**os.environ, "PYTHONPATH": f"{clone / 'src'}{os.pathsep}{clone / 'kernels'}"}

    def call(*words: str) -> str:
        command = [sys.executable, "-m", "snakemake", *words]
        run = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout + run.stderr

    return call


@pytest.mark.slow
def test_report(snakemake: Run, clone: Path) -> None:
    """Table 3, made for real, stands in for the others: its Markdown has all that may trouble the markup."""
    snakemake("-c1", "table3")
    assert "Nothing to be done" in snakemake("-n", "table3")  # though its caption was empty when it ran
    tables, figures = clone / "results/tiny/tables", clone / "results/tiny/figures"
    words = (tables / "table3.md").read_text(encoding="utf-8")
    hostile = "## A_title\n\nUnder_scores_, *stars*, `ticks`, a|bar, {{ braces }} and a \\ stroke.\n\n| a* |\n| b_ |"
    (tables / "table3.md").write_text(f"{words}\n{hostile}\n", encoding="utf-8")
    for name in ("table1", "table2"):
        for ending in ("csv", "md", "tex"):
            shutil.copy(tables / f"table3.{ending}", tables / f"{name}.{ending}")
    figures.mkdir()
    for name in FIGURES:
        shutil.copy(ROOT / "docs/samples.png", figures / f"{name}.png")
    (clone / "results/tiny/report.html").write_text("<p>the page</p>")

    snakemake("--report", "report.zip")
    with ZipFile(clone / "report.zip") as archive:
        page = archive.read("report/report.html").decode()
        kept = [name for name in archive.namelist() if name.endswith("/report.html") and name != "report/report.html"]
        assert [archive.read(name) for name in kept] == [b"<p>the page</p>"]
    found = re.search(r"(?:var|const|let) results = (\{.*\});?\n", page)
    assert found, "the report has another form than expected"
    shown = {Path(name).name: said for name, said in json.loads(found[1]).items()}
    assert shown.keys() == {
        *("report.html", "table1.csv", "table1.md", "table1.tex", "table2.csv", "table2.md", "table2.tex"),
        *(f"{name}.png" for name in FIGURES),
    }

    def text(name: str) -> str:
        return " ".join(html.unescape(re.sub(r"<[^>]+>", "", shown[name]["caption"])).split())

    for name in FIGURES:
        assert text(f"{name}.png") == LEGENDS[name]
    told = " ".join(re.sub(r"^#+ ", "", f"{words}\n{hostile}", flags=re.MULTILINE).split())
    assert text("table1.csv") == text("table2.tex") == told
    assert shown["table1.csv"]["caption"].count("<pre") == f"{words}{hostile}".count("\n\n|")
    assert "system-message" not in page


@pytest.mark.slow
def test_the_picture_of_the_rules_is_current(snakemake: Run, clone: Path) -> None:
    draw = [sys.executable, clone / "workflow/scripts/draw_rules.py"]
    made = subprocess.run(draw, input=snakemake("--rulegraph", "mermaid-js"), capture_output=True, text=True)
    assert made.stdout == (ROOT / "docs/rules.svg").read_text(encoding="utf-8"), "draw docs/rules.svg again"
