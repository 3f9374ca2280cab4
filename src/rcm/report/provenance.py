"""What the page says of where its numbers come from: for every score the artefacts behind it, and what they took."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm.artefact import read_record, read_run
from rcm.report.scores import CONTROLS, Score, in_order
from rcm.usage import duration, total

Record = Mapping[str, Any]


def read_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The `.prov.json` of these; UserError for one that is damaged."""
    return [read_record(path) for path in paths]


def read_runs(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The `.run.json` of these that are whole."""
    return [run for path in paths if (run := read_run(path)) is not None]


def chains(records: Sequence[Record]) -> dict[str, list[Record]]:
    """For every score file, by its path, the records of the artefacts it comes from, the nearest first.

    What has no record, such as a file of the project, stands there with path and hash alone, of no stage.
    """
    by_content = {record["sha256"]: record for record in records}
    found = {}
    for record in sorted(records, key=lambda record: record["artefact"]):
        if record["stage"] == "evaluate" and record["artefact"].endswith(".json"):
            line: dict[str, Record] = {}
            queue = [record]
            while queue:
                item = queue.pop(0)
                if item["sha256"] not in line:
                    line[item["sha256"]] = item
                    for read in item.get("inputs", []):
                        queue.append(by_content.get(read["sha256"]) or {**read, "artefact": read["path"], "stage": ""})
            found[record["artefact"]] = list(line.values())
    return found


def origins(
    lines: Mapping[str, Sequence[Record]], runs: Iterable[Record], scores: Sequence[Score]
) -> list[dict[str, Any]]:
    """A row for each model of the tables: its origins by hash, and what all behind it took, where that is known."""
    told = {(run["artefact"], run["sha256"]): run for run in runs}  # one of another content is of an older artefact
    rows = []
    for run, score in in_order(scores):
        name = f"{score['model']}-{score['steps']}"
        path = next(
            (path for path in lines if Path(path).parts[-3:] == (score["media"], "scores", f"{name}.json")), None
        )
        if score["model"] in CONTROLS or path is None:
            continue
        line = lines[path]
        made = [record for record in line if record["stage"]]
        ran = [told[key] for record in made if (key := (record["artefact"], record["sha256"])) in told]
        main = _first(line, "distill", "sample", "evaluate")
        rows.append(
            {
                "medium": score["media"],
                "run": run,
                "path": path,
                "checkpoint": _checkpoint(line),
                "prompts": _first(line, "prompts").get("sha256", ""),
                "config": main.get("config_sha256", ""),
                "seed": main.get("seed"),
                "code": sorted({record["code_sha256"] for record in made}),
                **_took(ran, len(made)),
            }
        )
    return sorted(rows, key=lambda row: str(row["medium"]), reverse=True)  # as the page has them: images first


def _first(line: Sequence[Record], *stages: str) -> Record:
    """The record nearest to the score of the first of these stages that there is."""
    for stage in stages:
        for record in line:
            if record["stage"] == stage:
                return record
    return {}


def _checkpoint(line: Sequence[Record]) -> str:
    """The hash of what the teacher was converted from; without a conversion, that of the farthest artefact."""
    converted = _first(line, "convert").get("inputs") or [line[-1]]
    return str(converted[0]["sha256"])


def _took(ran: Sequence[Record], jobs: int) -> dict[str, Any]:
    """Commits, machines and costs, as text; of no job where no `.run.json` is there."""
    cost = total(ran)
    least = "≥ " if len(ran) < jobs else ""  # of some the record is not here
    commits = {
        f"{run['git']['commit'][:8]}{' + changes' if run['git'].get('dirty') else ''}" if run["git"] else "no git"
        for run in ran
    }
    devices = {str(run["host"].get("gpu") or run["host"].get("cpu") or "unknown") for run in ran}
    versions = {f"{name} {run['versions'][name]}" for run in ran for name in _VERSIONS if name in run["versions"]}
    return {
        "known": bool(ran),
        "part": 0 < len(ran) < jobs,
        "commits": ", ".join(sorted(commits)),
        "machine": f"{', '.join(sorted(devices))} with {', '.join(sorted(versions)) or 'unknown versions'}",
        "wall": f"{least}{duration(cost['wall_seconds'])}",
        "peak": f"{least}{cost['peak_mib']:,.0f}",
        "gpu_hours": f"{least}{cost['gpu_hours']:.3g}",
    }


_VERSIONS = ("python", "torch", "triton", "flash-attn", "transformer-engine", "transformers", "cuda")
