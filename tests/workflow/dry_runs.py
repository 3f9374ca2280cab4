"""Calls of Snakemake from one process that has imported it and composed the configuration, as starts of it are slow.

Called by test_reruns.py in the folder of a workflow. A call is a line of JSON: `words` of the command line, the file
`answer`, folders to import from before all others (`path`), and whether files changed since the first call (`changed`).
The answer has what was said and the jobs that Snakemake took to be necessary.
"""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import snakemake.cli
from snakemake.dag import DAG

import rcm.cli.config
from rcm.cli import sources
from rcm.cli.parser import STAGES

READ = ("stage_code", "code_digest", "reached", "_imports", "_path", "_tree", "_text")
compose = rcm.cli.config.compose


def forget() -> None:
    """Read the configuration and the sources again."""
    setattr(rcm.cli.config, "compose", cache(compose))  # noqa: B010
    for name in READ:
        getattr(sources, name).cache_clear()


def call(words: list[str], path: list[str], changed: bool) -> dict[str, Any]:
    """Call Snakemake."""
    sys.path[:0] = path
    if changed:
        forget()
    built: list[DAG] = []
    begin = DAG.__init__

    def watched(dag: DAG, *given: Any, **named: Any) -> None:
        built.append(dag)
        begin(dag, *given, **named)

    setattr(DAG, "__init__", watched)  # noqa: B010
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            snakemake.cli.main(words)
        except SystemExit as end:
            print(end.code)
    jobs = [
        {
            "rule": job.rule.name,
            "wildcards": dict(job.wildcards_dict),
            "outputs": {str(output): output.is_directory for output in job.output},
            "notes": [*map(str, job.log), *([str(job.benchmark)] if job.benchmark else []), job.params.get("resume")],
        }
        for job in (built[-1]._needrun if built else [])  # also those that a dry run has finished
    ]
    return {"said": said.getvalue(), "jobs": jobs}


forget()
for medium in ("images", "clips"):
    for method in ("", "objective=dmd", "objective=rcm"):
        rcm.cli.config.compose(tuple(filter(None, (f"experiment=tiny-{medium}", method))))
for stage in STAGES:
    sources.stage_code(stage)
for line in sys.stdin:
    case = json.loads(line)
    answer = case.pop("answer")
    if not (child := os.fork()):
        Path(answer).write_text(json.dumps(call(**case)), encoding="utf-8")
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
