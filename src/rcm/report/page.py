"""The report: one HTML page that needs nothing beside itself, for screens light and dark, phones and paper."""

import base64
import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from rcm.artefact import UserError, reason
from rcm.report.compared import Contrast, contrast, grouped, is_variant, pooled, quality_name
from rcm.report.facts import comparable, differences, short
from rcm.report.figures import chosen_prompts, sample_runs
from rcm.report.findings import findings
from rcm.report.legends import LEGENDS
from rcm.report.panels import heading, panels
from rcm.report.provenance import chains, origins, read_records, read_runs
from rcm.report.rows import from_csv
from rcm.report.scores import CONTROLS, Estimate, Run, Score, headline, in_order, joined, number, reported, run_of
from rcm.usage import duration

FRAME_MS = 160  # of a clip on the page
MEDIA = {"table1": "images", "table2": "clips"}
PER_MODEL = {  # stages with jobs for each
    **dict.fromkeys(("distill", "export", "precision"), "model"),
    **dict.fromkeys(("sample", "measure", "arrange", "official", "evaluate", "throughput"), "steps"),
}
STAGES = (
    *("prompts", "download", "pretrain", "convert", "embed", "synthesize", "distill", "export", "sample", "measure"),
    *("arrange", "official", "evaluate", "throughput", "precision", "table", "figure", "report"),
)
OVERVIEWS = {  # what headline scores are
    "shapeeval.overall": "Share of correct samples, mean of the six tasks",
    "geneval.overall": "Share of correct images, mean of the six tasks",
    "vbench.total": "VBench's total, 0.8 quality + 0.2 semantic",
}
PLOTS = ("quality_diversity", "steps", "lambda", "rollout", "training", "precision")  # figures of lines and points
CLIP_WIDTH, CLIP_FRAMES = 264, 16  # of clips too big to be embedded as they are


def report_page(
    scores: Sequence[Score],
    folders: Sequence[Path],
    *,
    configuration: Sequence[tuple[str, str]] = (),
    title: str = "rCM in miniature",
) -> str:
    """The page as text.

    Args:
        scores: of the models and controls that the page is about. What the folders hold of others, such as of seeds
            that were distilled before, is left out.
        folders: searched for `tables/*.csv` and `figures/*.png` (as in `results/{scale}`),
            `clips/samples/{model}-{steps}/report/{part}/` (as in `data/{scale}`), and in any depth `*.prov.json`,
            `*.run.json` and Snakemake's `benchmarks/{stage}/*.tsv`.
        configuration: headings and texts.
        title: heading of the page.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give the folders of results and data, such as results/tiny")
    found = {path.stem: path for path in _files(folders, "tables/*.csv")}
    others = {name for name, medium in MEDIA.items() if medium not in _mediums(scores)}
    kept = {name: found[name] for name in sorted(found.keys() - others)}
    tables = {name: _table(path) for name, path in kept.items()}
    figures = {path.stem: path for path in _files(folders, "figures/*.png")}
    runs, records = (
        [said for said in read(_files(folders, pattern)) if _belongs(said["stage"], said["artefact"], scores)]
        for read, pattern in ((read_runs, "**/*.run.json"), (read_records, "**/*.prov.json"))
    )
    lines = chains(records)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        number=number,
        lead=_lead(scores),
        media=_media(scores),
        shapes=any("shapeeval.overall" in score["metrics"] for score in scores),
        tables=[(name, heading(name), made) for name, made in tables.items()],
        placed=_placed(scores),
        figures={name: _picture(path) for name, path in figures.items()},
        clips=_clips(folders, scores),
        configuration=configuration,
        times=_times(folders, runs, scores),
        speeds=_speeds(runs),
        host=_host(runs),
        origins=origins(lines, runs, scores),
        chains={"/".join(Path(path).parts[-3:]): line for path, line in lines.items()},
        code=sorted({record["code_sha256"] for record in records}),
    )


def _placed(scores: Iterable[Score]) -> list[str]:
    """Figures that have their place on the page; the others stand after them."""
    media = _mediums(scores)
    places = {"figure_samples": "images" in media, "figure_clips": "clips" in media}
    places |= dict.fromkeys(("figure_quality_diversity", "figure_steps"), bool(media))
    always = ("figure_lambda", "figure_rollout", "figure_training", "figure_precision")
    return [*(name for name, there in places.items() if there), *always]


def _files(folders: Iterable[Path], pattern: str) -> list[Path]:
    """Files that match in any of the folders, each once, in the order of folders and names."""
    found = (path for folder in folders for path in sorted(folder.glob(pattern)))
    return list({path.resolve(): path for path in found}.values())


def _belongs(stage: str, path: str | Path, scores: Iterable[Score]) -> bool:
    """Whether an artefact or a benchmark is of a model that the page is about, or of none.

    Artefacts are `{media}/{student}/...` and `{media}/KIND/{model}-{steps}...` with `samples`, `scores`, `measured` and
    others as KIND, of which `precision` has no steps; benchmarks the same with dashes, where controls have no steps.
    """
    if stage not in PER_MODEL:
        return True
    place = re.sub(r"/((samples|scores|text|measured|official|throughput|precision)/)?", "-", str(path))
    names = {f"{s['media']}-{s['model']}" for s in scores if PER_MODEL[stage] == "model" or s["model"] in CONTROLS}
    names |= {f"{s['media']}-{s['model']}-{s['steps']}" for s in scores if PER_MODEL[stage] == "steps"}
    return any(re.search(rf"(^|-){re.escape(name)}([-.]|$)", place) for name in names)


# --- What was measured ---------------------------------------------------------------------------------------------


def _lead(scores: Sequence[Score]) -> str:
    """What was run, in a sentence; variants of ablations are told where they are shown."""
    parts = []
    for medium in _mediums(scores):
        own = [(run, s) for run, s in in_order(scores) if s["media"] == medium and run.method not in CONTROLS]
        steps: dict[str, set[int]] = defaultdict(set)
        for run, _ in own:
            if run.method != "teacher" and not is_variant(run.method):
                steps[run.label].add(run.steps)
        names: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, counts in steps.items():
            names[tuple(sorted(counts))].append(name)
        students = [f"{joined(some)} at {_steps(counts)}" for counts, some in names.items()]
        if own:
            beside = ["beside the teacher"] if any(run.method == "teacher" for run, _ in own) else []
            said = " ".join([joined(students) or "no student", *beside])
            numbers = {f"{s['n_prompts']} prompts, {s['n_samples']} samples" for _, s in own}
            parts.append(", ".join([f"{medium}: {said}", *(numbers if len(numbers) == 1 else ())]))
    return "; ".join(parts)


def _steps(counts: Sequence[int]) -> str:
    return f"{joined(map(str, counts))} step{'' if counts == (1,) else 's'}"


def _mediums(scores: Iterable[Score]) -> list[str]:
    return sorted({str(score["media"]) for score in scores}, reverse=True)


@dataclass(frozen=True)
class Mark:
    """One line of the overview or, with its share of the teacher's score, one tile."""

    run: Run
    overall: Estimate
    share: Contrast | None = None
    seeds: int = 1

    @property
    def name(self) -> str:
        """As in tables, with seed and steps."""
        seed = f" (seed {self.run.seed})" if self.run.seed else ""
        return self.run.label + seed + (f", {self.run.steps}" if self.run.method not in CONTROLS else "")


def _media(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """For each medium its overviews, one for each set of comparable scores."""
    made = []
    for medium in _mediums(scores):
        groups = comparable(score for score in scores if score["media"] == medium)
        groups = [own for group in groups if (own := [score for score in group if headline(score)])]
        apart = differences(groups)
        told = [
            "; ".join(f"{what} {short(said[i]) or 'unknown'}" for what, said in apart.items())
            for i in range(len(groups))
        ]
        overviews = [_overview(group) | {"apart": words} for group, words in zip(groups, told, strict=True)]
        made.append({"name": medium, "overviews": overviews})
    return made


def _overview(group: Sequence[Score]) -> dict[str, Any]:
    """Headline scores that may be compared, on one scale, and what they say of the paper's claims."""
    key = headline(group[0]) or ""
    marks = [Mark(run, reported(score, key)) for run, score in in_order(group)]
    low, high = 0.0, 1.0
    if key == "vbench.total":  # between models a few hundredths
        bounds = [x for mark in marks for x in (mark.overall.value, mark.overall.low, mark.overall.high) if x == x]
        low, high = np.floor(20 * min(bounds)) / 20, np.ceil(20 * max(bounds) + 1e-9) / 20
    return {
        "name": quality_name(key, group[0]),
        "what": OVERVIEWS[key],
        "marks": marks,
        "teacher": next((mark for mark in marks if mark.run.method == "teacher"), None),
        "students": _tiles(key, group),
        "findings": findings(group),
        "axis": [f"{low:g}", f"{high:g}"],
        "place": lambda value: f"{100 * (value - low) / (high - low):.2f}",
    }


def _tiles(key: str, group: Sequence[Score]) -> list[Mark]:
    """rCM at each number of steps, the most first: all training seeds together, beside the teacher."""
    known = grouped(group)
    teacher = next((found for (method, _), found in known.items() if method == "teacher"), [])
    made = []
    for (method, steps), found in known.items():
        if method == "rcm" and (estimate := pooled(key, found)) is not None:
            share = contrast(key, found, teacher, relative=True)
            made.append(Mark(Run(method, None, steps), estimate, share if share and share.paired else None, len(found)))
    return sorted(made, key=lambda mark: -mark.run.steps)


# --- Pictures ------------------------------------------------------------------------------------------------------


def _uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def _table(path: Path) -> list[Any]:
    """The panels of a table; UserError for a file that holds none."""
    try:
        return panels(from_csv(path.read_text("utf-8"), path))
    except (ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{path} holds no table ({reason(error)}); make it again with `rcm table`") from error


def _picture(path: Path) -> dict[str, Any]:
    """A figure as a data URI with its size on the page, half its pixels."""
    try:
        with Image.open(path) as image:
            image.load()
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the figure {path} cannot be read ({reason(error)}); draw it again") from None
    return {
        "uri": _uri(path.read_bytes()),
        "width": width // 2,
        "height": height // 2,
        "caption": LEGENDS.get(path.stem, ""),
        "plot": path.stem.removeprefix("figure_") in PLOTS,
    }


def clip_folders(folders: Sequence[Path], scores: Sequence[Score]) -> list[Path]:
    """The clips of the report suite that the page shows, sample folders of the models that are scored."""
    names = {f"{s['model']}-{s['steps']}" for s in scores if s["media"] == "clips" and s["model"] not in CONTROLS}
    parts = [path for path in _files(folders, "clips/samples/*/report/*-of-*") if path.is_dir()]
    return [path for path in parts if path.parts[-3] in names]


def _clips(folders: Sequence[Path], scores: Sequence[Score], count: int = 6) -> dict[str, Any] | None:
    """Clips of the report suite as animations: a row a prompt, a column a model and number of steps."""
    runs = sample_runs(clip_folders(folders, scores))
    if not runs:
        return None
    rows = []
    for prompt in chosen_prompts(runs, count):
        cells = []
        for samples in runs:
            clip = samples.frames(prompt)
            small = clip.shape[2] <= CLIP_WIDTH
            shown = (clip, clip[:1]) if small else (_reduced(clip), _reduced(clip[:1]))
            moving, still = (_uri(_animated(frames, small), "png" if small else "webp") for frames in shown)
            cells.append({"moving": moving, "still": still, "small": small, "run": samples.run})
        rows.append({"prompt": runs[0].caption(prompt), "cells": cells})
    return {"runs": [samples.run for samples in runs], "rows": rows}


def _reduced(clip: np.ndarray) -> np.ndarray:
    """At most `CLIP_FRAMES` frames (T, H, W, 3), evenly spaced, scaled down to `CLIP_WIDTH`."""
    chosen = np.linspace(0, len(clip) - 1, min(CLIP_FRAMES, len(clip))).round().astype(int)
    size = CLIP_WIDTH, round(clip.shape[1] * CLIP_WIDTH / clip.shape[2])
    return np.stack([np.asarray(Image.fromarray(clip[i]).resize(size, Image.Resampling.LANCZOS)) for i in chosen])


def _animated(clip: np.ndarray, exact: bool) -> bytes:
    """Frames (T, H, W, 3) as a PNG (`exact`) or a WebP that loops, resting on the last frame."""
    out = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in clip]
    kind, options = ("PNG", {}) if exact else ("WEBP", {"quality": 75})
    if not rest:
        first.save(out, kind, **options | ({"optimize": True} if exact else {}))
    else:
        durations = [FRAME_MS] * len(rest) + [4 * FRAME_MS]
        first.save(out, kind, save_all=True, append_images=rest, duration=durations, loop=0, **options)
    return out.getvalue()


# --- Times and provenance ------------------------------------------------------------------------------------------


def _times(folders: Sequence[Path], runs: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Jobs, seconds and peak memory by stage: from Snakemake's benchmarks, for stages without any from `.run.json`."""
    jobs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for path in _files(folders, "**/benchmarks/**/*.tsv"):
        stage = path.stem if path.parent.name == "benchmarks" else path.parent.name
        stage = stage.partition("-")[0]  # download-codec and download-transformer are one stage
        if not _belongs(stage, path.name, scores):
            continue
        for line in csv.DictReader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t"):
            memory = line.get("max_rss", "")  # "-" or "NA" for a job too short to be looked at
            jobs[stage].append((float(line["s"]), float(memory) if memory[:1].isdecimal() else 0.0))
    seen = set()
    benchmarked = set(jobs)
    for run in runs:
        job = run["stage"], run["started"], run["wall_seconds"]
        if run["stage"] not in benchmarked and job not in seen:
            seen.add(job)
            jobs[run["stage"]].append((float(run["wall_seconds"]), float(run["peak_mib"])))
    order = {stage: index for index, stage in enumerate(STAGES)}
    longest = max((sum(s for s, _ in found) for found in jobs.values()), default=1.0) or 1.0
    return [
        {
            "stage": stage,
            "jobs": len(found),
            "seconds": duration(sum(s for s, _ in found)),
            "longest": duration(max(s for s, _ in found)),
            "peak": f"{max(m for _, m in found):,.0f}",
            "share": sum(s for s, _ in found) / longest,
        }
        for stage, found in sorted(jobs.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
    ]


def _speeds(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Seconds a sample by medium, model and number of steps, from what the sample stage noted of itself."""
    found: dict[tuple[str, Run], list[tuple[int, float]]] = defaultdict(list)
    for run in runs:
        facts = run.get("facts", {})
        place = re.search(r"([^/]+)/samples/([^/]+)-(\d+)/[^/]+/[^/]+$", run["artefact"])
        if place and run["stage"] == "sample" and facts.get("samples") and "sampling_seconds" in facts:
            medium, model, steps = place.groups()
            found[medium, run_of(model, int(steps))].append((facts["samples"], facts["sampling_seconds"]))
    each = {
        key: sum(seconds for _, seconds in jobs) / sum(samples for samples, _ in jobs) for key, jobs in found.items()
    }
    teachers = {medium: seconds for (medium, who), seconds in each.items() if who.method == "teacher"}
    return [
        {
            "medium": medium,
            "run": who,
            "each": each[medium, who],
            "faster": f"{teachers[medium] / each[medium, who]:.1f} ×" if medium in teachers else "",
        }
        for medium, who in sorted(each, key=lambda key: (key[0] != "images", key[1].order))
        if who.method not in CONTROLS and each[medium, who] > 0
    ]


def _host(runs: Sequence[Mapping[str, Any]]) -> str:
    """Where it was measured, from the latest run."""
    if not runs:
        return ""
    run = max(runs, key=lambda run: run["started"])
    host, versions = run["host"], run["versions"]
    return ", ".join(
        [
            f"{host['cores']} cores of {host['cpu']}",
            host["system"],
            *(f"{name} {versions[name]}" for name in ("python", "torch", "numpy") if name in versions),
        ]
    )
