"""Tables 1 (images) and 2 (clips) as tidy CSV, Markdown and LaTeX.

Scores become tidy rows (one number a row: the CSV), rows become panels (what a person reads), and panels are printed as
Markdown and LaTeX here and as HTML by `page`. Numbers of the paper and numbers of this run never share a panel.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rcm.artefact import UserError
from rcm.data.prompts import TASKS
from rcm.evaluation.scores import check_controls
from rcm.report.scores import (
    Estimate,
    Run,
    Score,
    compare,
    in_order,
    label,
    number,
    ratio,
    reported,
    run_of,
)

RELATIVE = "shapeeval.relative_to_teacher"
SUBJECTS = {"table1": "images", "table2": "clips"}
PUBLISHED = {
    "table1": "GenEval, as printed in Table 1 of the rCM paper",
    "table2": "VBench, as printed in Table 2 of the rCM paper",
}
_SETTING = (
    "group",
    "model",
    "params",
    "resolution",
    "steps",
    "guided",
)  # columns of a published table that are no metric
FAMILIES = {  # panels in their order: families of metrics, title, and what to know about them
    "shapebench": (
        ("shapebench",),
        "ShapeBench",
        "Raw means; intervals are in the CSV. A still or blurred clip can score above ground truth on flicker, "
        "smoothness and consistency, so these are read together with dynamic degree and sharpness. Kind says how near "
        "a measure is to VBench's: the same formula, another model in it, or an analogue.",
    ),
    "shapeeval_frames": (
        ("shapeeval_frames",),
        "ShapeEval of frames",
        "Clips judged by their frames alone, whatever moves.",
    ),
    "diversity": (
        ("diversity", "pixels"),
        "Diversity",
        "Over samples of one prompt, on what the caption leaves open; only samples that satisfy the caption count. "
        "Vendi is the effective number of different samples among eight, entropies are in bits. The pixel distance is "
        "secondary: noise raises it.",
    ),
    "prior": (
        ("prior",),
        "Distance from the world",
        "Total variation between the samples' hidden factors and the world's, less is better. With so few samples even "
        "ground truth is not at 0, so compare with it.",
    ),
    "fidelity": (
        ("fidelity",),
        "Fidelity",
        "A sample against the same scene drawn ideally: PSNR in decibels, and sharpness of edges, 1 for ideal ones. "
        "Neither asks for the caption.",
    ),
}
_HEADINGS = {"fps": "FPS"}


@dataclass(frozen=True)
class Row:
    """One number of a table with all that says what it is; text, so that a file is read back as it was written."""

    table: str
    block: str  # models | controls | published
    model: str
    seed: str
    setting: str
    steps: str
    metric: str
    kind: str
    value: str
    low: str
    high: str
    n_prompts: str
    n_samples: str
    evaluator: str
    prompts_sha256: str


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a panel; `note` is the interval, printed smaller where that can be done."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """A table as a person reads it: groups of rows, each under its heading; headings of columns may have several lines.

    The first `names` columns say what a row is about.
    """

    title: str
    caption: str
    head: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
    names: int
    published: bool = field(default=False)


def make_table(
    name: str, scores: Sequence[Score], controls: Sequence[Score], published: Path, **limits: float
) -> dict[str, str]:
    """`table1` (images) or `table2` (clips) as {"csv", "md", "tex"}, each the text of a file.

    `scores` are the score JSONs of teacher and students, `controls` those of oracle, codec and shuffled, `published`
    the CSV of the paper's own table, which gets a panel of its own. Raises `UserError` when the controls fail, by
    `limits` of `check_controls`: then the evaluator, not a model, was measured.
    """
    if name not in SUBJECTS:
        raise UserError(f"there is no table {name!r}; expected one of {', '.join(SUBJECTS)}")
    strangers = sorted({str(score["media"]) for score in [*scores, *controls]} - {SUBJECTS[name]})
    if strangers:
        raise UserError(f"{name} is about {SUBJECTS[name]}, but was given scores of {', '.join(strangers)}")
    by_name = {run_of(str(control["model"]), 0).method: control for control in controls}
    missing = [control for control in ("oracle", "shuffled") if control not in by_name]
    if missing:
        raise UserError(f"{name} needs the scores of the control {missing[0]}: without it a score means nothing")
    check_controls(by_name["oracle"], by_name["shuffled"], **limits)
    rows = [*_measured(name, "models", scores), *_measured(name, "controls", controls), *_published(name, published)]
    made = panels(rows)
    return {"csv": to_csv(rows), "md": to_markdown(name, made), "tex": to_latex(name, made)}


def _measured(table: str, block: str, scores: Iterable[Score]) -> list[Row]:
    """Rows of every metric of every score, seeds of one method followed by their mean."""
    ordered = in_order(scores)
    teacher = next((score for run, score in ordered if run.method == "teacher"), None)
    rows: list[Row] = []
    for run, score in ordered:
        rows += _rows(table, block, run, str(run.seed if run.seed is not None else ""), [score], teacher)
        peers = [other for peer, other in ordered if (peer.method, peer.steps) == (run.method, run.steps)]
        if len(peers) > 1 and score is peers[-1]:
            rows += _rows(table, block, run, "mean", peers, teacher)
    return rows


def _rows(table: str, block: str, run: Run, seed: str, scores: Sequence[Score], teacher: Score | None) -> list[Row]:
    first = scores[0]
    evaluator = first.get("evaluator", {})

    def row(metric: str, kind: str, estimate: Estimate) -> Row:
        value, low, high = ("" if x != x else f"{x:.6f}" for x in (estimate.value, estimate.low, estimate.high))
        counts = str(first["n_prompts"]), str(first["n_samples"])
        steps = "" if block == "controls" else str(run.steps)
        about = str(evaluator.get("version", "")), str(evaluator.get("prompts_sha256", ""))
        return Row(table, block, run.method, seed, "", steps, metric, kind, value, low, high, *counts, *about)

    rows = []
    for key, entry in first["metrics"].items():
        if len(scores) == 1:
            estimate = reported(first, key)
        else:
            values = [reported(score, key).value for score in scores]
            estimate = compare(lambda mean: mean, key, scores) or Estimate(sum(values) / len(values))
        rows.append(row(key, str(entry.get("kind", "")), estimate))
        if key == "shapeeval.overall" and block == "models" and teacher is not None and run.method != "teacher":
            relative = compare(ratio, key, scores, [teacher])
            if relative is not None:
                rows.append(row(RELATIVE, "derived", relative))
    return rows


def _published(table: str, path: Path) -> list[Row]:
    try:
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except OSError as error:
        raise UserError(f"the published table {path} cannot be read: {error.strerror}") from error
    rows = []
    for line in lines:
        missing = [column for column in ("group", "model", "params", "steps", "guided") if column not in line]
        if missing:
            raise UserError(f"the published table {path} lacks the column {missing[0]!r}")
        model = line["model"]
        known = {"teacher": f"{model} (teacher)", "dmd2": f"{model} + DMD2", "rcm": f"{model} + rCM"}
        setting = ", ".join(filter(None, (line["params"], line.get("resolution", "").replace("x", "×"))))
        steps = line["steps"] + ("×2" if line["guided"] == "1" else "")
        for metric, value in line.items():
            if metric not in _SETTING:
                name = known.get(line["group"], model)
                rows.append(Row(table, "published", name, "", setting, steps, metric, "published", value, *[""] * 6))
    return rows


def to_csv(rows: Iterable[Row]) -> str:
    """Rows as CSV with a heading."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def from_csv(text: str) -> list[Row]:
    """The rows of a file that `to_csv` wrote."""
    return [Row(**line) for line in csv.DictReader(io.StringIO(text))]


Line = tuple[str, str, str, str, str]  # block, model, seed, setting, steps: what one printed line is about


def panels(rows: Sequence[Row]) -> list[Panel]:
    """What a person reads: scores of this run first, numbers of the paper last and apart."""
    table = rows[0].table
    lines: dict[Line, dict[str, Row]] = {}
    for row in rows:
        line = (row.block, row.model, row.seed, row.setting, row.steps)
        lines.setdefault(line, {})[row.metric] = row
    own = {line: found for line, found in lines.items() if line[0] != "published"}
    metrics = list(dict.fromkeys(row.metric for row in rows if row.block != "published"))
    keys = ["shapeeval.overall", RELATIVE, *(f"shapeeval.{task}" for task in TASKS)]
    made = [_by_model(f"ShapeEval on {SUBJECTS[table]}", _protocol(rows), own, keys, intervals=2)]
    for families, title, caption in FAMILIES.values():
        keys = [metric for metric in metrics if metric.partition(".")[0] in families]
        if families == ("shapebench",):
            made.append(_by_metric(title, caption, own, keys))
        else:
            intervals = 1 if families == ("shapeeval_frames",) else len(keys)
            made.append(_by_model(title, f"{caption} {_kinds(rows, keys)}", own, keys, intervals))
    made.append(_published_panel(table, lines))
    return [panel for panel in made if panel.groups]


def _names(line: Line) -> str:
    return Run(line[1], None, 0).label


def _seeds(own: Iterable[Line]) -> bool:
    return any(line[2] == "mean" for line in own)


def _cell(row: Row | None, interval: bool) -> Cell:
    if row is None or not row.value:
        return Cell("–")
    note = f"[{number(float(row.low))}, {number(float(row.high))}]" if interval and row.low else ""
    return Cell(number(float(row.value)), note)


def _by_model(
    title: str, caption: str, own: Mapping[Line, Mapping[str, Row]], keys: Sequence[str], intervals: int
) -> Panel:
    """A line a model and number of steps, a column a metric; the first `intervals` metrics with their intervals."""
    keys = [key for key in keys if any(key in found for found in own.values())]
    seeds = _seeds(own)
    groups = []
    for block, heading in (("models", "Models"), ("controls", "Controls")):
        printed = []
        for line, found in own.items():
            if line[0] == block and any(key in found for key in keys):
                names = [Cell(_names(line)), *([Cell(line[2] or "–")] if seeds else []), Cell(line[4] or "–")]
                printed.append([*names, *(_cell(found.get(key), i < intervals) for i, key in enumerate(keys))])
        if printed:
            groups.append((heading, printed))
    head = ["Model", *(["Seed"] if seeds else []), "Steps"]
    head += ["÷ teacher" if key == RELATIVE else label(key) for key in keys]
    return Panel(title, caption, head, groups, names=1)


def _by_metric(title: str, caption: str, own: Mapping[Line, Mapping[str, Row]], keys: Sequence[str]) -> Panel:
    """A line a metric with its kind, a column a model and number of steps."""
    shown = [line for line in own if any(key in own[line] for key in keys)]
    heads = []
    for line in shown:
        steps = f"{line[4]} step{'s' * (line[4] != '1')}" if line[4] else ""
        seed = f"{'' if line[2] == 'mean' else 'seed '}{line[2]}" if line[2] and _seeds(own) else ""
        heads.append("\n".join(filter(None, (_names(line), steps, seed))))
    printed = []
    for key in keys:
        kind = next(found[key].kind for found in own.values() if key in found)
        cells = (_cell(own[line].get(key), False) for line in shown)
        printed.append([Cell(label(key)), Cell(kind.replace("_", " ")), *cells])
    return Panel(title, caption, ["Dimension", "Kind", *heads], [("", printed)] if printed else [], names=2)


def _published_panel(table: str, lines: Mapping[Line, Mapping[str, Row]]) -> Panel:
    found = {line: metrics for line, metrics in lines.items() if line[0] == "published"}
    metrics = list(dict.fromkeys(metric for entry in found.values() for metric in entry))
    printed = [
        [Cell(line[1]), Cell(line[3]), Cell(line[4]), *(Cell(entry[m].value if m in entry else "–") for m in metrics)]
        for line, entry in found.items()
    ]
    caption = (
        "Copied from the paper for orientation: other models, another benchmark, other prompts. "
        "These numbers are not comparable with those measured here. NFE: evaluations of the network, ×2 with guidance."
    )
    head = ["Model", "Setting", "NFE", *(_HEADINGS.get(m) or label(m) for m in metrics)]
    return Panel(PUBLISHED[table], caption, head, [("", printed)] if printed else [], names=2, published=True)


def _protocol(rows: Sequence[Row]) -> str:
    row = next(row for row in rows if row.block != "published")
    each = int(row.n_samples) / max(1, int(row.n_prompts))
    return (
        f"GenEval's protocol in a world of coloured shapes: {row.n_prompts} prompts with {each:g} samples each, "
        f"the same initial noise for every model; overall is the mean of the six tasks. "
        f"Brackets are 95 % bootstrap intervals over prompts. {_kinds(rows, ['shapeeval.overall'])} "
        f"Evaluator version {row.evaluator or 'unknown'}, SHA-256 of prompts {row.prompts_sha256[:12] or 'unknown'}."
    )


def _kinds(rows: Iterable[Row], keys: Iterable[str]) -> str:
    found = {row.metric: row.kind.replace("_", " ") for row in rows if row.kind}
    kinds = sorted({found[key] for key in keys if key in found})
    return f"Kind: {', '.join(kinds)}." if kinds else ""


def to_markdown(name: str, made: Iterable[Panel]) -> str:
    """Panels as Markdown tables, padded so that they also read as plain text."""
    parts = [f"# {name.replace('table', 'Table ')}: {SUBJECTS[name]}"]
    for panel in made:
        head = [title.replace("\n", ", ") for title in panel.head]
        grid = []
        for heading, printed in panel.groups:
            if len(panel.groups) > 1 and heading != panel.groups[0][0]:
                grid.append([f"*{heading}*", *[""] * (len(panel.head) - 1)])
            grid += [[f"{cell.text} {cell.note}".strip().replace("|", "\\|") for cell in line] for line in printed]
        widths = [max(len(line[i]) for line in [head, *grid]) for i in range(len(head))]
        left = [i < panel.names for i in range(len(widths))]
        rule = ["-" * w if is_left else "-" * (w - 1) + ":" for w, is_left in zip(widths, left, strict=True)]

        def line(cells: Sequence[str], widths: list[int] = widths, left: list[bool] = left) -> str:
            padded = (c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(cells, widths, left, strict=True))
            return "| " + " | ".join(padded) + " |"

        parts.append("\n".join([f"## {panel.title}", "", panel.caption, "", line(head), line(rule), *map(line, grid)]))
    return "\n\n".join(parts) + "\n"


_TEX = {"\\": r"\textbackslash{}", "×": r"$\times$", "÷": r"$\div$", "–": "--", "λ": r"$\lambda$", "≥": r"$\ge$"}
_TEX |= {character: "\\" + character for character in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _tex(text: str) -> str:
    return re.sub(r"[\\×÷–λ≥&%$#_{}~^]", lambda match: _TEX[match.group()], text)


def _tex_heading(text: str) -> str:
    lines = r" \\ ".join(_tex(line) for line in text.split("\n"))
    return rf"\shortstack[r]{{{lines}}}" if "\n" in text else lines


def to_latex(name: str, made: Iterable[Panel]) -> str:
    r"""Panels as LaTeX tables; they need `\usepackage{booktabs}` and nothing else."""
    parts = [f"% {name}: needs \\usepackage{{booktabs}}"]
    for index, panel in enumerate(made):
        caption = rf"\textbf{{{_tex(panel.title)}.}} {_tex(panel.caption)}"
        columns = "@{}" + "".join("l" if i < panel.names else "r" for i in range(len(panel.head))) + "@{}"
        body = []
        for heading, printed in panel.groups:
            body.append(r"\midrule")
            if len(panel.groups) > 1:
                body.append(rf"\multicolumn{{{len(panel.head)}}}{{@{{}}l}}{{\emph{{{_tex(heading)}}}}} \\")
            for line in printed:
                cells = (_tex(c.text) + (rf" {{\tiny {_tex(c.note)}}}" if c.note else "") for c in line)
                body.append(" & ".join(cells) + r" \\")
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
