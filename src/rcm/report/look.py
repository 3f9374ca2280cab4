"""One look for all figures: colours, markers and type, and the figure as PNG bytes at twice the density of a page."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rcm.report.compared import sigma_max
from rcm.report.scores import Estimate, Run, Score

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
    """The colour of a method."""
    return COLORS.get(method, INK)


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


def row_title(parts: Sequence[str], scores: Iterable[Score]) -> str:
    """What a row of panels is about: the parts, and the students' σ_max if their scores say it."""
    starts = dict.fromkeys(f"σ_max {start:g}" for score in scores if (start := sigma_max(score)) is not None)
    text = ", ".join([*parts, *starts])
    return text[:1].upper() + text[1:] if parts else text
