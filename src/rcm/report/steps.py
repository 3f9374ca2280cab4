"""Figures against the number of steps: quality and diversity, and the times of rollouts that students learned with.

Points are means over training seeds with 95 % intervals; nothing that the paper printed shares an axis with them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from rcm.artefact import UserError
from rcm.report.compared import (
    ROLLOUTS,
    Groups,
    by_medium,
    contrast,
    grouped,
    is_variant,
    measures,
    overall,
    pooled,
    quality_name,
)
from rcm.report.look import (
    COLORS,
    FAINT,
    INK,
    MARKERS,
    band,
    bars,
    drawn,
    grid,
    legend,
    mark,
    name_axis,
    png,
    row_title,
    style,
    teacher_legend,
)
from rcm.report.scores import CONTROLS, METHODS, Estimate, Run, Score, in_order
from rcm.report.stored import noted, printed, sorted_out, whose

OVERALL = {"overall": ("images", "geneval.overall"), "total": ("clips", "vbench.total")}  # columns of tables 1 and 2
SIZES = {"0.6B": ":", "1.3B": "--", "2B": "--", "14B": "-"}  # lines of the paper's models, by their parameters
Lines = Mapping[str, Sequence[tuple[float, Estimate]]]


def figure_steps(paths: Sequence[Path], published: Path | None = None) -> bytes:
    """Quality and diversity against the number of steps, by medium; `paths` are of scores.

    `published` is the paper's table 1 or 2, drawn in a panel of its own beside its medium. Variants of ablations and
    controls are left out.
    """
    scores, _ = sorted_out(paths)
    media = by_medium(s for run, s in in_order(scores) if run.method not in CONTROLS and not is_variant(run.method))
    methods = [run.method for run, _ in in_order(s for own in media.values() for s in own) if run.method != "teacher"]
    if not methods:
        raise UserError("figure_steps needs scores of students, MODEL-STEPS.json")
    paper = _read(published) if published else None
    if paper and paper[0] not in media:
        raise UserError(f"the published table {published} is about {paper[0]}, of which there are no scores")
    with style():
        figure = drawn(
            media,
            lambda ax, medium, key: _levels(ax, key, grouped(media[medium])),
            lambda _: (),
            paper and (paper[0], lambda ax: _as_printed(ax, *paper[1:], _paper(media[paper[0]]))),
        )
        known = sorted({*methods, *({"dmd2", "rcm"} if paper else ())}, key=lambda m: Run(m, None, 0).order)
        handles = [*legend(known), *teacher_legend(scores)]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return png(figure)


def _levels(ax: Axes, key: str, groups: Groups) -> None:
    """One measure of all students, a line a method, and of the teacher."""
    lines: dict[str, list[tuple[float, Estimate]]] = defaultdict(list)
    for (method, steps), group in groups.items():
        found = pooled(key, group)
        if found is not None and method == "teacher":
            band(ax, found)
        elif found is not None:
            lines[method].append((steps, found))
    _draw(ax, lines, {method: mark(method) for method in lines})
    _step_axis(ax, (steps for method, steps in groups if method != "teacher"))
    ax.set_xlabel("Sampling steps")


# --- The paper's tables --------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[str, str, list[dict[str, str]]]:
    """Medium, column of the overall score and lines of the paper's teachers and students, of its table 1 or 2."""
    lines = printed(path, "group", "params", "steps", "guided")
    column = next((column for column in OVERALL if column in lines[0]), None)
    if column is None:
        raise UserError(f"the published table {path} has neither a column `overall` nor `total`")
    return OVERALL[column][0], column, [line for line in lines if line["group"] in ("teacher", "dmd2", "rcm")]


def _paper(scores: Iterable[Score]) -> str | None:
    """Which of the paper's models the scores are of."""
    return next((str(s["evaluator"]["paper"]) for s in scores if s.get("evaluator", {}).get("paper")), None)


def _as_printed(ax: Axes, column: str, lines: Sequence[Mapping[str, str]], size: str | None) -> None:
    """A line a size of the model, from its students to the teacher; other sizes than that of the scores are faint."""
    evaluations: dict[float, str] = {}
    for params in dict.fromkeys(line["params"] for line in lines):
        alpha = 0.35 if size is not None and size != params else 1.0
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for line in lines:
            if line["params"] == params:
                guided = line["guided"] == "1"
                x = float(line["steps"]) * (2 if guided else 1)
                evaluations[x] = line["steps"] + ("×2" if guided else "") + "\nteacher" * (line["group"] == "teacher")
                points[line["group"]].append((x, float(line[column])))
        for group, found in points.items():
            ax.plot(
                *zip(*sorted(found), strict=True),
                color=COLORS[group],
                marker=MARKERS[group],
                markersize=7 if group == "teacher" else 4.5,
                linestyle=SIZES.get(params, "-."),
                linewidth=0.9,
                alpha=alpha,
                zorder=3 if group == "rcm" else 2,
            )
        ends = [max(points[group]) for group in ("rcm", "teacher") if group in points]
        ax.plot(*zip(*ends, strict=True), color=FAINT, linestyle=":", linewidth=0.7, alpha=alpha, zorder=1)
        ax.annotate(params, ends[-1], (6, 0), textcoords="offset points", size=6.5, va="center", alpha=alpha)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(evaluations), list(evaluations.values()))
    ax.minorticks_off()
    ax.set_xlim(0.75, 2.4 * max(evaluations))
    ax.grid(visible=False, axis="x")
    ax.set_xlabel("Evaluations of the network")
    ax.set_ylabel(quality_name(OVERALL[column][1]) + (", %" if column == "total" else ""))


# --- Rollouts ------------------------------------------------------------------------------------------------------


def figure_rollout(paths: Sequence[Path]) -> bytes:
    """Random against fixed times of rollouts, for rCM and for DMD, against the number of steps.

    `paths` are of scores and of the students' metrics, by which the updates of a pair are seen to be as many. Below
    each number of steps stands random minus fixed, paired by prompt where scores have values by prompt.
    """
    scores, metrics = sorted_out(paths)
    wanted = {method for pair in ROLLOUTS.values() for method in pair}
    media = by_medium(s for run, s in in_order(scores) if run.method in wanted)
    updates = _updates(metrics)
    there = {(medium, method) for medium, own in media.items() for method, _ in grouped(own)}
    pairs = [
        name for name, pair in ROLLOUTS.items() if any(all((medium, m) in there for m in pair) for medium in media)
    ]
    if not pairs:
        both = " or of ".join(" and ".join(pair) for pair in ROLLOUTS.values())
        raise UserError(f"figure_rollout needs scores of {both}")
    rows = [(medium, key) for medium, own in media.items() for key in (overall(medium, own), *measures(own))]
    with style():
        figure, axes = grid(len(rows), len(pairs), 4.4, 2.45)
        for row, (medium, key) in zip(axes, rows, strict=True):
            own = media[medium]
            first = key == overall(medium, own)
            for ax, name in zip(row, pairs, strict=True):
                _pair(ax, key, grouped(own), name)
                name_axis(ax, key, own)
                if first:
                    parts = [medium.capitalize()] if len(media) > 1 else []
                    count = _as_many(updates, medium, ROLLOUTS[name])
                    parts += [METHODS[name], *([f"{count} student updates"] if count else [])]
                    ax.set_title(row_title(parts, own))
        look: dict[str, Any] = {"color": INK, "marker": "o", "markersize": 5, "linewidth": 0.9}
        handles = [
            Line2D([], [], label="Random rollout times", **look),
            Line2D([], [], label="Fixed rollout times", linestyle="--", markerfacecolor="white", **look),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
        return png(figure)


def _pair(ax: Axes, key: str, groups: Groups, name: str) -> None:
    """One measure of the two methods of a pair, and their differences as labels of the steps."""
    random, fixed = ROLLOUTS[name]
    looks = {random: mark(name), fixed: mark(name) | {"markerfacecolor": "white", "linestyle": "--"}}
    lines: dict[str, list[tuple[float, Estimate]]] = {method: [] for method in looks}
    for (method, steps), group in groups.items():
        found = pooled(key, group)
        if method in lines and found is not None:
            lines[method].append((steps, found))
    if not any(lines.values()):
        ax.set_axis_off()
        return
    _draw(ax, lines, looks)

    def name_of(steps: int) -> str:
        found = contrast(key, groups.get((random, steps), ()), groups.get((fixed, steps), ()))
        if found is None:
            return str(steps)
        return "\n".join([str(steps), found.signed("\n"), *([] if found.paired else ["not paired"])])

    _step_axis(ax, (steps for method, steps in groups if method in looks), name_of)
    ax.set_xlabel("Sampling steps; below, random − fixed")


def _updates(metrics: Iterable[Path]) -> dict[tuple[str, str], set[int]]:
    """How many updates students got, by medium and method."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for path in metrics:
        last = max((row["update"] for row in noted(path) if row.get("role") == "student"), default=0)
        found[whose(path)].add(last)
    return found


def _as_many(updates: Mapping[tuple[str, str], set[int]], medium: str, pair: tuple[str, str]) -> int | None:
    """The updates of all students of a pair, which must not differ; None where there are no metrics of both."""
    if not all((medium, method) in updates for method in pair):
        return None
    counts = {count for method in pair for count in updates[medium, method]}
    if len(counts) > 1:
        said = " and ".join(f"{method} has {sorted(updates[medium, method])}" for method in pair)
        raise UserError(f"{said} student updates of {medium}; figure_rollout compares at equal ones")
    return counts.pop()


# --- Axes and lines ------------------------------------------------------------------------------------------------


def _draw(ax: Axes, lines: Lines, looks: Mapping[str, dict[str, Any]]) -> None:
    """Lines of points with intervals, moved apart a little so that intervals do not cover each other."""
    for index, (name, points) in enumerate(lines.items()):
        shift = 2 ** (0.09 * (index - (len(lines) - 1) / 2))
        look = dict(looks[name])
        stroke = look.pop("linestyle", "-")
        x, y = [at * shift for at, _ in points], [found.value for _, found in points]
        ax.plot(x, y, color=look["color"], linewidth=0.9, linestyle=stroke, zorder=2)
        for at, (_, found) in zip(x, points, strict=True):
            ax.errorbar(at, found.value, yerr=bars(found), **look)


def _step_axis(ax: Axes, steps: Iterable[int], name_of: Callable[[int], str] = str) -> None:
    """Numbers of steps at equal distances for equal factors."""
    ticks = sorted(set(steps))
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [name_of(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(ticks[0] / 1.35, ticks[-1] * 1.35)
    ax.grid(visible=False, axis="x")
