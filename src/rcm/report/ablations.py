"""Figures of ablations, each beside the paper's own numbers: the number of steps, λ, and the times of rollouts.

They read files: score JSONs of models (`.json`), and of their training `.../MEDIUM/MODEL/metrics.jsonl`.
Points are means over training seeds with 95 % intervals; nothing that the paper printed shares an axis with them.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rcm.artefact import UserError, read_json
from rcm.report.compared import (
    ROLLOUTS,
    by_medium,
    contrast,
    is_variant,
    lambda_times,
    pooled,
    quality,
    quality_name,
)
from rcm.report.look import COLORS, FAINT, INK, MARKERS, bars, legend, mark, png, row_title, style
from rcm.report.scores import CONTROLS, METHODS, Estimate, Score, in_order, keys_of, label, run_of

MAIN = ("diversity.vendi",)  # stands for all measures of diversity where it is known, as it takes them together
SIZES = {"0.6B": ":", "1.3B": "--", "2B": "--", "14B": "-"}  # lines of the paper's models, by their parameters
NOT_OURS = "As printed in the paper"
Point = tuple[float, Estimate]
Groups = Mapping[tuple[str, int], Sequence[Score]]


def _inputs(paths: Iterable[Path]) -> tuple[list[Score], list[Path]]:
    """Scores, read, and the paths of metrics."""
    paths = list(paths)
    for path in paths:
        if path.suffix not in (".json", ".jsonl"):
            raise UserError(f"{path} is neither a score, MODEL-STEPS.json, nor a metrics.jsonl")
    return [read_json(path) for path in paths if path.suffix == ".json"], [p for p in paths if p.suffix == ".jsonl"]


def _grouped(scores: Iterable[Score]) -> dict[tuple[str, int], list[Score]]:
    """Scores by method and number of steps: training seeds together, in the order of tables."""
    groups: dict[tuple[str, int], list[Score]] = defaultdict(list)
    for run, score in in_order(scores):
        groups[run.method, run.steps].append(score)
    return groups


def _quality(medium: str, scores: Sequence[Score]) -> str:
    key = quality(scores)
    if key is None:
        raise UserError(f"none of the scores of {medium} has an overall score, such as geneval.overall or vbench.total")
    return key


def _measures(scores: Iterable[Score]) -> list[str]:
    """The measures of diversity that decide: the Vendi score, without one the distances of pairs and VBench-2.0's."""
    found = keys_of(scores, "diversity")
    return [key for key in MAIN if key in found] or found


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(4.0, width * columns), 0.45 + height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _teacher(ax: Axes, key: str, groups: Groups) -> None:
    """The teacher as a band over all of the panel, with its steps."""
    for (method, steps), group in groups.items():
        found = pooled(key, group)
        if method == "teacher" and found is not None:
            ax.axhline(found.value, color=INK, linewidth=0.9, zorder=1)
            if found.low == found.low:
                ax.axhspan(found.low, found.high, color=INK, alpha=0.08, linewidth=0, zorder=0)
            place = ax.get_yaxis_transform()
            ax.annotate(
                f"Teacher, {steps} steps",
                (0.01, found.value),
                (0, 2),
                xycoords=place,
                textcoords="offset points",
                size=6.5,
                va="bottom",
            )


def _lines(
    ax: Axes, lines: Mapping[str, Sequence[tuple[float, Estimate]]], looks: Mapping[str, dict[str, Any]]
) -> None:
    """Lines of points with intervals, moved apart a little so that intervals do not cover each other."""
    for index, (name, points) in enumerate(lines.items()):
        shift = 2 ** (0.09 * (index - (len(lines) - 1) / 2))
        at = [(x * shift, found) for x, found in points]
        look = looks[name]
        ax.plot(
            [x for x, _ in at],
            [found.value for _, found in at],
            color=look["color"],
            linewidth=0.9,
            linestyle=look.get("linestyle", "-"),
            zorder=2,
        )
        for x, found in at:
            shown = {key: value for key, value in look.items() if key != "linestyle"}
            ax.errorbar(x, found.value, yerr=bars(found), **shown)


def _step_axis(ax: Axes, steps: Iterable[int], labels: Callable[[int], str] = str) -> None:
    """Numbers of steps at equal distances for equal factors."""
    ticks = sorted(set(steps))
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [labels(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(ticks[0] / 1.35, ticks[-1] * 1.35)
    ax.grid(visible=False, axis="x")


# --- Steps ---------------------------------------------------------------------------------------------------------


def figure_steps(paths: Sequence[Path], published: Path | None = None) -> bytes:
    """Quality and diversity against the number of steps, a row a medium; `paths` are of scores.

    `published` is the paper's table 1 or 2, drawn in a panel of its own in the row of its medium.
    """
    scores, _ = _inputs(paths)
    media = by_medium(s for run, s in in_order(scores) if run.method not in CONTROLS and not is_variant(run.method))
    if not any(run.method != "teacher" for own in media.values() for run, _ in in_order(own)):
        raise UserError("figure_steps needs scores of students, MODEL-STEPS.json")
    printed = _printed(published) if published else None
    if printed and printed.medium not in media:
        raise UserError(f"the published table {published} is about {printed.medium}, of which there are no scores")
    rows = {medium: [_quality(medium, own), *_measures(own)] for medium, own in media.items()}
    columns = max(len(keys) + (printed is not None and printed.medium == medium) for medium, keys in rows.items())
    with style():
        figure, axes = _grid(len(rows), columns, min(3.3, 10.6 / columns), 2.6)
        for row, (medium, keys) in zip(axes, rows.items(), strict=True):
            own, groups = media[medium], _grouped(media[medium])
            for ax, key in zip(row, keys, strict=False):
                lines: dict[str, list[Point]] = defaultdict(list)
                for (method, steps), group in groups.items():
                    found = pooled(key, group)
                    if method != "teacher" and found is not None:
                        lines[method].append((steps, found))
                _lines(ax, lines, {method: mark(method) for method in lines})
                _teacher(ax, key, groups)
                _step_axis(ax, (steps for method, steps in groups if method != "teacher"))
                ax.set_xlabel("Sampling steps")
                ax.set_ylabel(quality_name(key, own[0]) if key == keys[0] else label(key))
            row[0].set_title(row_title([medium] if len(rows) > 1 else [], own))
            if printed and printed.medium == medium:
                printed.draw(row[len(keys)], _paper(own))
                row[len(keys)].set_title(NOT_OURS)
            for ax in row[len(keys) + (printed is not None and printed.medium == medium) :]:
                ax.set_axis_off()
        methods = [run.method for run, _ in in_order(s for own in media.values() for s in own)]
        handles = legend(method for method in methods if method != "teacher")
        figure.legend(handles=handles, loc="outside upper center", ncols=max(1, len(handles)))
        return png(figure)


def _paper(scores: Iterable[Score]) -> str | None:
    """Which of the paper's models the scores are of."""
    return next((str(s["evaluator"]["paper"]) for s in scores if s.get("evaluator", {}).get("paper")), None)


class _printed:
    """The paper's table 1 or 2, of which the teacher and its students are drawn."""

    def __init__(self, path: Path):
        self.lines = _rows(path, "group", "params", "steps", "guided")
        overall = {"overall": ("images", "geneval.overall"), "total": ("clips", "vbench.total")}
        found = [column for column in overall if column in self.lines[0]]
        if not found:
            raise UserError(f"the published table {path} has neither a column `overall` nor `total`")
        self.column = found[0]
        self.medium, self.key = overall[self.column]

    def draw(self, ax: Axes, size: str | None) -> None:
        """A line a size of the model from its students to the teacher, against evaluations of the network."""
        shown = [line for line in self.lines if line["group"] in ("teacher", "dmd2", "rcm")]
        ticks = {}
        for params in dict.fromkeys(line["params"] for line in shown):
            faint = 0.35 if size is not None and size != params else 1.0
            own = sorted((self._point(line), line) for line in shown if line["params"] == params)
            for group in ("rcm", "dmd2", "teacher"):
                points = [point for point, line in own if line["group"] == group]
                ax.plot(
                    *zip(*points, strict=True) if points else ([], []),
                    color=COLORS[group],
                    marker=MARKERS[group],
                    markersize=7 if group == "teacher" else 4.5,
                    linestyle=SIZES.get(params, "-."),
                    linewidth=0.9,
                    alpha=faint,
                    zorder=3 if group == "rcm" else 2,
                )
            (x, y) = own[-1][0]
            last = [point for point, line in own if line["group"] == "rcm"][-1:]
            ax.plot(*zip(*last, (x, y), strict=True), color=FAINT, linestyle=":", linewidth=0.7, alpha=faint, zorder=1)
            ax.annotate(
                params, (x, y), (6, 0), textcoords="offset points", size=6.5, va="center", color=INK, alpha=faint
            )
            ticks |= {point[0]: line["steps"] + ("×2" if line["guided"] == "1" else "") for point, line in own}
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(ticks), list(ticks.values()))
        ax.minorticks_off()
        ax.set_xlim(0.75, 2.1 * max(ticks))
        ax.grid(visible=False, axis="x")
        ax.set_xlabel("Evaluations of the network")
        percent = ", %" if self.column == "total" else ""
        ax.set_ylabel(quality_name(self.key) + percent)

    def _point(self, line: Mapping[str, str]) -> tuple[float, float]:
        return float(line["steps"]) * (2 if line["guided"] == "1" else 1), float(line[self.column])


def _rows(path: Path, *columns: str) -> list[dict[str, str]]:
    """The lines of a published table, which has these columns among its own."""
    try:
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except OSError as error:
        raise UserError(f"the published table {path} cannot be read: {error.strerror}") from error
    missing = [column for column in columns if not lines or column not in lines[0]]
    if missing:
        raise UserError(f"the published table {path} lacks the column {missing[0]!r}")
    return lines


# --- Lambda --------------------------------------------------------------------------------------------------------

FACTORS = ("cell", "color", "fill", "background")
_UNITS = {  # measures of diversity that share a panel, by its heading
    "Vendi score": ("diversity.vendi",),
    "Entropy of hidden factors, bits": tuple(
        f"diversity.{name}_entropy" for name in ("cell", "color", "fill", "background")
    ),
    "Mean distance of pairs": ("diversity.clip_distance", "diversity.dino_distance"),
    "VBench-2.0 diversity": ("diversity.vbench2",),
}
_HUES = ("#009e73", "#0072b2", "#d55e00", "#cc79a7")  # of the measures in one panel
_SHAPES = ("o", "s", "^", "v")


def figure_lambda(paths: Sequence[Path], published: Path | None = None) -> bytes:
    """Quality and diversity against λ, on the axis of λ√D; `paths` are of scores and of metrics, which know λ√D.

    `published` is the paper's figure 7, drawn against its λ in a panel of its own.
    """
    scores, metrics = _inputs(paths)
    swept = [s for run, s in in_order(scores) if lambda_times(run.method) is not None or run.method == "teacher"]
    media = by_medium(swept)
    balances = _balances(metrics, media)
    panels: dict[str, list[tuple[str, Sequence[str]]]] = {}
    for medium, own in media.items():
        steps = {run.steps for run, _ in in_order(own) if run.method != "teacher"}
        if len(steps) != 1:
            found = ", ".join(map(str, sorted(steps))) or "none"
            raise UserError(f"figure_lambda compares students at one number of steps; of {medium} there are {found}")
        key = _quality(medium, own)
        known = keys_of(own, "diversity")
        units = [(name, [k for k in keys if k in known]) for name, keys in _UNITS.items()]
        panels[medium] = [(quality_name(key, own[0]), [key]), *((name, keys) for name, keys in units if keys)]
    if not panels:
        raise UserError("figure_lambda needs scores of rcm, rcm-lambda-... and scm, such as rcm-lambda-10-0-4.json")
    columns = max(map(len, panels.values())) + (published is not None)
    with style():
        figure, axes = _grid(len(panels), columns, min(3.3, 10.6 / columns), 2.7)
        for row, (medium, parts) in zip(axes, panels.items(), strict=True):
            groups = _grouped(media[medium])
            for ax, (name, keys) in zip(row, parts, strict=False):
                _sweep(ax, keys, groups, balances[medium])
                ax.set_ylabel(name)
            steps = next(steps for method, steps in groups if method != "teacher")
            what = [medium] if len(panels) > 1 else []
            row[0].set_title(row_title([*what, f"{steps} step{'s' * (steps != 1)}"], media[medium]))
            for ax in row[len(parts) :]:
                ax.set_axis_off()
        if published is not None:
            _figure7(axes[0, -1], published)
        return png(figure)


def _balances(metrics: Sequence[Path], media: Mapping[str, Sequence[Score]]) -> dict[str, dict[str, float]]:
    """λ√D of each method by medium, as its training noted it; 0 for sCM alone, which has no λ."""
    noted: dict[tuple[str, str], float] = {}
    for path in metrics:
        place, model = path.absolute().parts[-3:-1]
        values = [row["balance"] for row in _noted(path) if row.get("role") == "student" and "balance" in row]
        if values:
            noted[place, run_of(model, 0).method] = float(np.median(values))
    found: dict[str, dict[str, float]] = {}
    for medium, own in media.items():
        found[medium] = {}
        for method in dict.fromkeys(run.method for run, _ in in_order(own) if run.method != "teacher"):
            if method != "scm" and (medium, method) not in noted:
                raise UserError(
                    f"the λ√D of {method} is not known: none of the inputs is .../{medium}/{method}-SEED/metrics.jsonl "
                    "with a `balance` of the student's updates"
                )
            found[medium][method] = 0.0 if method == "scm" else noted[medium, method]
        if "rcm" not in found[medium]:
            raise UserError(f"figure_lambda needs scores of rcm for {medium}: its λ is what the others are times of")
    return found


def _noted(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"the metrics {path} cannot be read: {error}") from error


def _sweep(ax: Axes, keys: Sequence[str], groups: Groups, balances: Mapping[str, float]) -> None:
    """Measures against λ√D: decades at equal distances, and no λ at all in front of them, cut off by a gap."""
    usual = balances["rcm"]
    least = min(np.log10(b / usual) for b in balances.values() if b)
    at = {method: float(np.log10(b / usual)) if b else float(least) - 1.2 for method, b in balances.items()}
    several = len(keys) > 1
    for index, key in enumerate(keys):
        color, shape = (_HUES[index], _SHAPES[index]) if several else (COLORS["rcm"], MARKERS["rcm"])
        shift = 0.09 * (index - (len(keys) - 1) / 2)
        points = {m: f for (m, _), group in groups.items() if m in at and (f := pooled(key, group)) is not None}
        order = sorted(points, key=lambda method: at[method])
        regular = [method for method in order if balances[method]]
        ax.plot([at[m] + shift for m in regular], [points[m].value for m in regular], color=color, linewidth=0.9)
        for method in order:
            look = mark("rcm") | {"color": color, "fmt": shape, "ecolor": color, "elinewidth": 0.7}
            if not balances[method]:
                look |= {"markerfacecolor": "white", "fmt": shape if several else MARKERS["scm"]}
                look |= {} if several else {"color": COLORS["scm"], "ecolor": COLORS["scm"]}
            ax.errorbar(at[method] + shift, points[method].value, yerr=bars(points[method]), **look)
        if several and order:
            ax.plot([], [], color=color, marker=shape, markersize=4.5, linewidth=0.9, label=label(key))
    if several:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2, fontsize=6.5, columnspacing=1.0)
    else:
        _teacher(ax, keys[0], groups)
    ticks = sorted(at, key=lambda method: at[method])
    names = ["0\npure\nsCM" if not balances[m] else f"{balances[m] / usual:.3g}×\n{balances[m]:.3g}" for m in ticks]
    ax.set_xticks([at[m] for m in ticks], names)
    ax.set_xlim(min(at.values()) - 0.4, max(at.values()) + 0.4)
    ax.grid(visible=False, axis="x")
    if any(not b for b in balances.values()):
        ax.axvline(least - 0.6, color=FAINT, linewidth=0.7, linestyle=(0, (1, 2)))
    ax.set_xlabel("λ by the scale's own, and λ√D")


def _figure7(ax: Axes, path: Path) -> None:
    """The paper's figure 7."""
    lines = sorted(
        (float(line["lambda"]), float(line["vbench_total"])) for line in _rows(path, "lambda", "vbench_total")
    )
    ax.plot(*zip(*lines, strict=True), color=INK, marker="o", markersize=5, linewidth=0.9)
    ax.set_xscale("log")
    ax.set_xticks([x for x, _ in lines], [f"{x:g}" for x, _ in lines])
    ax.minorticks_off()
    ax.margins(0.12, 0.15)
    ax.grid(visible=False, axis="x")
    ax.set_axis_on()
    ax.set_title(NOT_OURS)
    ax.set_xlabel("λ")
    ax.set_ylabel("VBench total, %")


# --- Rollouts ------------------------------------------------------------------------------------------------------


def figure_rollout(paths: Sequence[Path]) -> bytes:
    """Random against fixed times of rollouts, for rCM and for DMD, against the number of steps.

    `paths` are of scores and of the students' metrics, by which the updates of a pair are seen to be as many. Below each
    number of steps stands random minus fixed, paired by prompt where scores have values by prompt.
    """
    scores, metrics = _inputs(paths)
    wanted = {method for pair in ROLLOUTS.values() for method in pair}
    media = by_medium(s for run, s in in_order(scores) if run.method in wanted)
    updates = _updates(metrics)
    rows, pairs = [], []
    for medium, own in media.items():
        groups = _grouped(own)
        there = {method for method, _ in groups}
        pairs += [name for name, pair in ROLLOUTS.items() if there.issuperset(pair) and name not in pairs]
        rows += [(medium, key) for key in (_quality(medium, own), *_measures(own))]
    if not pairs:
        both = " or of ".join(" and ".join(pair) for pair in ROLLOUTS.values())
        raise UserError(f"figure_rollout needs scores of {both}")
    with style():
        figure, axes = _grid(len(rows), len(pairs), 4.4, 2.45)
        for row, (medium, key) in zip(axes, rows, strict=True):
            own, groups = media[medium], _grouped(media[medium])
            first = key == quality(own)
            for ax, name in zip(row, pairs, strict=True):
                _rollouts(ax, key, groups, name)
                ax.set_ylabel(quality_name(key, own[0]) if first else label(key))
                if first:
                    what = [medium] if len(media) > 1 else []
                    count = _as_many(updates, medium, ROLLOUTS[name])
                    ax.set_title(
                        row_title([*what, METHODS[name], *([f"{count} student updates"] if count else [])], own)
                    )
        handles = [
            Line2D([], [], color=INK, marker="o", markersize=5, linewidth=0.9, label="Random rollout times"),
            Line2D([], [], color=INK, marker="o", markersize=5, linewidth=0.9, linestyle="--", markerfacecolor="white"),
        ]
        handles[1].set_label("Fixed rollout times")
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
        return png(figure)


def _rollouts(ax: Axes, key: str, groups: Groups, name: str) -> None:
    """One measure of the two methods of a pair, and their differences as labels of the steps."""
    random, fixed = ROLLOUTS[name]
    looks = {random: mark(name), fixed: mark(name) | {"markerfacecolor": "white", "linestyle": "--"}}
    lines: dict[str, list[Point]] = {method: [] for method in looks}
    for (method, steps), group in groups.items():
        found = pooled(key, group)
        if method in lines and found is not None:
            lines[method].append((steps, found))
    if not any(lines.values()):
        ax.set_axis_off()
        return
    _lines(ax, lines, looks)

    def difference(steps: int) -> str:
        found = contrast(key, groups.get((random, steps), ()), groups.get((fixed, steps), ()))
        if found is None:
            return f"{steps}"
        bounds = f"\n[{found.estimate.low:+.3f}, {found.estimate.high:+.3f}]" if found.bounded else ""
        return f"{steps}\n{found.estimate.value:+.3f}{bounds}{'' if found.paired else ' unpaired'}"

    _step_axis(ax, (steps for method, steps in groups if method in looks), difference)
    ax.set_xlabel("Sampling steps, and random − fixed")


def _updates(metrics: Iterable[Path]) -> dict[tuple[str, str], set[int]]:
    """How many updates students got, by medium and method."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for path in metrics:
        place, model = path.absolute().parts[-3:-1]
        last = max((row["update"] for row in _noted(path) if row.get("role") == "student"), default=0)
        found[place, run_of(model, 0).method].add(last)
    return found


def _as_many(updates: Mapping[tuple[str, str], set[int]], medium: str, pair: tuple[str, str]) -> int | None:
    """The updates of all students of a pair; None where there are no metrics of both. Raises UserError if they differ."""
    known = [updates[medium, method] for method in pair if (medium, method) in updates]
    if len(known) < 2:
        return None
    counts = set().union(*known)
    if len(counts) > 1:
        said = " and ".join(f"{method} has {sorted(updates[medium, method])}" for method in pair)
        raise UserError(f"{said} student updates of {medium}; figure_rollout compares at equal ones")
    return counts.pop()
