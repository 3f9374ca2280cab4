"""Tidy rows of tables: one number a row, with all that says what it may be compared with.

Scores are comparable if everything in `COMPARED` is the same: then they carry the same number in the column
`comparable`, stand in one panel, and are averaged over training seeds. Numbers of the paper carry none.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rcm.artefact import UserError
from rcm.evaluation.scores import VERSION
from rcm.report.scores import Estimate, Run, Score, compare, in_order, ratio, reported

RELATIVE = "shapeeval.relative_to_teacher"
NATIVE_DIFFERENCE = "vbench_native_minus_official"  # family of what the native dimensions add to the official ones
SPEED = "throughput.fps"
DIVERSITY = ("diversity", "pixels")  # families measured on samples of a suite of their own
COMPARED = {  # columns that must agree in a panel, and what to call them
    "media": "medium",
    "evaluator": "evaluator",
    "models": "models",
    "protocol": "protocol",
    "prompts_sha256": "prompts",
    "n_prompts": "number of prompts",
    "n_samples": "number of samples",
    "known": "known-image check",
    "gpus": "number of GPUs",
    "missing": "what is missing",
}
PERCENT = ("table2", "table3")  # tables that the paper prints in percent; table 1 is in fractions
_SETTING = ("group", "model", "params", "resolution", "steps", "guided")  # columns of a published table: no metrics


@dataclass(frozen=True)
class Row:
    """One number of a table with all that says what it is; text, so that a file is read back as it was written."""

    table: str
    block: str  # models | controls | published
    comparable: str  # rows with the same number may be compared; empty: with none but by eye
    media: str
    group: str  # of a published row: teacher | rcm | dmd2 | pretrained | distilled
    model: str
    params: str  # how the paper calls the model's size
    seed: str
    setting: str
    steps: str
    metric: str
    kind: str
    unit: str
    value: str
    low: str = ""
    high: str = ""
    n_prompts: str = ""
    n_samples: str = ""
    evaluator: str = ""
    version: str = ""
    models: str = ""  # detector, or models with the SHA-256 of their weights
    protocol: str = ""
    known: str = ""
    gpus: str = ""
    missing: str = ""
    prompts_file: str = ""
    prompts_sha256: str = ""
    bootstrap: str = ""
    device: str = ""
    versions: str = ""
    sigma_max: str = ""
    checkpoint_sha256: str = ""
    sampled: str = ""


def to_csv(rows: Iterable[Row]) -> str:
    """Rows as CSV with a heading."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def from_csv(text: str, path: str | Path = "the table") -> list[Row]:
    """The rows of a file that `to_csv` wrote; `path` is named if another version wrote it."""
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames != [f.name for f in fields(Row)]:
        raise UserError(f"{path} has the columns of another version; make the table again")
    return [Row(**line) for line in reader]


# --- What was measured ---------------------------------------------------------------------------------------------


def measured(table: str, scores: Sequence[Score], controls: Sequence[Score]) -> list[Row]:
    """Rows of every metric of every score; seeds of one method are followed by their mean.

    Raises `UserError` for a score of another version of the evaluator, for one that is there twice, and for diversity
    at another sigma_max than quality.
    """
    blocks = {"models": scores, "controls": controls}
    found = [
        (run, _facts(table, block, run, score), score)
        for block, own in blocks.items()
        for run, score in in_order(own)
        if _checked(score)
    ]
    found.sort(key=lambda item: (item[1].block == "controls", item[0].order, _key(item[1])))
    groups: dict[tuple[str, ...], list[tuple[Run, Row, Score]]] = defaultdict(list)
    for run, facts, score in found:
        groups[_key(facts)].append((run, facts, score))
    return [row for number, group in enumerate(groups.values(), 1) for row in _of_group(str(number), group)]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(getattr(row, column) for column in COMPARED)


def comparable(scores: Iterable[Score]) -> list[list[Score]]:
    """Scores in the order of tables, in groups within which they may be compared."""
    groups: dict[tuple[str, ...], list[Score]] = defaultdict(list)
    for run, score in in_order(scores):
        groups[_key(_facts("", "models", run, score))].append(score)
    return list(groups.values())


def file_of(score: Score) -> str:
    """What to call a score in an error."""
    return str(score.get("file") or f"{score['model']}-{score['steps']}.json")


def _checked(score: Score) -> bool:
    evaluator = score.get("evaluator", {})
    if evaluator.get("version") != VERSION:
        raise UserError(
            f"{file_of(score)} is by version {evaluator.get('version', 'unknown')} of the evaluator, and this is "
            f"version {VERSION}; their scores do not compare: evaluate again"
        )
    quality, diverse = (evaluator.get("sampling") or {}, (evaluator.get("diversity") or {}).get("sampling") or {})
    if quality and diverse and quality.get("sigma_max") != diverse.get("sigma_max"):
        raise UserError(
            f"{file_of(score)} has quality at sigma_max {quality.get('sigma_max')} and diversity at "
            f"{diverse.get('sigma_max')}; they are read together, so sample both suites at one"
        )
    return True


def _facts(table: str, block: str, run: Run, score: Score) -> Row:
    """A row with all that the numbers of one score have in common."""
    evaluator: Mapping[str, Any] = score.get("evaluator", {})
    sampling = evaluator.get("sampling") or {}
    missing = [str(what) for what in evaluator.get("missing") or []]
    known = evaluator.get("known")
    bootstrap = evaluator.get("bootstrap")
    seed = "" if sampling.get("seed") is None else f"seed {sampling['seed']}"
    return Row(
        table,
        block,
        *("", str(score["media"]), "", run.method, _text(evaluator.get("paper"))),
        seed="" if run.seed is None else str(run.seed),
        setting="",
        steps="" if block == "controls" else str(run.steps),
        metric="",
        kind="",
        unit="",
        value="",
        n_prompts=str(score["n_prompts"]),
        n_samples=str(score["n_samples"]),
        evaluator=str(evaluator.get("name", "ShapeEval")),
        version=_text(evaluator.get("version")),
        models=_models(evaluator),
        protocol=_text(evaluator.get("protocol")),
        known=f"{known['score']:.3g} of {known['facts']} facts" if known else "",
        gpus=_text(evaluator.get("gpus")),
        missing=f"{len(missing)} ({', '.join(missing[:3])}{', …' * (len(missing) > 3)})" if missing else "",
        prompts_file=_text(evaluator.get("prompts_file")),
        prompts_sha256=_text(evaluator.get("prompts_sha256")),
        bootstrap=f"{bootstrap['resamples']} resamples, seed {bootstrap['seed']}" if bootstrap else "",
        device=_text(evaluator.get("device")),
        versions=_listed(evaluator.get("versions")),
        sigma_max="" if sampling.get("sigma_max") is None else f"{sampling['sigma_max']:g}",
        checkpoint_sha256=_text(sampling.get("checkpoint_sha256")),
        sampled=", ".join(filter(None, (seed, _text(sampling.get("precision")), _text(sampling.get("device"))))),
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _listed(found: Mapping[str, object] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (found or {}).items() if value is not None)


def _models(evaluator: Mapping[str, Any]) -> str:
    """Detector and models with their hashes; `by` is the header of measurements."""
    parts = []
    for said in (evaluator.get("detector"), evaluator.get("models"), (evaluator.get("by") or {}).get("models")):
        text = _listed(said) if isinstance(said, Mapping) else _text(said)
        parts += [text] if text and text not in parts else []
    return ", ".join(parts)


def _of_group(number: str, group: Sequence[tuple[Run, Row, Score]]) -> list[Row]:
    """Rows of scores that are comparable."""
    teacher = next((score for run, _, score in group if run.method == "teacher"), None)
    rows: list[Row] = []
    seen: set[Run] = set()
    for run, facts, score in group:
        if run in seen:
            raise UserError(
                f"{file_of(score)} is a second score of {score['model']} at {score['steps']} steps; give one"
            )
        seen.add(run)
        facts = replace(facts, comparable=number)
        rows += _metrics(facts, run, [score], teacher)
        peers = [other for peer, _, other in group if (peer.method, peer.steps) == (run.method, run.steps)]
        if len(peers) > 1 and score is peers[-1]:
            common = replace(facts, seed="mean", checkpoint_sha256="")
            rows += _metrics(common, run, peers, teacher)
    return rows


def _metrics(facts: Row, run: Run, scores: Sequence[Score], teacher: Score | None) -> list[Row]:
    first = scores[0]
    rows = []
    for key, entry in first["metrics"].items():
        if len(scores) == 1:
            estimate = reported(first, key)
        else:
            values = [reported(score, key).value for score in scores]
            estimate = compare(lambda mean: mean, key, scores) or Estimate(sum(values) / len(values))
        rows.append(_by_others(_with(facts, key, str(entry.get("kind", "")), estimate), first, entry))
        if key == "shapeeval.overall" and facts.block == "models" and teacher is not None and run.method != "teacher":
            relative = compare(ratio, key, scores, [teacher])
            if relative is not None:
                rows.append(_with(facts, RELATIVE, "derived", relative))
    gaps = [score.get("evaluator", {}).get("native_minus_official") or {} for score in scores]
    for name in gaps[0]:
        gap = Estimate(sum(found.get(name, float("nan")) for found in gaps) / len(gaps))
        rows.append(_with(facts, f"{NATIVE_DIFFERENCE}.{name}", "derived", gap))
    return rows


def _with(facts: Row, metric: str, kind: str, estimate: Estimate) -> Row:
    digits = 9 if metric.startswith(f"{NATIVE_DIFFERENCE}.") else 6
    value, low, high = ("" if x != x else f"{x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return replace(facts, metric=metric, kind=kind, unit=_unit(metric), value=value, low=low, high=high)


def _unit(metric: str) -> str:
    return "dB" if metric == "fidelity.psnr" else "bits" if metric.endswith("_entropy") else ""


def _by_others(row: Row, score: Score, entry: Mapping[str, Any]) -> Row:
    """Native dimensions are by models of their own, and diversity is of samples of its own too."""
    family = row.metric.partition(".")[0]
    evaluator = score.get("evaluator", {})
    if family == "vbench_native" and evaluator.get("native"):
        by = evaluator["native"]
        return replace(row, models=_models(by), device=_text(by.get("device")), versions=_listed(by.get("versions")))
    said = evaluator.get("diversity")
    if family not in DIVERSITY or not said:
        return row
    return replace(
        row,
        models=_models(said),
        n_prompts=_text(len(said.get("satisfying", ())) or entry.get("n_prompts")),
        n_samples=_text(said.get("samples")),
        prompts_sha256=_text(said.get("prompts_sha256")),
        prompts_file="",
    )


def throughput(table: str, found: Sequence[Score], rows: Sequence[Row]) -> list[Row]:
    """Rows of frames per second with decoding, batch 1, for models that have a score among `rows`."""
    scored = {(row.model, row.seed, row.steps) for row in rows if row.block == "models"}
    made = []
    for run, score in in_order(found):
        seed = "" if run.seed is None else str(run.seed)
        if (run.method, seed, str(run.steps)) not in scored:
            raise UserError(f"{file_of(score)} is the speed of a model at a number of steps that has no score here")
        if score["batch"] != 1:
            raise UserError(f"{file_of(score)} was timed with batch {score['batch']}; tables state that of batch 1")
        made.append(
            Row(
                *(table, "models", "", str(score["media"]), "", run.method, "", seed, "", str(run.steps)),
                *(SPEED, "timed", "frames/s", f"{float(score['fps']):.6g}"),
                n_samples=_text(score.get("samples")),
                device=str(score["device"]),
                versions=_listed(score.get("versions")),
                sampled=_text(score.get("precision")),
            )
        )
    return made


# --- What the paper prints -----------------------------------------------------------------------------------------


def published(table: str, path: Path) -> list[Row]:
    """Rows of a published table: digits as printed."""
    try:
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except OSError as error:
        raise UserError(f"the published table {path} cannot be read: {error.strerror}") from error
    rows = []
    for line in lines:
        missing = [column for column in ("group", "model", "params", "steps", "guided") if column not in line]
        if missing:
            raise UserError(f"the published table {path} lacks the column {missing[0]!r}")
        model = line["model"]
        known = {"teacher": f"{model} (teacher)", "dmd2": f"{model} + DMD2", "rcm": f"{model} + rCM"}
        name = known.get(line["group"], model)
        setting = ", ".join(filter(None, (line["params"], line.get("resolution", "").replace("x", "×"))))
        steps = line["steps"] + ("×2" if line["guided"] == "1" else "")
        for metric, value in line.items():
            if metric not in _SETTING:
                unit = "frames/s" if metric == "fps" else "%" if table in PERCENT else ""
                about = (table, "published", "", "", line["group"], name, line["params"], "", setting, steps)
                rows.append(Row(*about, metric, "published", unit, value))
    return rows


# --- Rows as lines ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """What one printed line is about."""

    block: str
    model: str
    seed: str
    setting: str
    steps: str

    @property
    def name(self) -> str:
        """The model as tables print it."""
        return Run(self.model, None, 0).label


Lines = Mapping[Line, Mapping[str, Row]]


def lines_of(rows: Iterable[Row]) -> dict[Line, dict[str, Row]]:
    """Rows by what they are about, then by metric."""
    found: dict[Line, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(Line(row.block, row.model, row.seed, row.setting, row.steps), {})[row.metric] = row
    return found


def keys_in(own: Lines) -> list[str]:
    """Metrics in the order of first appearance."""
    return list(dict.fromkeys(metric for found in own.values() for metric in found))
