"""The figures, as PNG bytes at twice the density of a page: the same inputs give the same bytes."""

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from rcm.artefact import UserError
from rcm.evaluation.samples import PromptSamples, list_samples, read_frames
from rcm.report.scores import CONTROLS, Run, Score, in_order, keys_of, label, reported, run_of

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


def _style() -> Any:
    """One look for all figures, independent of the user's matplotlibrc."""
    look: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE, "backend": "agg"}
    return matplotlib.rc_context(look)


def _png(figure: Figure) -> bytes:
    """The figure as PNG, without the metadata that name version or time."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


# --- Pictures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """The samples of one run, by number of the prompt."""

    run: Run
    prompts: Mapping[int, PromptSamples]

    def frames(self, prompt: int) -> np.ndarray:
        """The first sample of a prompt, uint8 (T, H, W, 3)."""
        return read_frames(self.prompts[prompt].paths[0])

    def caption(self, prompt: int) -> str:
        """What a prompt asks for."""
        return str(self.prompts[prompt].metadata["prompt"])


def sample_runs(folders: Iterable[Path]) -> list[Samples]:
    """Sample folders `.../{model}-{steps}/{suite}/{part}`, joined by run, in the order of tables; controls last."""
    found: dict[Run, list[Path]] = defaultdict(list)
    for folder in folders:
        model, dash, steps = ("", "", *folder.absolute().parts)[-3].rpartition("-")
        if not dash or not steps.isdecimal():
            raise UserError(f"{folder} is no folder of samples; expected .../MODEL-STEPS/SUITE/PART")
        found[run_of(model, int(steps))].append(folder)
    runs = sorted(found, key=lambda run: run.order)
    return [Samples(run, {item.index: item for item in list_samples(sorted(found[run]))}) for run in runs]


def chosen_prompts(runs: Sequence[Samples], count: int) -> list[int]:
    """Prompts that all runs have, the first of each task in turn: chosen before anyone saw a sample."""
    if not runs:
        raise UserError("there are no samples to show")
    by_task: dict[str, list[int]] = defaultdict(list)
    for index in sorted(set.intersection(*(set(run.prompts) for run in runs))):
        by_task[runs[0].prompts[index].metadata["tag"]].append(index)
    turns = zip_longest(*by_task.values())
    taken = [index for turn in turns for index in turn if index is not None][:count]
    if not taken:
        raise UserError("the runs have no prompt in common, so their samples cannot be shown side by side")
    return [index for indices in by_task.values() for index in indices if index in taken]


def _enlarged(picture: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel as a square of `factor` pixels."""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


class _Canvas:
    """A figure of a given size in pixels on which pictures keep every pixel and text is placed from the top left."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        self.pixels = np.full((height, width, 3), 255, dtype=np.uint8)

    def picture(self, x: int, y: int, picture: np.ndarray) -> None:
        self.pixels[y : y + picture.shape[0], x : x + picture.shape[1]] = picture

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **style)

    def rule(self, x0: float, x1: float, y: float) -> None:
        height = 1 - y / self.height
        self.figure.add_artist(Line2D([x0 / self.width, x1 / self.width], [height, height], color=FAINT, linewidth=0.6))

    def png(self) -> bytes:
        self.figure.figimage(self.pixels, origin="upper", zorder=-1)
        return _png(self.figure)


def _heading(run: Run) -> str:
    return f"{run.steps} step{'s' * (run.steps != 1)}" if run.method not in CONTROLS else ""


def _named(runs: Sequence[Samples]) -> list[str]:
    """Names of runs, with the seed where a method has several."""
    seeds = {(s.run.method, s.run.seed) for s in runs}
    several = {method for method, _ in seeds if sum(m == method for m, _ in seeds) > 1}
    return [s.run.label + (f" (seed {s.run.seed})" if s.run.method in several else "") for s in runs]


def figure_samples(samples: Sequence[Path], *, prompts: int = 8) -> bytes:
    """Same seeds for all: a row a prompt; columns teacher, then the students at 1, 2 and 4 steps.

    `samples` are folders in GenEval's layout as the sample stage writes them, `.../{model}-{steps}/{suite}/{part}`, in
    any order and number of parts; model and steps are read from the path.
    """
    runs = sample_runs(samples)
    rows = chosen_prompts(runs, prompts)
    names = _named(runs)
    side = runs[0].frames(rows[0]).shape[1]
    caption, header, gap, apart = 400, 104, 8, 28
    factor = max(1, min(5, (1720 // len(runs) - gap) // side))
    tile = side * factor
    lefts, x = [], caption
    for index in range(len(runs)):
        x += 0 if index == 0 else gap if names[index] == names[index - 1] else apart
        lefts.append(x)
        x += tile
    with _style():
        canvas = _Canvas(x + 16, header + len(rows) * (tile + gap) + 8)
        for name in dict.fromkeys(names):
            own = [left for left, other in zip(lefts, names, strict=True) if other == name]
            color = COLORS.get(runs[names.index(name)].run.method, INK)
            middle = (own[0] + own[-1] + tile) / 2
            canvas.text(middle, 40, name, ha="center", va="baseline", size=9.5, weight="bold", color=color)
            canvas.rule(own[0], own[-1] + tile, 54)
        for left, run in zip(lefts, runs, strict=True):
            canvas.text(left + tile / 2, 88, _heading(run.run), ha="center", va="baseline", size=7.5)
        for row, prompt in enumerate(rows):
            y = header + row * (tile + gap)
            text = runs[0].caption(prompt)
            canvas.text(
                caption - 24,
                y + tile / 2,
                fill(text, 24, max_lines=5),
                ha="right",
                va="center",
                size=7.5,
                linespacing=1.25,
            )
            for left, run in zip(lefts, runs, strict=True):
                canvas.picture(left, y, _enlarged(run.frames(prompt)[0], factor))
        return canvas.png()


def figure_clips(samples: Sequence[Path], *, prompts: int = 4) -> bytes:
    """Clips as film strips: a block a prompt, a row a model, frames side by side. Input as `figure_samples`."""
    runs = sample_runs(samples)
    blocks = chosen_prompts(runs, prompts)
    names = _named(runs)
    count, side = runs[0].frames(blocks[0]).shape[:2]
    caption, header, gap, apart = 330, 60, 6, 30
    factor = max(1, min(4, (1700 // count - gap) // side))
    tile = side * factor
    height = header + len(runs) * (tile + gap)
    with _style():
        canvas = _Canvas(caption + count * (tile + gap) + 16, len(blocks) * (height + apart))
        for block, prompt in enumerate(blocks):
            top = block * (height + apart)
            canvas.text(
                caption,
                top + 38,
                runs[0].caption(prompt),
                va="baseline",
                size=8.5,
                style="italic",
            )
            for row, run in enumerate(runs):
                y = top + header + row * (tile + gap)
                color = COLORS.get(run.run.method, INK)
                heading = names[row]
                canvas.text(
                    caption - 24,
                    y + tile / 2 - 5,
                    heading,
                    ha="right",
                    va="bottom",
                    size=8.5,
                    weight="bold",
                    color=color,
                )
                canvas.text(caption - 24, y + tile / 2 + 7, _heading(run.run), ha="right", va="top", size=7.5)
                for index, frame in enumerate(run.frames(prompt)):
                    canvas.picture(caption + index * (tile + gap), y, _enlarged(frame, factor))
        return canvas.png()


# --- Plots ---------------------------------------------------------------------------------------------------------


def figure_quality_diversity(scores: Sequence[Score]) -> bytes:
    """ShapeEval overall against each measure of diversity, a point a model and number of steps, with 95 % intervals."""
    measures = keys_of(scores, "diversity")
    media = sorted({str(s["media"]) for s in scores if any(key in s["metrics"] for key in measures)}, reverse=True)
    if not media:
        raise UserError("none of the scores has a measure of diversity; evaluate with --diversity")
    with _style():
        figure = Figure(
            figsize=(max(5.4, min(9.9, 2.7 * len(measures))), 0.45 + 2.75 * len(media)), layout="constrained"
        )
        axes = figure.subplots(len(media), len(measures), sharey="row", squeeze=False)
        for row, medium in zip(axes, media, strict=True):
            own = in_order(s for s in scores if s["media"] == medium and "shapeeval.overall" in s["metrics"])
            for ax, key in zip(row, measures, strict=True):
                _scatter(ax, key, [(run, score) for run, score in own if key in score["metrics"]])
            row[0].set_ylabel("ShapeEval overall")
            row[0].set_title(medium.capitalize() if len(media) > 1 else "")
        methods = {run.method: run for run, _ in in_order(scores) if run.method not in CONTROLS}
        handles = [
            Line2D(
                [],
                [],
                color=COLORS.get(m, INK),
                marker=MARKERS.get(m, "D"),
                linewidth=0.8,
                markersize=5,
                label=run.label,
            )
            for m, run in methods.items()
        ]
        if any(run.method == "oracle" for run, _ in in_order(scores)):
            handles.append(Line2D([], [], color=FAINT, linestyle=":", linewidth=1, label="Ground truth"))
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return _png(figure)


def _scatter(ax: Axes, key: str, own: Sequence[tuple[Run, Score]]) -> None:
    """Points of one panel; steps of one student are joined by a line and numbered."""
    ax.set_xlabel(label(key))
    lines: dict[tuple[str, int | None], list[tuple[float, float]]] = defaultdict(list)
    for run, score in own:
        x, y = reported(score, key), reported(score, "shapeeval.overall")
        if run.method == "oracle":
            ax.axvline(x.value, color=FAINT, linestyle=":", linewidth=1, zorder=1)
        if run.method in CONTROLS:
            continue
        color = COLORS.get(run.method, INK)
        lines[run.method, run.seed].append((x.value, y.value))
        ax.errorbar(
            x.value,
            y.value,
            xerr=_bars(x.value, x.low, x.high),
            yerr=_bars(y.value, y.low, y.high),
            fmt=MARKERS.get(run.method, "D"),
            markersize=8 if run.method == "teacher" else 5.5,
            color=color,
            ecolor=(*matplotlib.colors.to_rgb(color), 0.35),
            elinewidth=0.9,
            zorder=3,
        )
        if run.method != "teacher":
            ax.annotate(str(run.steps), (x.value, y.value), (5, 4), textcoords="offset points", size=7, color=color)
    for (method, _), points in lines.items():
        ax.plot(*zip(*points, strict=True), color=COLORS.get(method, INK), linewidth=0.8, alpha=0.6, zorder=2)
    ax.margins(0.12)


def _bars(value: float, low: float, high: float) -> np.ndarray | None:
    return None if low != low else np.array([[max(0.0, value - low)], [max(0.0, high - value)]])


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
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"the metrics {path} cannot be read: {error}") from error
        runs.append((run_of(path.absolute().parent.name, 0), rows))
    runs.sort(key=lambda pair: pair[0].order)
    with _style():
        panels = [
            (curve, found)
            for curve in _CURVES
            if (found := [(run.method, points) for run, rows in runs if len(points := _points(rows, *curve[:2]))])
        ]
        if not panels:
            raise UserError("the metrics hold no losses to draw")
        lines = -(-len(panels) // _COLUMNS)
        figure = Figure(figsize=(9.6, 0.4 + 2.1 * lines), layout="constrained")
        axes = figure.subplots(lines, _COLUMNS, squeeze=False).flat
        for ax, ((role, _, heading, logarithmic), found) in zip(axes, panels, strict=False):
            ax.set_title(heading)
            ax.set_xlabel(f"{role.capitalize()} update")
            if logarithmic:
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                ax.yaxis.set_minor_formatter(NullFormatter())
            for method, points in found:
                _curve(ax, points, COLORS.get(method, INK))
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        methods = {run.method: run for run, _ in runs}
        handles = [
            Line2D([], [], color=COLORS.get(m, INK), linewidth=1.4, label=run.label) for m, run in methods.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=max(1, len(handles)))
        return _png(figure)


def _points(rows: Iterable[Mapping[str, Any]], role: str, key: str) -> np.ndarray:
    """(N, 2): update and value, where a row of a role has one."""
    return np.array([(r["update"], r[key]) for r in rows if r.get("role") == role and r.get(key) is not None], float)


def _curve(ax: Axes, points: np.ndarray, color: str) -> None:
    """Every value faintly, and the running median over a thirtieth of them."""
    x, y = points.T
    half = max(1, len(y) // 60)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(y, half, mode="symmetric"), 2 * half + 1)
    ax.plot(x, y, color=color, linewidth=0.4, alpha=0.25)
    ax.plot(x, np.median(windows, axis=1), color=color, linewidth=1.3)


_PRECISIONS = {  # colour and legend of each precision, the most rounded first
    "bfloat16": ("#d55e00", "bfloat16, time included"),
    "bfloat16, time in float32": ("#0072b2", "bfloat16, time and its embedding float32"),
    "float32": (FAINT, "float32"),
}


def figure_precision(errors: Sequence[Mapping[str, Any]]) -> bytes:
    """Rounding errors of F and of the tangent against the time, a row a network; `errors` are those of `precision`."""
    networks = sorted(errors, key=lambda found: run_of(str(found["model"]), 0).order)
    with _style():
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
        return _png(figure)
