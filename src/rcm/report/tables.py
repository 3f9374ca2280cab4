"""Tables 1 (images), 2 (clips), 3 (published only) and of small text, as tidy CSV, Markdown and LaTeX.

Scores become tidy rows (`rows`, the CSV), rows become panels (`panels`, what a person reads), and panels are printed as
Markdown and LaTeX here and as HTML by `page`. Numbers of the paper and numbers of this run never share a column.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from rcm.artefact import UserError
from rcm.evaluation.scores import check_controls
from rcm.report import rows as tidy
from rcm.report.panels import SUBJECTS, Cell, Panel, heading, panels
from rcm.report.scores import Score, run_of

MEDIA = {"table1": ("images",), "table2": ("clips",), "table3": (), "table_text": ("images", "clips")}


def make_table(
    name: str,
    scores: Sequence[Score],
    controls: Sequence[Score],
    published: Path | None,
    *,
    throughput: Sequence[Score] = (),
    **limits: float,
) -> dict[str, str]:
    """One of the tables as {"csv", "md", "tex"}, each the text of a file.

    Args:
        name: table1 (images) | table2 (clips) | table3 (published rows alone) | table_text (small text).
        scores: the score JSONs of teacher and students; a key `file` is what errors call one.
        controls: those of oracle, codec and shuffled, which ShapeEval needs.
        published: the CSV of the paper's own table, which gets a panel of its own; None for a table the paper lacks.
        throughput: the JSONs of `rcm throughput`, for a column of frames per second.
        limits: of `check_controls`.

    Raises `UserError` when the controls fail, for then the evaluator, not a model, was measured; and for scores that
    this version of the evaluator did not make.
    """
    if name not in SUBJECTS:
        raise UserError(f"there is no table {name!r}; expected one of {', '.join(SUBJECTS)}")
    strangers = sorted({str(score["media"]) for score in [*scores, *controls, *throughput]} - {*MEDIA[name]})
    if strangers:
        about = f"about {SUBJECTS[name]}" if MEDIA[name] else "of published rows alone"
        raise UserError(f"{name} is {about}, but was given scores of {', '.join(strangers)}")
    if MEDIA[name] and not scores:
        raise UserError(f"{name} was given no scores; make them with `rcm evaluate`")
    if not MEDIA[name] and published is None:
        raise UserError(f"{name} is made of published rows alone; give their file with --published")
    for score in (*scores, *controls):
        if any(key.startswith("text.") for key in score["metrics"]) != (name == "table_text"):
            what, where = ("no small text", "other tables") if name == "table_text" else ("small text", "table_text")
            raise UserError(f"{tidy.file_of(score)} holds scores of {what}, which belong in {where}, not in {name}")
    if any("shapeeval.overall" in score["metrics"] for score in scores):
        _check(name, controls, limits)
    rows = tidy.measured(name, scores, controls)
    rows += tidy.throughput(name, throughput, rows)
    rows += tidy.published(name, published) if published else []
    made = panels(rows)
    return {"csv": tidy.to_csv(rows), "md": to_markdown(name, made), "tex": to_latex(name, made)}


def _check(name: str, controls: Sequence[Score], limits: dict[str, float]) -> None:
    by_name = {run_of(str(control["model"]), 0).method: control for control in controls}
    missing = [control for control in ("oracle", "shuffled") if control not in by_name]
    if missing:
        raise UserError(f"{name} needs the scores of the control {missing[0]}: without it a score means nothing")
    check_controls(by_name["oracle"], by_name["shuffled"], **limits)


def to_markdown(name: str, made: Iterable[Panel]) -> str:
    """Panels as Markdown tables, padded so that they also read as plain text."""
    parts = [f"# {heading(name)}"]
    for panel in made:
        head = [title.replace("\n", ", ") for title in panel.head]
        grid = []
        for block, printed in panel.groups:
            if len(panel.groups) > 1 and block != panel.groups[0][0]:
                grid.append([f"*{block}*", *[""] * (len(panel.head) - 1)])
            grid += [[f"{cell.text} {cell.note}".strip().replace("|", "\\|") for cell in line] for line in printed]
        widths = [max(len(line[i]) for line in [head, *grid]) for i in range(len(head))]
        left = [i < panel.names for i in range(len(widths))]
        rule = ["-" * w if is_left else "-" * (w - 1) + ":" for w, is_left in zip(widths, left, strict=True)]

        def line(cells: Sequence[str], widths: list[int] = widths, left: list[bool] = left) -> str:
            padded = (c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(cells, widths, left, strict=True))
            return "| " + " | ".join(padded) + " |"

        parts += [f"## {panel.title}", panel.caption, *([panel.provenance] if panel.provenance else [])]
        parts.append("\n".join([line(head), line(rule), *map(line, grid)]))
    return "\n\n".join(parts) + "\n"


_TEX = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
}
_TEX |= {"×": r"$\times$", "÷": r"$\div$", "≥": r"$\ge$", "λ": r"$\lambda$", "σ_max": r"$\sigma_{\max}$", "−": "$-$"}
_TEX |= {"-": "$-$", "–": "--", "…": r"\dots{}", "“": "``", "”": "''", "~": r"\textasciitilde{}"}  # - only where a sign


def _tex(text: str) -> str:
    made = re.sub(r"σ_max|(?<![\w)])-(?=\d)|[^\w\s-]|_|λ", lambda match: _TEX.get(match.group(), match.group()), text)
    return unicodedata.normalize("NFKD", made).encode("ascii", "ignore").decode()  # what a driver or a file is called


def _tex_heading(text: str) -> str:
    lines = r" \\ ".join(_tex(line) for line in text.split("\n"))
    return rf"\shortstack[r]{{{lines}}}" if "\n" in text else lines


def _tex_cell(cell: Cell, stacked: bool) -> str:
    if not cell.note:
        return _tex(cell.text)
    note = rf"{{\tiny {_tex(cell.note)}}}"
    below = rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{_tex(cell.text)} \\ {note}\end{{tabular}}"
    return below if stacked else f"{_tex(cell.text)} {note}"


def to_latex(name: str, made: Iterable[Panel]) -> str:
    r"""Panels as LaTeX tables; they need `\usepackage{booktabs}` and nothing else."""
    parts = [f"% {name}: needs \\usepackage{{booktabs}}"]
    for index, panel in enumerate(made):
        caption = rf"\textbf{{{_tex(panel.title)}.}} {_tex(f'{panel.caption} {panel.provenance}'.strip())}"
        columns = "@{}" + "".join("l" if i < panel.names else "r" for i in range(len(panel.head))) + "@{}"
        body = []
        for block, printed in panel.groups:
            body.append(r"\midrule")
            if len(panel.groups) > 1:
                body.append(rf"\multicolumn{{{len(panel.head)}}}{{@{{}}l}}{{\emph{{{_tex(block)}}}}} \\")
            for line in printed:
                body.append(" & ".join(_tex_cell(cell, panel.stacked) for cell in line) + r" \\")
        parts.append(
            "\n".join(
                [
                    r"\begin{table}[p]\centering",
                    rf"\caption{{{caption}}}\label{{tab:{name}-{index + 1}}}",
                    r"\scriptsize\setlength{\tabcolsep}{3pt}",
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    " & ".join(map(_tex_heading, panel.head)) + r" \\",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"
