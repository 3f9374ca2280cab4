"""The figure of λ, the weight of DMD beside sCM in rCM: figure 7 of the paper, with diversity beside quality."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from rcm.artefact import UserError
from rcm.report.compared import Groups, by_medium, grouped, lambda_times, overall, pooled, quality_name
from rcm.report.look import (
    COLORS,
    FAINT,
    INK,
    MARKERS,
    NOT_OURS,
    band,
    bars,
    grid,
    mark,
    png,
    row_title,
    style,
    teacher_legend,
)
from rcm.report.scores import Score, in_order, keys_of, label
from rcm.report.stored import noted, printed, sorted_out, whose

UNITS = {  # measures of diversity that share a panel, by its heading
    "Vendi score": ("diversity.vendi",),
    "Entropy of hidden factors, bits": tuple(f"diversity.{x}_entropy" for x in ("cell", "color", "fill", "background")),
    "Mean distance of pairs": ("diversity.clip_distance", "diversity.dino_distance"),
    "VBench-2.0 diversity": ("diversity.vbench2",),
}
HUES = (("#009e73", "o"), ("#0072b2", "s"), ("#d55e00", "^"), ("#cc79a7", "v"))  # of the measures in one panel
AWAY = 1.2  # decades that sCM alone, of no λ, stands in front of the smallest one


def figure_lambda(paths: Sequence[Path], published: Path | None = None) -> bytes:
    """Quality and diversity against λ√D, by medium; `paths` are of scores and of metrics, which know λ√D.

    Args:
        paths: `MODEL-STEPS.json` of rcm, of rcm-lambda-... (that many times its λ) and of scm (no λ), all at one number
            of steps, and perhaps of the teacher; `.../MEDIUM/MODEL/metrics.jsonl` of all but scm and teacher.
        published: the paper's figure 7, drawn against its own λ in a panel of its own.
    """
    scores, metrics = sorted_out(paths)
    swept = [s for run, s in in_order(scores) if lambda_times(run.method) is not None or run.method == "teacher"]
    media = by_medium(swept)
    balances = _balances(metrics, media)
    panels = {medium: _panels(medium, own) for medium, own in media.items()}
    if not panels:
        raise UserError("figure_lambda needs scores of rcm, rcm-lambda-... and scm, such as rcm-lambda-10-0-4.json")
    columns = max(map(len, panels.values())) + (published is not None)
    with style():
        figure, axes = grid(len(panels), columns, min(3.3, 10.6 / columns), 2.75)
        for row, (medium, parts) in zip(axes, panels.items(), strict=True):
            for ax in row[len(parts) :]:
                ax.set_axis_off()
            groups = grouped(media[medium])
            for ax, (name, keys) in zip(row, parts, strict=False):
                _sweep(ax, keys, groups, balances[medium])
                ax.set_ylabel(name)
            steps = next(steps for method, steps in groups if method != "teacher")
            what = [medium.capitalize()] if len(panels) > 1 else []
            row[0].set_title(row_title([*what, f"{steps} step{'s' * (steps != 1)}"], media[medium]))
        if published is not None:
            _figure7(axes[0, -1], published)
        if handles := teacher_legend(swept):
            figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return png(figure)


def _panels(medium: str, own: Sequence[Score]) -> list[tuple[str, list[str]]]:
    """Headings of the axes of a medium and the measures on each: quality first."""
    steps = sorted({run.steps for run, _ in in_order(own) if run.method != "teacher"})
    if len(steps) != 1:
        found = ", ".join(map(str, steps)) or "none"
        raise UserError(f"figure_lambda compares students at one number of steps; of {medium} there are {found}")
    key, known = overall(medium, own), keys_of(own, "diversity")
    diversity = [(name, [measure for measure in measures if measure in known]) for name, measures in UNITS.items()]
    named = {measure for measures in UNITS.values() for measure in measures}
    diversity += [(label(measure), [measure]) for measure in known if measure not in named]
    return [(quality_name(key, own[0]), [key]), *((name, measures) for name, measures in diversity if measures)]


def _balances(metrics: Sequence[Path], media: Mapping[str, Sequence[Score]]) -> dict[str, dict[str, float]]:
    """λ√D of each method by medium, as its training noted it; 0 for sCM alone, which has no λ."""
    known: dict[tuple[str, str], float] = {}
    for path in metrics:
        values = [row["balance"] for row in noted(path) if row.get("role") == "student" and "balance" in row]
        if values:
            known[whose(path)] = float(np.median(values))
    found: dict[str, dict[str, float]] = {}
    for medium, own in media.items():
        found[medium] = {}
        for method in dict.fromkeys(run.method for run, _ in in_order(own) if run.method != "teacher"):
            if method != "scm" and (medium, method) not in known:
                raise UserError(
                    f"the λ√D of {method} is not known: none of the inputs is .../{medium}/{method}-SEED/metrics.jsonl "
                    "with a `balance` of the student's updates"
                )
            found[medium][method] = 0.0 if method == "scm" else known[medium, method]
        if "rcm" not in found[medium]:
            raise UserError(f"figure_lambda needs scores of rcm for {medium}: its λ is what the others are times of")
    return found


def _sweep(ax: Axes, keys: Sequence[str], groups: Groups, balances: Mapping[str, float]) -> None:
    """Measures against λ√D: decades at equal distances, and no λ at all in front of them, cut off by a gap."""
    usual = balances["rcm"]
    least = min(np.log10(b / usual) for b in balances.values() if b)
    at = {method: float(np.log10(b / usual)) if b else float(least) - AWAY for method, b in balances.items()}
    alone = len(keys) == 1
    for index, key in enumerate(keys):
        color, shape = (COLORS["rcm"], MARKERS["rcm"]) if alone else HUES[index]
        shift = 0 if alone else 0.09 * (index - (len(keys) - 1) / 2)
        found = {method: estimate for (method, _), group in groups.items() if (estimate := pooled(key, group))}
        order = sorted(found.keys() & at.keys(), key=lambda method: at[method])
        line = [(at[method] + shift, found[method].value) for method in order if balances[method]]
        ax.plot(*zip(*line, strict=True) if line else ([], []), color=color, linewidth=0.9)
        for method in order:
            look = mark("rcm") | {"color": color, "ecolor": color, "fmt": shape, "elinewidth": 0.7}
            if not balances[method]:
                look |= mark("scm") | {"elinewidth": 0.7, "ecolor": COLORS["scm"]} if alone else {}
                look["markerfacecolor"] = "white"
            ax.errorbar(at[method] + shift, found[method].value, yerr=bars(found[method]), **look)
        if "teacher" in found and alone:
            band(ax, found["teacher"])
        elif "teacher" in found:
            ax.axhline(found["teacher"].value, color=color, linewidth=0.7, alpha=0.5, zorder=1)
        if not alone:
            ax.plot([], [], color=color, marker=shape, markersize=4.5, linewidth=0.9, label=label(key))
    if not alone:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=6.5, columnspacing=1.0)
    _axis(ax, {at[method]: balance for method, balance in balances.items()}, usual)


def _axis(ax: Axes, ticks: Mapping[float, float], usual: float) -> None:
    """Places of λ√D, named by how many times that of rCM they are, and by themselves."""
    order = sorted(ticks)
    names = [f"{_short(ticks[x] / usual)}×\n{_short(ticks[x])}" if ticks[x] else "0\npure\nsCM" for x in order]
    ax.set_xticks(order, names)
    ax.set_xlim(order[0] - 0.4, order[-1] + 0.4)
    ax.grid(visible=False, axis="x")
    if not ticks[order[0]] and len(order) > 1:
        ax.axvline((order[0] + order[1]) / 2, color=FAINT, linewidth=0.7, linestyle=(0, (1, 2)))
    ax.set_xlabel("Times the scale's λ; below, λ√D")


def _short(value: float) -> str:
    """Three digits, and no fewer than the whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _figure7(ax: Axes, path: Path) -> None:
    """The paper's figure 7."""
    rows = printed(path, "lambda", "vbench_total")
    lines = sorted((float(row["lambda"]), float(row["vbench_total"])) for row in rows)
    ax.set_axis_on()
    ax.plot(*zip(*lines, strict=True), color=INK, marker="o", markersize=5, linewidth=0.9)
    ax.set_xscale("log")
    ax.set_xticks([x for x, _ in lines], [f"{x:g}" for x, _ in lines])
    ax.minorticks_off()
    ax.margins(0.12, 0.15)
    ax.grid(visible=False, axis="x")
    ax.set_title(NOT_OURS)
    ax.set_xlabel("λ")
    ax.set_ylabel("VBench total, %")
