"""Stages behind the samples: evaluate, table, figure, report."""

from argparse import Namespace

from rcm.artefact import atomic_file, read_json, recording, write_text
from rcm.cli.config import compose


def table(arguments: Namespace) -> None:
    """Make a table in three formats, unless the controls fail."""
    from rcm.report.tables import make_table

    inputs = [*arguments.scores, *arguments.controls, arguments.published]
    outputs = {suffix: arguments.out_dir / f"{arguments.name}.{suffix}" for suffix in ("csv", "md", "tex")}
    with recording(*outputs.values(), stage="table", inputs=inputs, config={"name": arguments.name}):
        scores, controls = ([read_json(path) for path in paths] for paths in (arguments.scores, arguments.controls))
        made = make_table(arguments.name, scores, controls, arguments.published)
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
    patterns = ("*/scores/*.json", "tables/*.csv", "figures/*.png")
    found = {path for folder in arguments.results for pattern in patterns for path in folder.glob(pattern)}
    shown = sorted(path for path in found if not path.name.endswith((".prov.json", ".run.json")))
    with recording(arguments.out, stage="report", inputs=shown, config=config):
        write_text(arguments.out, report_page(arguments.results, config=config))
