"""Stages behind the samples: evaluate, table, figure, report."""

from argparse import Namespace
from pathlib import Path

import yaml

from rcm.artefact import UserError, atomic_file, read_json, recording, write_json, write_text
from rcm.cli.config import compose


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
        if arguments.name == "figure_quality_diversity":
            inputs = [read_json(path) for path in inputs]
        drawn = getattr(figures, arguments.name)(inputs)
        with atomic_file(arguments.out) as path:
            path.write_bytes(drawn)


def report(arguments: Namespace) -> None:
    """Make the HTML page."""
    from rcm.report.page import report_page

    config = compose(arguments.overrides)
    scores = arguments.scores or []
    patterns = ("tables/*.csv", "figures/*.png")
    found = {path for folder in arguments.results for pattern in patterns for path in folder.glob(pattern)}
    with recording(arguments.out, stage="report", inputs=[*scores, *sorted(found)], config=config):
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        page = report_page(
            [read_json(path) for path in scores], arguments.results, configuration=[("Configuration", text)]
        )
        write_text(arguments.out, page)
