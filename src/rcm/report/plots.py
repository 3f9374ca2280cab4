"""Figures of numbers: quality against diversity, the course of training, and rounding."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from rcm.artefact import UserError
from rcm.report.compared import Groups, by_medium, grouped, is_variant, pooled, quality
from rcm.report.look import FAINT, bars, color_of, grid, legend, mark, name_axis, png, row_title, strokes, style
from rcm.report.scores import CONTROLS, Run, Score, in_order, keys_of, label, run_of
from rcm.report.stored import ROUNDED, noted


def figure_quality_diversity(scores: Sequence[Score]) -> bytes:
    """The overall score against each measure of diversity, a point a model and number of steps, with 95 % intervals.

    Points are means over training seeds and the larger the more steps. The variants of ablations have figures of their
    own.
    """
    measures = keys_of(scores, "diversity")
    panels = []
    for medium, own in by_medium(s for run, s in in_order(scores) if not is_variant(run.method)).items():
        key = quality(own)
        found = [score for score in own if key in score["metrics"]]
        if key and any(measure in score["metrics"] for score in found for measure in measures):
            panels.append((medium, key, found))
    if not panels:
        raise UserError(
            "none of the scores has a measure of diversity beside an overall score; evaluate with --diversity"
        )
    runs = [run for run, _ in in_order(score for _, _, found in panels for score in found)]
    counts = sorted({run.steps for run in runs if run.method not in ("teacher", *CONTROLS)})
    sizes = dict(zip(counts, np.linspace(3.2, 6.4, len(counts)), strict=True)) if len(counts) > 1 else {}
    with style():
        width = max(5.4, min(9.9, 2.7 * len(measures)))
        figure, axes = grid(len(panels), len(measures), width / len(measures), 2.75, sharey="row")
        for row, (medium, key, found) in zip(axes, panels, strict=True):
            for ax, measure in zip(row, measures, strict=True):
                if not _scatter(ax, measure, key, grouped(found), sizes):
                    ax.set_axis_off()
            name_axis(row[0], key, found)
            row[0].set_title(row_title([medium.capitalize()] if len(panels) > 1 else [], found))
        handles = legend(run.method for run in runs if run.method not in CONTROLS)
        if any(run.method == "oracle" for run in runs):
            handles.append(Line2D([], [], color=FAINT, linestyle=":", linewidth=1, label="Ground truth"))
        for count, size in sizes.items():
            name = f"{count} step{'s' * (count != 1)}"
            handles.append(Line2D([], [], color=FAINT, marker="o", markersize=size, linestyle="", label=name))
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6 if width < 8 else 10))
        return png(figure)


def _scatter(ax: Axes, key: str, overall: str, groups: Groups, sizes: Mapping[int, float]) -> bool:
    """Points of one panel, steps of one method joined by a line; False where there is nothing to show."""
    ax.set_xlabel(label(key))
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (method, steps), group in groups.items():
        x, y = pooled(key, group), pooled(overall, group)
        if x is None or y is None:
            continue
        if method == "oracle":
            ax.axvline(x.value, color=FAINT, linestyle=":", linewidth=1, zorder=1)
        if method not in CONTROLS:
            lines[method].append((x.value, y.value))
            size = {} if method == "teacher" else {"markersize": sizes.get(steps, 5.5)}
            ax.errorbar(x.value, y.value, xerr=bars(x), yerr=bars(y), **mark(method) | size)
    for method, points in lines.items():
        ax.plot(*zip(*points, strict=True), color=color_of(method), linewidth=0.8, alpha=0.6, zorder=2)
    ax.locator_params(axis="x", nbins=5)
    ax.margins(0.12)
    return bool(lines)


_CURVES = (  # role, key, heading, whether the scale is logarithmic; what no run has is left out
    ("student", "scm_loss", "sCM loss", False),
    ("student", "scm_tangent_norm", "Tangent norm, sCM", True),
    ("student", "dcm_loss", "dCM loss", True),
    ("student", "meanflow_loss", "MeanFlow loss", False),
    ("student", "meanflow_tangent_norm", "Tangent norm, MeanFlow", True),
    ("student", "gradient_norm", "Gradient norm, student", True),
    ("student", "dmd_loss", "DMD loss", True),
    ("student", "gan_loss", "GAN loss, student", False),
    ("critic", "critic_loss", "Critic loss", True),
    ("critic", "critic_gan", "GAN loss, critic", False),
    ("critic", "gradient_norm", "Gradient norm, critic", True),
)
_COLUMNS = 3  # of panels in the figure of training


def figure_training(metrics: Sequence[Path]) -> bytes:
    """Losses, tangent norm and gradient norms against the step; `metrics` are `.../{method}-{seed}/metrics.jsonl`."""
    runs: list[tuple[Run, list[dict[str, Any]]]] = []
    for path in metrics:
        runs.append((run_of(path.absolute().parent.name, 0), noted(path)))
    runs.sort(key=lambda pair: pair[0].order)
    with style():
        panels = [
            (curve, found)
            for curve in _CURVES
            if (found := [(run.method, points) for run, rows in runs if len(points := _points(rows, *curve[:2]))])
        ]
        if not panels:
            raise UserError("the metrics hold no losses to draw")
        rows = -(-len(panels) // _COLUMNS)
        figure = Figure(figsize=(9.6, 0.4 + 2.1 * rows), layout="constrained")
        axes = figure.subplots(rows, _COLUMNS, squeeze=False).flat
        methods = {run.method: run.label for run, _ in runs}
        lines = strokes(methods)
        for ax, ((role, _, heading, logarithmic), found) in zip(axes, panels, strict=False):
            ax.set_title(heading)
            ax.set_xlabel(f"{role.capitalize()} update")
            if logarithmic:
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                ax.yaxis.set_minor_formatter(NullFormatter())
            for method, points in found:
                _curve(ax, points, color_of(method), lines[method])
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        handles = [
            Line2D([], [], color=color_of(method), linestyle=lines[method], linewidth=1.4, label=name)
            for method, name in methods.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=max(1, len(handles)))
        return png(figure)


def _points(rows: Iterable[Mapping[str, Any]], role: str, key: str) -> np.ndarray:
    """(N, 2): update and value, where a row of a role has one."""
    return np.array([(r["update"], r[key]) for r in rows if r.get("role") == role and r.get(key) is not None], float)


def _curve(ax: Axes, points: np.ndarray, color: str, stroke: Any) -> None:
    """Every value faintly, and the running median over a thirtieth of them."""
    x, y = points.T
    half = max(1, len(y) // 60)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(y, half, mode="symmetric"), 2 * half + 1)
    ax.plot(x, y, color=color, linewidth=0.4, alpha=0.25, zorder=1)
    ax.plot(x, np.median(windows, axis=1), color=color, linewidth=1.3, linestyle=stroke)


_PRECISIONS = dict(  # colour and legend of each precision
    zip(
        ROUNDED,
        [
            ("#d55e00", "bfloat16, time included"),
            ("#0072b2", "bfloat16, time and its embedding float32"),
            (FAINT, "float32"),
        ],
        strict=True,
    )
)


def figure_precision(errors: Sequence[Mapping[str, Any]]) -> bytes:
    """Rounding errors of F and of the tangent against the time, a row a network; `errors` are those of `precision`."""
    networks = sorted(errors, key=lambda found: run_of(str(found["model"]), 0).order)
    with style():
        figure = Figure(figsize=(7.6, 0.6 + 2.4 * len(networks)), layout="constrained")
        axes = figure.subplots(len(networks), 2, sharex=True, sharey="row", squeeze=False)
        for row, found in zip(axes, networks, strict=True):
            name = run_of(str(found["model"]), 0).label
            row[0].set_ylabel("Relative error")
            for ax, key, heading in zip(
                row, ("output", "tangent"), ("output F", "tangent cos t sin t dF/dt"), strict=True
            ):
                ax.set_title(f"{name}, {heading}")
                ax.set_yscale("log")
                for precision, (color, _) in _PRECISIONS.items():
                    bounds = found["errors"][precision][key]
                    ax.fill_between(found["times"], bounds["low"], bounds["high"], color=color, alpha=0.2, linewidth=0)
                    ax.plot(found["times"], bounds["median"], color=color, linewidth=1.1)
        for ax in axes[-1]:
            ax.set_xlabel("Trig time t")
        handles = [Line2D([], [], color=color, linewidth=1.4, label=name) for color, name in _PRECISIONS.values()]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return png(figure)
