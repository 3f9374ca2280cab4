"""The figure of λ, the weight of DMD beside sCM in rCM: figure 7 of the paper, with diversity beside quality."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from rcm.artefact import UserError
from rcm.report.compared import Groups, by_medium, grouped, lambda_times, pooled
from rcm.report.look import FAINT, INK, band, bars, color_of, drawn, legend, mark, png, style, teacher_legend
from rcm.report.scores import Estimate, Score, in_order
from rcm.report.stored import noted, printed, sorted_out, whose

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
    if not media:
        raise UserError("figure_lambda needs scores of rcm, rcm-lambda-... and scm, such as rcm-lambda-10-0-4.json")
    steps = {medium: _steps(medium, own) for medium, own in media.items()}
    balances = _balances(metrics, media)
    with style():
        figure = drawn(
            media,
            lambda ax, medium, key: _sweep(ax, key, grouped(media[medium]), balances[medium]),
            lambda medium: [f"{steps[medium]} step{'s' * (steps[medium] != 1)}"],
            None
            if published is None
            else ("clips" if "clips" in media else "images", lambda ax: _figure7(ax, published)),
        )
        methods = ["scm", "rcm"] if any("scm" in own for own in balances.values()) else ["rcm"]
        handles = [*legend(methods), *teacher_legend(swept)]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return png(figure)


def _steps(medium: str, own: Sequence[Score]) -> int:
    """The number of steps of all students of a medium."""
    steps = sorted({run.steps for run, _ in in_order(own) if run.method != "teacher"})
    if len(steps) != 1:
        found = ", ".join(map(str, steps)) or "none"
        raise UserError(f"figure_lambda compares students at one number of steps; of {medium} there are {found}")
    return steps[0]


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


def _sweep(ax: Axes, key: str, groups: Groups, balances: Mapping[str, float]) -> None:
    """A measure against λ√D: decades at equal distances, and no λ at all in front of them, cut off by a gap."""
    usual = balances["rcm"]
    least = min(np.log10(b / usual) for b in balances.values() if b)
    at = {method: float(np.log10(b / usual)) if b else float(least) - AWAY for method, b in balances.items()}
    line: dict[float, Estimate] = {}
    for (method, _), group in groups.items():
        found = pooled(key, group)
        if found is not None and method == "teacher":
            band(ax, found)
        elif found is not None:
            ax.errorbar(at[method], found.value, yerr=bars(found), **mark("rcm" if balances[method] else method))
            line |= {at[method]: found} if balances[method] else {}
    ax.plot(sorted(line), [line[x].value for x in sorted(line)], color=color_of("rcm"), linewidth=0.9, zorder=2)
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
    ax.plot(*zip(*lines, strict=True), color=INK, marker="o", markersize=5, linewidth=0.9)
    ax.set_xscale("log")
    ax.set_xticks([x for x, _ in lines], [f"{x:g}" for x, _ in lines])
    ax.minorticks_off()
    ax.margins(0.12, 0.15)
    ax.grid(visible=False, axis="x")
    ax.set_xlabel("λ")
    ax.set_ylabel("VBench total, %")
