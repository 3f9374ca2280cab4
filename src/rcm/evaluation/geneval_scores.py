"""GenEval's scores, from stored detections or from the official evaluator's own results, with intervals over prompts.

Keys: `geneval.overall` and `geneval.TASK`; `geneval.images`, the share of correct images, and `geneval.prompts`, the
share of prompts with a correct image. A prompt's value is the mean over its samples, so where none is missing these are
the numbers that the original prints.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcm.artefact import UserError
from rcm.data.prompts import TASKS, Metadata, parse_prompts
from rcm.evaluation.geneval import Detection, judge, kept
from rcm.evaluation.measured import Measured, read_lines
from rcm.evaluation.samples import Expected, check_prompt, missing, numbers_of
from rcm.evaluation.scores import VERSION, Evaluation, by_prompt, of_tasks, scored, sha256_of

OFFICIAL = "GenEval (mmdet)"
FORMAT = "1"  # of the first line that workflow/scripts/geneval_official.py puts before the results
FILES = {"5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13": "GenEval's 553"}  # prompt files by SHA-256
_COLUMNS = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")  # of the original's results.jsonl
_FILE = re.compile(r"(?:.*[/\\])?(\d{1,9})[/\\]samples[/\\](\d{1,9}\.png)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class _Seen(Detection):
    """A stored detection; the colour is None where it was not looked at."""

    color: str | None = None


@dataclass(frozen=True)
class _Judged:
    """An image and whether it shows its prompt; `result` is its line of results.jsonl."""

    prompt: int
    metadata: Metadata
    correct: bool
    result: dict[str, Any]


def from_measured(
    measured: Measured,
    *,
    model: str,
    steps: int,
    expected: Expected | None = None,
    allow_missing: bool = False,
    diversity: Measured | None = None,
    prompts_file: str | None = None,
    paper: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Judge stored detections and score a model.

    Args:
        measured: what a detector saw: rows {"prompt", "filename", "metadata", "detections": [[class, x0, y0, x1, y1,
            score, colour or None], ...]}.
        expected: the suite's prompts and numbers of samples; without, all prompts must have the same number.
        allow_missing: score what there is and name the rest; otherwise missing samples are a UserError.
        diversity: measurements of the diversity suite, whose columns are added.
        prompts_file, paper: names of the prompt file and of the model in the paper's table; only passed on.
        model, steps: who made the samples; only passed on.
        resamples, seed: of the bootstrap over prompts.
    """
    judged = _judged(measured.rows)
    evaluator = {**measured.evaluator, "prompts_file": prompts_file, "paper": paper}
    return _evaluation(
        judged,
        evaluator,
        "substituted_model",
        model=model,
        steps=steps,
        expected=expected,
        allow_missing=allow_missing,
        diversity=diversity,
        resamples=resamples,
        seed=seed,
    )


def from_results(
    path: str | Path,
    *,
    model: str,
    steps: int,
    expected: Expected | None = None,
    allow_missing: bool = False,
    diversity: Measured | None = None,
    sampling: Mapping[str, Any] | None = None,
    prompts_file: str | None = None,
    paper: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score a model by the results.jsonl of the official evaluator; its verdicts are taken as they are.

    A first line {"official": "geneval-mmdet", "version", "models"?, "device"?, "versions"?, "known"?} says how they
    were reached; the original writes none. `sampling` says how the samples were made; the other arguments are those
    of `from_measured`.

    Raises UserError that names file and line: a key is missing or wrong, a task unknown, an image there twice, or
    prompts of one number differ.
    """
    path = Path(path)
    about, judged = _read_results(path)
    evaluator = {
        "name": OFFICIAL,
        "models": about.get("models"),
        "device": about.get("device"),
        "versions": about.get("versions"),
        "known": about.get("known"),
        "sampling": sampling,
        "prompts_file": prompts_file,
        "paper": paper,
    }
    return _evaluation(
        judged,
        evaluator,
        "official",
        model=model,
        steps=steps,
        expected=expected,
        allow_missing=allow_missing,
        diversity=diversity,
        resamples=resamples,
        seed=seed,
    )


# --- Images --------------------------------------------------------------------------------------------------------


def _judged(rows: Iterable[Mapping[str, Any]]) -> list[_Judged]:
    """Judge measured images."""
    captions: dict[int, Metadata] = {}
    found = []
    for row in rows:
        where = row["filename"]
        metadata = captions.setdefault(row["prompt"], row["metadata"])
        if metadata is row["metadata"]:
            parse_prompts(json.dumps(metadata), f"metadata of {where}")
        if metadata != row["metadata"]:
            raise UserError(f"{where} was measured with other metadata than its prompt's first sample; measure again")
        seen = _seen(row)

        def color_of(detection: _Seen, where: str = where) -> str:
            if detection.color is None:
                raise UserError(f"no colour was measured of a {detection.cls} in {where}; measure it again")
            return detection.color

        correct, why = judge(metadata, seen, color_of)
        details = {
            name: [[*one.box, one.score] for one in group] for name, group in kept(metadata, seen).items() if group
        }
        values = (where, metadata["tag"], metadata["prompt"], correct, why, json.dumps(metadata), json.dumps(details))
        found.append(_Judged(row["prompt"], metadata, correct, dict(zip(_COLUMNS, values, strict=True))))
    return found


def _seen(row: Mapping[str, Any]) -> list[_Seen]:
    return [_Seen(cls, (x0, y0, x1, y1), score, color=color) for cls, x0, y0, x1, y1, score, color in row["detections"]]


def _read_results(path: Path) -> tuple[dict[str, Any], list[_Judged]]:
    """What the results.jsonl of the official evaluator says of itself, and its images."""
    lines = list(enumerate(read_lines(path), start=1))
    about: dict[str, Any] = {}
    if lines and "official" in lines[0][1]:
        about = lines.pop(0)[1]
        if (about["official"], about.get("version")) != ("geneval-mmdet", FORMAT):
            raise UserError(
                f"{path} holds results of {about['official']!r}, version {about.get('version')!r}; expected those of "
                f"'geneval-mmdet', version {FORMAT!r}: run GenEval's evaluator again"
            )
    if not lines:
        raise UserError(f"{path} holds no results of GenEval's evaluator; run it again")
    seen: dict[tuple[int, int], int] = {}
    captions: dict[int, str] = {}
    judged = []
    for number, line in lines:
        where = f"{path}, line {number}"
        prompt, result, metadata = _result(line, where)
        sample = numbers_of(result["filename"])
        if sample in seen:
            raise UserError(
                f"{where}: {result['filename']} stands in line {seen[sample]} already; the results are of several runs"
            )
        seen[sample] = number
        if captions.setdefault(prompt, result["metadata"]) != result["metadata"]:
            raise UserError(f"{where}: prompt {prompt} has other metadata than in the lines before")
        judged.append(_Judged(prompt, metadata, result["correct"], result))
    return about, judged


def _result(line: Mapping[str, Any], where: str) -> tuple[int, dict[str, Any], Metadata]:
    """The number of the prompt, a line of results with the sample's own name, and the prompt's metadata."""
    lacking = [key for key in _COLUMNS if key not in line]
    if lacking:
        raise UserError(f"{where} lacks {', '.join(lacking)}: it is not by GenEval's evaluator, or by another version")
    if not isinstance(line["correct"], bool):
        raise UserError(f"{where}: key 'correct' must be true or false; got {line['correct']!r}")
    if line["tag"] not in TASKS:
        raise UserError(f"{where}: key 'tag' must be one of {', '.join(TASKS)}; got {line['tag']!r}")
    match = _FILE.fullmatch(line["filename"]) if isinstance(line["filename"], str) else None
    if match is None:
        raise UserError(f"{where}: key 'filename' must end as in 00012/samples/0003.png; got {line['filename']!r}")
    if not isinstance(line["metadata"], str):
        raise UserError(f"{where}: key 'metadata' must be a text that holds JSON, as GenEval's evaluator writes it")
    (metadata,) = parse_prompts(line["metadata"].replace("\n", " "), f"{where}, metadata")
    if (metadata["tag"], metadata["prompt"]) != (line["tag"], line["prompt"]):
        raise UserError(f"{where}: tag or prompt differs from the metadata in the same line; the file is damaged")
    name = f"{int(match[1]):05d}/samples/{match[2]}"
    return int(match[1]), {key: line[key] for key in _COLUMNS} | {"filename": name}, metadata


# --- Scores --------------------------------------------------------------------------------------------------------


def _evaluation(
    judged: Sequence[_Judged],
    by: Mapping[str, Any],
    kind: str,
    *,
    model: str,
    steps: int,
    expected: Expected | None,
    allow_missing: bool,
    diversity: Measured | None,
    resamples: int,
    seed: int,
) -> Evaluation:
    judged = sorted(judged, key=lambda image: (image.prompt, image.result["filename"]))
    if not judged:
        raise UserError("there are no samples to score")
    if expected is not None:
        for image in judged:
            check_prompt(expected, image.prompt, image.metadata, image.result["filename"])
    lacking = missing(expected, [image.result["filename"] for image in judged], allow_missing)
    found = {image.prompt: image.metadata for image in judged}
    prompts = found if expected is None else dict(enumerate(expected.prompts))
    tags = [metadata["tag"] for metadata in prompts.values()]
    columns = by_prompt(_rows(judged), prompts)
    whole = columns["geneval.overall"]
    columns = {"geneval.overall": whole, **of_tasks("geneval", whole, tags), **columns}
    kinds = dict.fromkeys(columns, kind)
    sha256 = sha256_of(prompts.values())
    evaluator: dict[str, Any] = {
        **by,
        "version": VERSION,
        "prompts_sha256": sha256,
        "prompts_file": FILES.get(sha256, by["prompts_file"]),
        "missing": lacking,
    }
    if diversity is not None:
        from rcm.evaluation import features

        beside = features.columns(diversity, allow_missing)
        columns |= beside
        kinds |= dict.fromkeys(beside, "same_formula")
        evaluator["missing"] += features.lacking(diversity)
        evaluator["diversity"] = features.block(diversity)
    about = {"model": model, "steps": steps, "media": "images", "n_prompts": len(found), "n_samples": len(judged)}
    scores = scored(about, {"tag": tags, **columns}, kinds, evaluator, resamples=resamples, seed=seed)
    return Evaluation(scores, [image.result for image in judged])


def _rows(judged: Sequence[_Judged]) -> dict[int, dict[str, float | None]]:
    """Values by prompt.

    As the original counts prompts, those with the same metadata are one: the first of them has its value.
    """
    right: Counter[int] = Counter()
    number: Counter[int] = Counter()
    first: dict[str, int] = {}
    for image in judged:
        right[image.prompt] += image.correct
        number[image.prompt] += 1
        first.setdefault(image.result["metadata"], image.prompt)
    any_right: Counter[int] = Counter()
    for image in judged:
        any_right[first[image.result["metadata"]]] |= image.correct
    return {
        prompt: {
            "geneval.overall": right[prompt] / count,
            "geneval.images": right[prompt] / count,
            "geneval.prompts": float(any_right[prompt]) if prompt in first.values() else None,
        }
        for prompt, count in number.items()
    }
