"""One look for all figures: colours, markers and type, and the figure as PNG bytes at twice the density of a page."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rcm.report.compared import is_variant, measures, overall, quality, quality_name
from rcm.report.facts import sigma_max
from rcm.report.scores import Estimate, Run, Score, label

DPI = 200  # pixels an inch; a page shows them at half size
INK, FAINT = "#24292f", "#8c959f"
COLORS = {  # Okabe and Ito's palette, told apart by readers with colour-blindness too; markers differ as well
    "teacher": "#24292f",
    "scm": "#0072b2",
    "dcm": "#56b4e9",
    "meanflow": "#b8860b",
    "dmd": "#d55e00",
    "dmd2": "#cc79a7",
    "rcm": "#009e73",
}
MARKERS = {"teacher": "*", "scm": "s", "dcm": "P", "meanflow": "X", "dmd": "^", "dmd2": "v", "rcm": "o"}
STROKES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))  # of variants of a method, which have its colour
NOT_OURS = "As printed in the paper"
COLUMNS = 4  # panels in a line, more than which are broken into lines of three
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "text.color": INK,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
}


def style() -> Any:
    """One look for all figures, independent of the user's matplotlibrc."""
    look: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE, "backend": "agg"}
    return matplotlib.rc_context(look)


def png(figure: Figure) -> bytes:
    """The figure as PNG, without the metadata that name version or time."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def color_of(method: str) -> str:
    """The colour of a method, which variants of it share."""
    return COLORS.get(method.partition("-")[0], INK)


def strokes(methods: Iterable[str]) -> dict[str, Any]:
    """Line styles of methods: solid, but for variants, by which those of one colour are told apart."""
    made: dict[str, Any] = {}
    for method in methods:
        used = sum(is_variant(other) and color_of(other) == color_of(method) for other in made)
        made.setdefault(method, STROKES[used % len(STROKES)] if is_variant(method) else "-")
    return made


def mark(method: str) -> dict[str, Any]:
    """How a point with its intervals is drawn by `errorbar`."""
    color = color_of(method)
    return {
        "fmt": MARKERS.get(method, "D"),
        "markersize": 8 if method == "teacher" else 5.5,
        "color": color,
        "ecolor": (*matplotlib.colors.to_rgb(color), 0.35),
        "elinewidth": 0.9,
        "zorder": 3,
    }


def bars(estimate: Estimate) -> np.ndarray | None:
    """The lengths of an interval to both sides, for `errorbar`; None without one."""
    low, high = estimate.value - estimate.low, estimate.high - estimate.value
    return None if low != low else np.array([[max(0.0, low)], [max(0.0, high)]])


def legend(methods: Iterable[str]) -> list[Line2D]:
    """A handle a method, each once."""
    made = []
    for method in dict.fromkeys(methods):
        look = mark(method)
        name = Run(method, None, 0).label
        made.append(Line2D([], [], color=look["color"], marker=look["fmt"], markersize=5, linewidth=0.8, label=name))
    return made


def teacher_legend(scores: Iterable[Score]) -> list[Line2D]:
    """A handle for the bands of the teacher among the scores, with its number of steps."""
    counts = sorted({int(score["steps"]) for score in scores if score["model"] == "teacher"})
    return [Line2D([], [], color=INK, linewidth=0.9, label=f"Teacher, {count} steps") for count in counts]


def band(ax: Axes, estimate: Estimate) -> None:
    """A number with its interval all across a panel."""
    ax.axhline(estimate.value, color=INK, linewidth=0.9, zorder=1)
    if estimate.low == estimate.low:
        ax.axhspan(estimate.low, estimate.high, color=INK, alpha=0.08, linewidth=0, zorder=0)


def grid(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, np.ndarray]:
    """A figure of panels, which are so wide and high in inches; `shared` is what matplotlib calls sharex and sharey."""
    figure = Figure(figsize=(max(4.0, width * columns), 0.45 + height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def drawn(
    media: Mapping[str, Sequence[Score]],
    draw: Callable[[Axes, str, str], None],
    said: Callable[[str], Sequence[str]],
    paper: tuple[str, Callable[[Axes], None]] | None = None,
) -> Figure:
    """A figure with a panel a measure: the overall score of a medium, its diversity, then what the paper printed.

    Args:
        media: scores by medium.
        draw: draws a measure of a medium.
        said: what to say of a medium in its title.
        paper: beside which medium the paper's own panel stands, and what draws it.
    """
    keys = {medium: [overall(medium, own), *measures(own)] for medium, own in media.items()}
    panels = {m: [*own, NOT_OURS] if paper and paper[0] == m else own for m, own in keys.items()}
    columns = max(map(len, panels.values()))
    columns = 3 if columns > COLUMNS else columns
    lines = [(m, own[i : i + columns]) for m, own in panels.items() for i in range(0, len(own), columns)]
    figure, axes = grid(len(lines), columns, min(3.3, 10.6 / columns), 2.6)
    for row, (medium, shown) in zip(axes, lines, strict=True):
        for ax, key in zip(row, shown, strict=False):
            if paper and key == NOT_OURS:
                ax.set_title(NOT_OURS)
                paper[1](ax)
                continue
            draw(ax, medium, key)
            name_axis(ax, key, media[medium])
            if key == keys[medium][0]:
                parts = [medium.capitalize()] if len(media) > 1 else []
                ax.set_title(row_title([*parts, *said(medium)], media[medium]))
        for ax in row[len(shown) :]:
            ax.set_axis_off()
    return figure


def name_axis(ax: Axes, key: str, own: Sequence[Score]) -> None:
    """The measure on the vertical axis; an overall score with its evaluator."""
    ax.set_ylabel(quality_name(key, own[0]).replace(") ", ")\n") if key == quality(own) else label(key))


def row_title(parts: Sequence[str], scores: Iterable[Score]) -> str:
    """What a row of panels is about: the parts, and the students' σ_max if their scores say it."""
    starts = (start for score in scores if (start := sigma_max(score)) is not None)
    return ", ".join([*parts, *(rf"$\sigma_\mathrm{{max}}$ = {start:g}" for start in dict.fromkeys(starts))])
