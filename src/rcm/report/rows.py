"""Tidy rows of tables: one number a row, with all that says what it may be compared with.

Scores that may be compared (`rcm.report.facts`) carry the same number in the column `comparable`, stand in one panel,
and are averaged over training seeds. Numbers of the paper carry none.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rcm.artefact import UserError
from rcm.evaluation.scores import VERSION
from rcm.report.compared import pooled
from rcm.report.facts import comparable, differences, evaluator, facts, listed, models, text
from rcm.report.scores import CONTROLS, Estimate, Run, Score, compare, in_order, joined, ratio
from rcm.report.stored import printed

RELATIVE = "shapeeval.relative_to_teacher"
NATIVE_DIFFERENCE = "vbench_native_minus_official"  # family of what the native dimensions add to the official ones
SPEED = "throughput.fps"
OWN_SAMPLES = ("diversity", "pixels")  # families measured on samples of a suite of their own
PERCENT = ("table2", "table3")  # tables that the paper prints in percent; table 1 is in fractions
PRINTED = {"table1": ("overall",), "table2": ("total",), "table3": ("t2v", "i2v")}  # by which the paper's are known
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
    differs: str = ""  # in what its group differs from group 1
    evaluator: str = ""
    version: str = ""
    models: str = ""  # detector, or models with the SHA-256 of their weights
    protocol: str = ""
    known: str = ""
    gpus: str = ""
    missing: str = ""
    prompts_file: str = ""
    prompts_file_sha256: str = ""
    prompts_sha256: str = ""
    bootstrap: str = ""
    device: str = ""
    versions: str = ""
    size: str = ""  # width × height × frames
    sampler: str = ""
    times: str = ""  # trig times of a student's steps
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


def from_csv(table: str, path: str | Path = "the table") -> list[Row]:
    """The rows of a file that `to_csv` wrote; `path` is named if another version wrote it."""
    reader = csv.DictReader(io.StringIO(table))
    if reader.fieldnames != [f.name for f in fields(Row)]:
        raise UserError(f"{path} has the columns of another version; make the table again")
    lines = list(reader)
    if strange := [number for number, line in enumerate(lines, 2) if None in line or None in line.values()]:
        raise UserError(f"line {strange[0]} of {path} has too few or too many columns; make the table again")
    return [Row(**line) for line in lines]


# --- What was measured ---------------------------------------------------------------------------------------------


def measured(table: str, scores: Sequence[Score], controls: Sequence[Score]) -> list[Row]:
    """Rows of every metric of every score; seeds of one method are followed by their mean.

    Raises `UserError` for a score of another version of the evaluator, for one that is there twice, and for diversity
    at another sigma_max than quality.
    """
    own = [score for score in (*scores, *controls) if _checked(score)]
    groups = comparable(own)
    rows = []
    for number, group in enumerate(groups, 1):
        differs = joined(differences([groups[0], group]))
        found = [(run, _facts(table, str(number), differs, run, score), score) for run, score in in_order(group)]
        rows += _of_group(found)
    return rows


def file_of(score: Score) -> str:
    """What to call a score in an error."""
    return str(score.get("file") or f"{score['model']}-{score['steps']}.json")


def _checked(score: Score) -> bool:
    said = evaluator(score)
    if said.get("version") != VERSION:
        raise UserError(
            f"{file_of(score)} is by version {said.get('version', 'unknown')} of the evaluator, and this is "
            f"version {VERSION}; their scores do not compare: evaluate again"
        )
    quality, diverse = (said.get("sampling") or {}, (said.get("diversity") or {}).get("sampling") or {})
    if quality and diverse and quality.get("sigma_max") != diverse.get("sigma_max"):
        raise UserError(
            f"{file_of(score)} has quality at sigma_max {quality.get('sigma_max')} and diversity at "
            f"{diverse.get('sigma_max')}; they are read together, so sample both suites at one"
        )
    return True


def _facts(table: str, number: str, differs: str, run: Run, score: Score) -> Row:
    """A row with all that the numbers of one score have in common."""
    block, steps = ("controls", "") if run.method in CONTROLS else ("models", str(run.steps))
    params, seed = text(evaluator(score).get("paper")), "" if run.seed is None else str(run.seed)
    about = (table, block, number, str(score["media"]), "", run.method, params, seed, "", steps)
    return Row(*about, metric="", kind="", unit="", value="", differs=differs, **facts(score))


def _of_group(group: Sequence[tuple[Run, Row, Score]]) -> list[Row]:
    """Rows of scores that are comparable."""
    teacher = next((score for run, _, score in group if run.method == "teacher"), None)
    rows: list[Row] = []
    seen: set[Run] = set()
    for run, common, score in group:
        if run in seen:
            raise UserError(
                f"{file_of(score)} is a second score of {score['model']} at {score['steps']} steps; give one"
            )
        seen.add(run)
        rows += _metrics(common, run, [score], teacher)
        peers = [other for peer, _, other in group if (peer.method, peer.steps) == (run.method, run.steps)]
        if len(peers) > 1 and score is peers[-1]:
            mean = replace(common, seed="mean", checkpoint_sha256="")
            rows += _metrics(mean, run, peers, teacher)
    return rows


def _metrics(common: Row, run: Run, scores: Sequence[Score], teacher: Score | None) -> list[Row]:
    first = scores[0]
    rows = []
    for key, entry in first["metrics"].items():
        estimate = pooled(key, scores) or Estimate(float("nan"))
        rows.append(_by_others(_with(common, key, str(entry.get("kind", "")), estimate), first, entry))
        if key == "shapeeval.overall" and common.block == "models" and teacher is not None and run.method != "teacher":
            relative = compare(ratio, key, scores, [teacher])
            if relative is not None:
                rows.append(_with(common, RELATIVE, "derived", relative))
    gaps = [evaluator(score).get("native_minus_official") or {} for score in scores]
    for name in gaps[0]:
        gap = Estimate(sum(found.get(name, float("nan")) for found in gaps) / len(gaps))
        rows.append(_with(common, f"{NATIVE_DIFFERENCE}.{name}", "derived", gap))
    return rows


def _with(common: Row, metric: str, kind: str, estimate: Estimate) -> Row:
    digits = 9 if metric.startswith(f"{NATIVE_DIFFERENCE}.") else 6
    value, low, high = ("" if x != x else f"{x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return replace(common, metric=metric, kind=kind, unit=_unit(metric), value=value, low=low, high=high)


def _unit(metric: str) -> str:
    return "dB" if metric == "fidelity.psnr" else "bits" if metric.endswith("_entropy") else ""


def _by_others(row: Row, score: Score, entry: Mapping[str, Any]) -> Row:
    """Native dimensions are by models of their own, and diversity is of samples of its own too."""
    family = row.metric.partition(".")[0]
    by, said = (evaluator(score).get(key) for key in ("native", "diversity"))
    if family == "vbench_native" and by:
        return replace(row, models=models(by), device=text(by.get("device")), versions=listed(by.get("versions")))
    if family not in OWN_SAMPLES or not said:
        return row
    return replace(
        row,
        models=models(said),
        n_prompts=text(len(said.get("satisfying", ())) or entry.get("n_prompts")),
        n_samples=text(said.get("samples")),
        prompts_sha256=text(said.get("prompts_sha256")),
        prompts_file="",
        prompts_file_sha256="",
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
                n_samples=text(score.get("samples")),
                device=str(score["device"]),
                versions=listed(score.get("versions")),
                sampled=text(score.get("precision")),
            )
        )
    return made


# --- What the paper prints -----------------------------------------------------------------------------------------


def published(table: str, path: Path) -> list[Row]:
    """Rows of a published table: digits as printed."""
    if table not in PRINTED:
        raise UserError(f"the paper has no {table}: leave --published out")
    rows = []
    for line in printed(path, "group", "model", "params", "steps", "guided", *PRINTED[table]):
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
