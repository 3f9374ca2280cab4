"""Panels: tables as a person reads them, made of tidy rows alone.

Comparable scores share a panel, others never do. Numbers of the paper stand in a panel of their own and, where a model
of its tables was measured, line by line in "Beside the paper".
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rcm.data.prompts import TASKS
from rcm.report import captions
from rcm.report.facts import short
from rcm.report.rows import (
    NATIVE_DIFFERENCE,
    OWN_SAMPLES,
    PERCENT,
    RELATIVE,
    SPEED,
    Line,
    Lines,
    Row,
    keys_in,
    lines_of,
)
from rcm.report.scores import HEADLINES, label, minus, number, signed

SUBJECTS = {"table1": "images", "table2": "clips", "table3": "clips from text and an image", "table_text": "small text"}
PUBLISHED = {
    "table1": "GenEval, as printed in Table 1 of the rCM paper",
    "table2": "VBench, as printed in Table 2 of the rCM paper",
    "table3": "VBench of a text-and-image-to-video model, as printed in Table 3 of the rCM paper",
}
FURTHER = {  # panels after the headline and the dimensions: families of metrics, title, and what to know about them
    ("shapeeval_frames",): ("ShapeEval of frames", "Clips judged by their frames alone, whatever moves."),
    OWN_SAMPLES: ("Diversity", ""),
    ("prior",): (
        "Distance from the world",
        "Total variation between the samples' hidden factors and the world's, less is better; recall and coverage of "
        "the world's pictures by eight samples (k = 3, colours of 8 × 8 blocks of the first frame), more is "
        "better. With so few samples even ground truth is not at 0 and 1, so compare with it.",
    ),
    ("fidelity",): (
        "Fidelity",
        "A sample against the same scene drawn ideally: PSNR in decibels, and sharpness of edges, 1 for ideal ones. "
        "Neither asks for the caption.",
    ),
}
_GAP = "Implemented here − official code"
_HEADINGS = {"fps": "FPS", "t2v": "T2V score", "i2v": "I2V score", SPEED: "Frames/s"}


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a panel; `note` is the interval, printed smaller where that can be done."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """A table as a person reads it: groups of rows, each under its heading; headings of columns may have several lines.

    The first `names` columns say what a row is about. `provenance` ends the caption: by what and from what the numbers
    are.
    """

    title: str
    caption: str
    head: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
    names: int
    published: bool = field(default=False)
    provenance: str = ""

    @property
    def stacked(self) -> bool:
        """Whether a line has so many intervals that it fits a page only with each below its number."""
        return any(sum(bool(cell.note) for cell in line) >= 5 for _, lines in self.groups for line in lines)


def heading(table: str) -> str:
    """What a table is called: "Table 1: images"; the small text has no number, for the paper has no such table."""
    return f"Table {table[5:]}: {SUBJECTS[table]}" if table[5:].isdecimal() else SUBJECTS[table].capitalize()


def panels(rows: Sequence[Row]) -> list[Panel]:
    """What a person reads: scores of this run first, numbers of the paper last and apart."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.comparable:
            groups[row.comparable].append(row)
    speeds = [row for row in rows if row.metric == SPEED]
    paper = [row for row in rows if row.block == "published"]
    firsts = {key: own[0] for key, own in groups.items()}
    made: list[Panel] = []
    compared = False
    for key, found in groups.items():
        own = _with_speeds(lines_of(found), speeds)
        suffix = f", group {key} of {len(groups)}" if len(groups) > 1 else ""
        beside = _beside(own, found[0], paper)
        compared |= bool(beside)
        shown = [replace(panel, title=panel.title + suffix) for panel in _of_group(own, found[0], beside)]
        for panel in shown[:1]:
            apart = captions.apart(firsts, key, (made or shown)[0].title)
            told = f"Evaluator, prompts, sampling and checkpoints as under “{panel.title}”."
            whence = f"{apart} {captions.provenance(own, found[0])}".strip()
            made += [replace(panel, provenance=whence), *(replace(other, provenance=told) for other in shown[1:])]
    return [*made, _published_panel(paper, list(firsts.values()), compared)] if paper else made


def _of_group(own: Lines, first: Row, beside: Sequence[Panel]) -> list[Panel]:
    """Panels of scores that are comparable; the first tells where the numbers are from, the others refer to it."""
    made = [_headline(own, first), *beside, *_dimensions(own, first)]
    made += [panel for families in FURTHER for panel in _of_families(families, own, first)]
    return [panel for panel in made if panel.groups]


def _with_speeds(own: Lines, speeds: Sequence[Row]) -> Lines:
    """Lines with their speeds; that of a mean over training seeds is the first seed's, for seeds do not move it."""
    found = {}
    for line, metrics in own.items():
        same = [row for row in speeds if (row.model, row.steps) == (line.model, line.steps)]
        timed = next((row for row in same if line.seed in (row.seed, "mean")), None)
        found[line] = {**metrics, SPEED: timed} if timed else metrics
    return found


# --- Panels of one group -------------------------------------------------------------------------------------------


def _headline(own: Lines, first: Row) -> Panel:
    """The panel of the scores that sum up, with speeds beside them."""
    present = keys_in(own)
    tasks = {family: [f"{family}.{task}" for task in TASKS] for family in ("shapeeval", "geneval")}
    keys: list[str] = []  # parts alone stand in the panels after this one
    title, caption = f"{first.evaluator}: throughput", ""
    if "shapeeval.overall" in present:
        keys = ["shapeeval.overall", RELATIVE]
        title, caption = f"ShapeEval on {SUBJECTS[first.table]}", captions.shapeeval(own, first, _bounded(own, keys))
    elif "geneval.overall" in present:
        keys = ["geneval.overall", *tasks["geneval"]]
        title, caption = first.evaluator, captions.geneval(first, _bounded(own, keys))
    elif "vbench.total" in present:
        keys, count = ["vbench.total", "vbench.quality", "vbench.semantic"], captions.dimensions(first)
        title = first.evaluator + (
            f", {count} of {captions.OF_VBENCH} dimensions" if count < captions.OF_VBENCH else ""
        )
        caption = captions.vbench(first, _bounded(own, keys))
    elif any(metric.startswith("text.") for metric in present):
        keys = [metric for metric in present if metric.startswith("text.")]
        title, caption = f"Small text, {first.media}", captions.small_text(first, _bounded(own, keys))
    if speeds := {line: found[SPEED] for line, found in own.items() if SPEED in found}:
        caption = f"{caption} {captions.speed(speeds)}".strip()
    more = tasks["shapeeval"] if "shapeeval.overall" in present else []
    return _by_model(title, caption, own, [*keys, *more, SPEED], keys)


def _bounded(own: Lines, keys: Collection[str]) -> bool:
    """Whether any of the metrics has an interval."""
    return any(found[key].low for found in own.values() for key in keys if key in found)


def _of_families(families: tuple[str, ...], own: Lines, first: Row) -> list[Panel]:
    """The panels of one entry of `FURTHER`."""
    keys = [metric for metric in keys_in(own) if metric.partition(".")[0] in families]
    if families == OWN_SAMPLES:
        return _diversity(own, keys, first)
    title, caption = FURTHER[families]
    intervals = keys[:1] if families == ("shapeeval_frames",) else keys
    return [_by_model(title, f"{caption} {captions.kinds(own, keys)}", own, keys, intervals)]


def _dimensions(own: Lines, first: Row) -> list[Panel]:
    """Dimensions of ShapeBench or VBench, a line each."""
    keys = keys_in(own)
    shapebench = [key for key in keys if key.startswith("shapebench.")]
    if shapebench:
        caption = (
            "Raw means; intervals are in the CSV. A still or blurred clip can score above ground truth on flicker, "
            "smoothness and consistency, so these are read together with dynamic degree and sharpness. Kind says how "
            "near a measure is to VBench's: the same formula, another model in it, or an analogue."
        )
        return [_by_metric("ShapeBench", caption, own, {"": shapebench})]
    totals = ("vbench.total", "vbench.quality", "vbench.semantic")
    parts = {
        "Official code": [key for key in keys if key.startswith("vbench.") and key not in totals],
        "Implemented here": [key for key in keys if key.startswith("vbench_native.")],
        _GAP: [key for key in keys if key.startswith(f"{NATIVE_DIFFERENCE}.")],
    }
    caption = "Raw means, before they are normalised; intervals are in the CSV."
    if parts["Implemented here"]:
        what = "Some are implemented here too," if parts["Official code"] else "They are implemented here"
        caption += f" {what} by the official formulas with DINO and CLIP of transformers."
        row = next(found[key] for key in parts["Implemented here"] for found in own.values() if key in found)
        caption += f" These: {short(row.models)}." if row.models and row.models != first.models else ""
        caption += " Differences are means over the clips that both measured." if parts[_GAP] else ""
    if not any(key in totals for key in keys):
        caption += f" {captions.how(first, bounded=False)}"
    title = f"{first.evaluator}: dimensions"
    return [_by_metric(title, caption, own, {name: found for name, found in parts.items() if found})]


def _diversity(own: Lines, keys: Sequence[str], first: Row) -> list[Panel]:
    """Diversity beside quality."""
    measured = {line: found for line, found in own.items() if any(key in found for key in keys)}
    rows = [found[key] for found in measured.values() for key in keys if key in found]
    if not rows:
        return []
    quality = [key for key in HEADLINES if any(key in found for found in measured.values())]
    intervals = [*quality, *keys]
    quality = quality or [key for key in keys_in(own) if key.startswith("vbench_native.")]
    row = next((row for row in rows if row.value), rows[0])
    caption = captions.diversity(measured, keys, row, first, _bounded(measured, intervals))
    return [_by_model("Diversity", caption, measured, [*quality, *keys], intervals, named=True)]


# --- The shapes of panels ------------------------------------------------------------------------------------------


def _fine(value: float) -> str:
    """Four decimals: models differ by thousandths in VBench, and the paper prints percent with two."""
    return minus(f"{value:.4f}")


def _cell(row: Row | None, interval: bool, note: str = "") -> Cell:
    if row is None or not row.value:
        return Cell("–")
    value = float(row.value)
    if row.metric == SPEED:
        return Cell(f"{value:#.3g}".rstrip("."), note)
    if row.metric.startswith(f"{NATIVE_DIFFERENCE}."):
        return Cell(signed(value, 4) if abs(value) >= 5e-5 or not value else minus(f"{value:+.0e}"))
    digits = _fine if row.metric.startswith(("vbench.", "vbench_native.")) else number
    note = f"[{digits(float(row.low))}, {digits(float(row.high))}]" if interval and row.low else ""
    return Cell(digits(value), note)


def _heading_of(key: str, named: bool) -> str:
    """A column's heading, with the evaluator if `named`."""
    if key == RELATIVE:
        return "÷ teacher"
    return f"{HEADLINES[key]}\n{label(key).lower()}" if named and key in HEADLINES else _HEADINGS.get(key) or label(key)


def _by_model(
    title: str, caption: str, own: Lines, keys: Sequence[str], intervals: Collection[str], named: bool = False
) -> Panel:
    """A line a model and number of steps, a column a metric; those in `intervals` with their intervals.

    `named`: headings of scores that sum up name their evaluator, for they stand beside others.
    """
    keys = [key for key in keys if any(key in found for found in own.values())]
    seeds = any(line.seed == "mean" for line in own)
    several_cards = len({found[SPEED].device for found in own.values() if SPEED in found}) > 1
    groups = []
    for block, name in (("models", "Models"), ("controls", "Controls")):
        printed = []
        for line, found in own.items():
            if line.block == block and any(key in found for key in keys):
                names = [Cell(line.name), *([Cell(line.seed or "–")] if seeds else []), Cell(line.steps or "–")]
                notes = [found[key].device if several_cards and key == SPEED and key in found else "" for key in keys]
                printed.append(
                    [*names, *(_cell(found.get(key), key in intervals, notes[i]) for i, key in enumerate(keys))]
                )
        if printed:
            groups.append((name, printed))
    head = ["Model", *(["Seed"] if seeds else []), "Steps", *(_heading_of(key, named) for key in keys)]
    return Panel(title, caption, head, groups, names=1)


def _by_metric(title: str, caption: str, own: Lines, parts: Mapping[str, Sequence[str]]) -> Panel:
    """A line a metric with its kind, a column a model and number of steps."""
    shown = [line for line in own if any(key in own[line] for keys in parts.values() for key in keys)]
    seeds = any(line.seed == "mean" for line in own)
    heads = []
    for line in shown:
        steps = f"{line.steps} step{'s' * (line.steps != '1')}" if line.steps else ""
        seed = f"{'' if line.seed == 'mean' else 'seed '}{line.seed}" if line.seed and seeds else ""
        heads.append("\n".join(filter(None, (line.name, steps, seed))))
    groups = []
    for name, keys in parts.items():
        printed = []
        for key in keys:
            kind = next(found[key].kind for found in own.values() if key in found)
            cells = (_cell(own[line].get(key), False) for line in shown)
            printed.append([Cell(label(key)), Cell(kind.replace("_", " ")), *cells])
        groups.append((name, printed))
    return Panel(title, caption, ["Dimension", "Kind", *heads], groups, names=2)


# --- Beside the paper ----------------------------------------------------------------------------------------------


def _published_panel(paper: Sequence[Row], firsts: Sequence[Row], compared: bool) -> Panel:
    table = paper[0].table
    lines = lines_of(paper)
    metrics = keys_in(lines)
    printed = [
        [
            *(Cell(line.model), Cell(line.setting), Cell(line.steps)),
            *(Cell(found[m].value if m in found else "–") for m in metrics),
        ]
        for line, found in lines.items()
    ]
    if table == "table3":
        caption = f"Copied from the paper; {captions.NOT_REPRODUCED}."
    elif compared:
        caption = "Copied from the paper; what was measured of these models stands in the panels beside the paper."
    elif any(row.evaluator.startswith(("GenEval", "VBench")) for row in firsts):
        caption = (
            "Copied from the paper for orientation: nothing measured here is a whole score of one of these models at "
            "one of these numbers of steps, so nothing is set beside them."
        )
    else:
        caption = (
            "Copied from the paper for orientation: other models, another benchmark, other prompts. "
            "These numbers are not comparable with those measured here."
        )
    caption += " NFE: evaluations of the network, ×2 with guidance."
    caption += " Scores in percent; FPS with decoding, batch 1, on one H100." if table in PERCENT else ""
    head = ["Model", "Setting", "NFE", *(_HEADINGS.get(m) or label(m) for m in metrics)]
    return Panel(PUBLISHED[table], caption, head, [("", printed)], names=2, published=True)


def _pairs(own: Lines, first: Row, paper: Sequence[Row]) -> list[tuple[Line, Row, Row]]:
    """Measured and published rows of the same size, method, number of steps and score.

    Scores of VBench with dimensions missing, and speeds of another card, have no place beside the paper's.
    """
    found = {(row.group, row.params, row.steps.partition("×")[0], row.metric): row for row in paper}
    whole = captions.dimensions(first) == captions.OF_VBENCH
    pairs = []
    for line, metrics in own.items():
        params = next(iter(metrics.values())).params
        for key, row in metrics.items():
            family, _, name = key.partition(".")
            same = captions.CARD in row.device if key == SPEED else family in ("geneval", "vbench") and whole
            printed = found.get((line.model, params, line.steps, name))
            if same and params and row.value and printed is not None and printed.value:
                pairs.append((line, row, printed))
    return pairs


def _beside(own: Lines, first: Row, paper: Sequence[Row]) -> list[Panel]:
    """Every measured score that the paper prints too, with the difference."""
    pairs = _pairs(own, first, paper)
    if not any(row.metric != SPEED for _, row, _ in pairs):
        return []
    scale, digits = (100, 2) if first.table in PERCENT else (1, 3)
    seeds = any(line.seed == "mean" for line in own)
    printed, before = [], None
    for line, row, paper_row in pairs:
        timed = row.metric == SPEED
        times, places = (1, len(paper_row.value.partition(".")[2])) if timed else (scale, digits)
        value, theirs = times * float(row.value), float(paper_row.value)
        low, high = (times * float(bound) if bound else None for bound in (row.low, row.high))
        inside = "–" if low is None or high is None else "yes" if low <= theirs <= high else "no"
        note = "" if low is None or high is None else f"[{minus(f'{low:.{places}f}')}, {minus(f'{high:.{places}f}')}]"
        names = [line.name, *([line.seed or "–"] if seeds else []), line.steps]
        cells = [Cell(name if line != before else "") for name in names]
        cells += [Cell(_HEADINGS.get(row.metric) or label(row.metric)), Cell(minus(f"{value:.{places}f}"), note)]
        printed.append([*cells, Cell(paper_row.value), Cell(signed(value - theirs, places)), Cell(inside)])
        before = line
    head = ["Model", *(["Seed"] if seeds else []), "Steps", "Score", "Measured", "Paper", "Difference", "In interval"]
    title, caption = f"Beside the paper: {first.evaluator}", captions.beside(first)
    return [Panel(title, caption, head, [("", printed)], names=len(head) - 4)]
