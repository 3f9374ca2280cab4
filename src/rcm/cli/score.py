"""Stages behind the samples: evaluate, table, figure, report."""

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rcm.artefact import UserError, atomic_file, read_json, recording, write_json, write_text
from rcm.cli.config import compose, config_dir, options


def evaluate(arguments: Namespace) -> None:
    """Score the samples of one model at one number of steps."""
    from rcm.evaluation import evaluate as score
    from rcm.evaluation import results_jsonl

    config = compose(arguments.overrides)
    model, steps = model_and_steps(arguments.out)
    settings, diversity = config["evaluation"], arguments.diversity or []
    numbers = {"media": config["media"], "model": model, "steps": steps, "resamples": settings["bootstrap"]}
    inputs = [*arguments.samples, *diversity]
    with recording(arguments.out, arguments.results, stage="evaluate", inputs=inputs, config=numbers):
        made = score(arguments.samples, diversity, **numbers)
        write_json(arguments.out, made.scores)
        write_text(arguments.results, results_jsonl(made.results))


def model_and_steps(out: Path) -> tuple[str, int]:
    """Whose scores a file holds: (rcm-0, 4) of `rcm-0-4.json`."""
    model, _, steps = out.stem.rpartition("-")
    if not (model and steps.isdecimal() and out.suffix == ".json"):
        raise UserError(f"--out must be called MODEL-STEPS.json, such as rcm-0-4.json; got {out.name!r}")
    return model, int(steps)


def table(arguments: Namespace) -> None:
    """Make a table in three formats, unless the controls fail."""
    from rcm.report.tables import make_table

    settings = compose(arguments.overrides)["evaluation"]
    limits = {key: settings[key] for key in ("oracle_at_least", "floor_at_most")}
    inputs = [*arguments.scores, *arguments.controls, arguments.published]
    outputs = {suffix: arguments.out_dir / f"{arguments.name}.{suffix}" for suffix in ("csv", "md", "tex")}
    with recording(*outputs.values(), stage="table", inputs=inputs, config={"name": arguments.name, **limits}):
        scores, controls = ([read_json(path) for path in paths] for paths in (arguments.scores, arguments.controls))
        made = make_table(arguments.name, scores, controls, arguments.published, **limits)
        for suffix, path in outputs.items():
            write_text(path, made[suffix])


def figure(arguments: Namespace) -> None:
    """Draw a figure."""
    from rcm.report import figures

    with recording(arguments.out, stage="figure", inputs=arguments.inputs, config={"name": arguments.name}):
        inputs = arguments.inputs
        if arguments.name in ("figure_quality_diversity", "figure_precision"):
            inputs = [read_json(path) for path in inputs]
        drawn = getattr(figures, arguments.name)(inputs)
        with atomic_file(arguments.out) as path:
            path.write_bytes(drawn)


def report(arguments: Namespace) -> None:
    """Make the HTML page."""
    from rcm.report.page import report_page

    paths = arguments.scores or []
    scores = [read_json(path) for path in paths]
    chosen = next((word for word in arguments.overrides if word.startswith("experiment=")), "experiment=tiny-images")
    scale = chosen.removeprefix("experiment=").rpartition("-")[0]
    words = [
        word for word in arguments.overrides if not word.startswith(("experiment=", "objective=", "seed=", "suite="))
    ]
    config = _configuration(scale, words, scores)
    patterns = ("tables/*.csv", "figures/*.png")
    found = {path for folder in arguments.results for pattern in patterns for path in folder.glob(pattern)}
    with recording(arguments.out, stage="report", inputs=[*paths, *sorted(found)], config=config):
        title = "rCM in miniature" if scale == "tiny" else f"rCM: {scale}"
        texts = [(heading, yaml.safe_dump(part, sort_keys=False, width=120)) for heading, part in config.items()]
        write_text(arguments.out, report_page(scores, arguments.results, configuration=texts, title=title))


def _configuration(scale: str, words: Sequence[str], scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the page shows of the configuration: what is built, one medium's numbers, and those of the other."""
    methods = [name for name in options("objective") if any(str(s["model"]).startswith(f"{name}-") for s in scores)]
    names = {media: f"{scale}-{media}" for media in ("images", "clips") if f"{scale}-{media}" in options("experiment")}
    trees = {media: _of_medium([f"experiment={name}", *words], methods) for media, name in names.items()}
    files = [path for path in (Path("pipeline.yaml"), Path("scale", f"{scale}.yaml")) if (config_dir() / path).exists()]
    shown = {
        f"config/{path} (without what --config changed)": yaml.safe_load((config_dir() / path).read_text("utf-8"))
        for path in files
    }
    (media, first), *others = trees.items()
    shown[f"Configuration of {media}"] = first
    return shown | {f"Configuration of {other}, where it differs": _differences(first, tree) for other, tree in others}


def _of_medium(words: list[str], methods: Iterable[str]) -> dict[str, Any]:
    """The composed tree with the objectives of all methods, without what differs from job to job."""
    trees = {method: compose([*words, f"objective={method}"]) for method in methods}
    tree = next(iter(trees.values()), None) or compose(words)
    numbers = {key: value for key, value in tree.items() if key not in ("objective", "seed", "suite")}
    return {**numbers, "objectives": {method: tree["objective"] for method, tree in trees.items()}}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in `b` and not so in `a`."""
    found = {}
    for key, value in b.items():
        if isinstance(value, dict) and isinstance(a.get(key), dict):
            if inner := _differences(a[key], value):
                found[key] = inner
        elif key not in a or value != a[key]:
            found[key] = value
    return found
