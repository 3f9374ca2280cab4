"""Scores of one model from its samples: ShapeEval, ShapeBench, fidelity and diversity, with intervals over prompts.

Keys are FAMILY.MEASURE. `shapeeval.*` asks whether a sample shows its caption: an image by GenEval's decision; a clip
if more than half of its frames pass that decision and it moves as the caption says. `shapeeval_frames.*` of clips
leaves the motion out. `shapebench`, `fidelity`, `diversity`, `prior` and `pixels` are explained in their modules.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcm.artefact import UserError
from rcm.data.prompts import TASKS, Metadata, to_jsonl
from rcm.evaluation import diversity, shapebench, shapes
from rcm.evaluation.bootstrap import interval
from rcm.evaluation.geneval import THRESHOLD, judge
from rcm.evaluation.samples import (
    Expected,
    PromptSamples,
    check_prompt,
    list_samples,
    missing,
    read_frames,
    read_sampling,
)
from rcm.evaluation.shapebench import Clip

VERSION = "1"  # of the evaluator as a whole: scores of different versions do not compare
KINDS = {"shapeeval": "substituted_model", "shapeeval_frames": "substituted_model"}
OVERALL = ("shapeeval", "shapeeval_frames", "geneval")  # families with an overall score, the mean of the tasks' means
FAMILIES = (*OVERALL, "shapebench", "fidelity", "diversity", "prior", "pixels")
_PACKAGES = ("numpy", "opencv-python-headless")  # on which the numbers depend


@dataclass(frozen=True)
class Evaluation:
    """`scores` as the score JSON wants them, and `results`, one object a sample of the report suite."""

    scores: dict[str, Any]
    results: list[dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """Whether a sample shows its caption, with and without the motion of clips."""

    correct: bool
    frames_correct: bool
    reason: str


def verdict(clip: Clip, metadata: Metadata, media: str) -> Verdict:
    """Judge one sample; the reason is that of the first frame that fails."""
    judged = [judge(metadata, found, shapes.color_of) for found in clip.detections]
    good = sum(ok for ok, _ in judged)
    still_right = 2 * good > len(judged)
    reasons = [] if still_right else [next(reason for ok, reason in judged if not ok)]
    if media == "images":
        return Verdict(still_right, still_right, "\n".join(reasons))
    if not still_right:
        reasons = [f"{len(judged) - good} of {len(judged)} frames fail: {reasons[0]}"]
    moves = shapebench.motion(clip, metadata)
    if not moves:
        reasons.append(f"expected motion {metadata.get('motion', 'none')}")
    return Verdict(still_right and moves, still_right, "\n".join(reasons))


def evaluate(
    samples: Sequence[str | Path],
    diversity_samples: Sequence[str | Path] = (),
    *,
    media: str,
    model: str,
    steps: int,
    expected: Expected | None = None,
    allow_missing: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score a model.

    Args:
        samples: folders with the parts of the report suite, in GenEval's layout.
        diversity_samples: folders with the parts of the diversity suite, if it was sampled.
        media: images | clips.
        model, steps: who made the samples; only passed on.
        expected: the suite's prompts and numbers of samples; without, all prompts must have the same number.
        allow_missing: score what there is and name the rest; otherwise missing samples are a UserError.
        resamples, seed: of the bootstrap over prompts.
    """
    found = list_samples(samples)
    for item in found:
        _check_caption(item, expected)
    lacking = missing(expected, [item.name(path) for item in found for path in item.paths], allow_missing)
    sampling = read_sampling(samples)
    results: list[dict[str, Any]] = []
    rows = {item.index: _of_prompt(item, media, _frames(sampling), results) for item in found}
    prompts = {item.index: item.metadata for item in found} if expected is None else dict(enumerate(expected.prompts))
    tags = [metadata["tag"] for metadata in prompts.values()]
    per_prompt: dict[str, list[Any]] = {"tag": tags, **by_prompt(rows, prompts)}
    for family in OVERALL:
        if f"{family}.overall" in per_prompt:
            per_prompt |= of_tasks(family, per_prompt[f"{family}.overall"], tags)
    evaluator: dict[str, Any] = {
        "name": "ShapeEval",
        "version": VERSION,
        "detector": f"{shapes.ShapeDetector.__name__} {shapes.SLOPE} {shapes.OFFSET}",
        "device": "CPU",
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "known": None,
        "prompts_sha256": sha256_of(prompts.values()),
        "prompts_file": None,
        "sampling": sampling,
        "missing": lacking,
        "paper": None,
    }
    if diversity_samples:
        others = list_samples(diversity_samples)
        for item in others:
            _check_caption(item)
        gone = missing(None, [item.name(path) for item in others for path in item.paths], allow_missing)
        evaluator["missing"] += [f"diversity/{name}" for name in gone]
        sampling = read_sampling(diversity_samples)
        diverse = [_diversity(item, media, _frames(sampling), seed) for item in others]
        values = {item.index: found for item, (found, _) in zip(others, diverse, strict=True)}
        per_prompt |= by_prompt(values, range(max(values) + 1))
        evaluator["diversity"] = {
            "prompts_sha256": sha256_of(item.metadata for item in others),
            "sampling": sampling,
            "samples": sum(len(item.paths) for item in others),
            "satisfying": [count for _, count in diverse],
            "minimum": diversity.MINIMUM,
        }
    kinds = {key: _kind(key) for key in sorted(per_prompt.keys() - {"tag"}, key=_order(per_prompt))}
    about = {"model": model, "steps": steps, "media": media, "n_prompts": len(rows), "n_samples": len(results)}
    return Evaluation(scored(about, per_prompt, kinds, evaluator, resamples=resamples, seed=seed), results)


def scored(
    about: Mapping[str, Any],
    per_prompt: Mapping[str, Sequence[Any]],
    kinds: Mapping[str, str],
    evaluator: Mapping[str, Any],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The score JSON: what it is `about`, a metric for each column of `kinds`, the evaluator and all columns."""
    options = {"resamples": resamples, "seed": seed}
    tags = per_prompt["tag"]
    return {
        **about,
        "metrics": {key: metric(key, per_prompt[key], tags, kind, **options) for key, kind in kinds.items()},
        "evaluator": {**evaluator, "bootstrap": options},
        "per_prompt": per_prompt,
    }


def _order(keys: Iterable[str]) -> Callable[[str], tuple[int, int]]:
    """Sort key: families in the order of `FAMILIES`, their measures as they come."""
    place = {key: i for i, key in enumerate(keys)}
    return lambda key: (FAMILIES.index(key.partition(".")[0]), place[key])


def sha256_of(prompts: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of the file of these prompts."""
    return hashlib.sha256(to_jsonl(prompts).encode()).hexdigest()


def _check_caption(item: PromptSamples, expected: Expected | None = None) -> None:
    """Raise UserError unless a prompt can be judged, and is the one that the suite has."""
    where = item.paths[0].parents[1] / "metadata.jsonl"
    if "tag" not in item.metadata:
        raise UserError(
            f"{where} has a prompt but no tag, so nothing says what it asks for; expected GenEval's metadata"
        )
    if expected is not None:
        check_prompt(expected, item.index, item.metadata, where)


def by_prompt(rows: Mapping[int, Mapping[str, float | None]], prompts: Iterable[int]) -> dict[str, list[float | None]]:
    """Columns of the rows, for all the prompts: None where a prompt has no row."""
    nothing: dict[str, float | None] = dict.fromkeys(next(iter(rows.values())))
    return _columns([rows.get(index, nothing) for index in prompts])


def of_tasks(family: str, overall: Sequence[float | None], tags: Sequence[str]) -> dict[str, list[float | None]]:
    """The columns FAMILY.TASK: what the column FAMILY.overall holds of the task's prompts."""
    return {
        f"{family}.{task}": [x if tag == task else None for x, tag in zip(overall, tags, strict=True)]
        for task in TASKS
        if task in tags
    }


def _columns(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _frames(sampling: Mapping[str, Any] | None) -> int | None:
    """How many frames each sample has, if it is said how they were made."""
    return None if sampling is None else sampling.get("frames")


def _open(path: Path, media: str, number: int | None) -> Clip:
    frames = read_frames(path, number)
    if (len(frames) == 1) != (media == "images"):
        raise UserError(
            f"{path} has {len(frames)} frame{'s' * (len(frames) > 1)}, which does not fit the medium {media}"
        )
    return Clip(frames)


def _of_prompt(
    item: PromptSamples, media: str, frames: int | None, results: list[dict[str, Any]]
) -> dict[str, float | None]:
    """Means over the samples of one prompt; appends a result for each sample."""
    measured: list[dict[str, float | None]] = []
    for path in item.paths:
        clip = _open(path, media, frames)
        judged = verdict(clip, item.metadata, media)
        results.append(_result(item, path, clip, judged, media))
        values: dict[str, float | None] = {"shapeeval.overall": float(judged.correct)}
        if media == "clips":
            values["shapeeval_frames.overall"] = float(judged.frames_correct)
            values |= {f"shapebench.{key}": value for key, value in shapebench.measure(clip, item.metadata).items()}
        values["fidelity.psnr"] = _mean(found.psnr for found in clip.fidelities)
        values["fidelity.sharpness"] = _mean(found.sharpness for found in clip.fidelities)
        measured.append(values)
    return {key: _mean(values) for key, values in _columns(measured).items()}


def _result(item: PromptSamples, path: Path, clip: Clip, judged: Verdict, media: str) -> dict[str, Any]:
    """A line of GenEval's results.jsonl; `details` are the boxes of the middle frame."""
    details: dict[str, list[list[float]]] = {}
    for found in clip.detections[len(clip.detections) // 2]:
        if found.score > THRESHOLD:
            details.setdefault(found.cls, []).append([*found.box, round(found.score, 4)])
    line = {
        "filename": item.name(path),
        "tag": item.metadata["tag"],
        "prompt": item.metadata["prompt"],
        "correct": judged.correct,
        "reason": judged.reason,
        "metadata": json.dumps(item.metadata),
        "details": json.dumps(details),
    }
    return line if media == "images" else {**line, "frames_correct": judged.frames_correct}


def _diversity(item: PromptSamples, media: str, frames: int | None, seed: int) -> tuple[dict[str, float | None], int]:
    """Diversity of one prompt and the number of satisfying samples behind it."""
    clips = [_open(path, media, frames) for path in item.paths]
    good = [clip for clip in clips if verdict(clip, item.metadata, media).correct]
    return diversity.of_prompt(good, item.metadata, seed), len(good)


def _kind(key: str) -> str:
    family, _, name = key.partition(".")
    return shapebench.KINDS[name] if family == "shapebench" else KINDS.get(family, "analogue")


def metric(key: str, values: Sequence[float | None], tags: Sequence[str], kind: str, **options: Any) -> dict[str, Any]:
    """An entry of a score JSON's metrics, by the bootstrap over prompts with `options`."""
    found = interval(values, strata_of(key, tags), **options)
    numbers: dict[str, float | None] = {"value": None, "low": None, "high": None, "n_prompts": 0}
    if found is not None:
        numbers = {"value": found.value, "low": found.low, "high": found.high, "n_prompts": found.count}
    return {**numbers, "kind": kind}


def strata_of(key: str, tags: Sequence[str]) -> Sequence[str] | None:
    """The strata of a metric's prompts: the tasks for an overall score, which is the mean of their means."""
    family, _, name = key.partition(".")
    return tags if name == "overall" and family in OVERALL else None


def check_controls(
    oracle: Mapping[str, Any],
    shuffled: Mapping[str, Any],
    *,
    oracle_at_least: float = 0.95,
    floor_at_most: float = 0.10,
) -> None:
    """Raise UserError unless ground truth scores high and renders of other prompts low: else scores mean nothing."""
    high, low = (control["metrics"]["shapeeval.overall"]["value"] for control in (oracle, shuffled))
    fails = f"the evaluator fails on {oracle['media']}, so no table is made"
    if high < oracle_at_least:
        raise UserError(f"{fails}: ground truth has shapeeval.overall {high:.3f}, expected at least {oracle_at_least}")
    if low > floor_at_most:
        raise UserError(f"{fails}: renders of other prompts have {low:.3f}, expected at most {floor_at_most}")


def results_jsonl(results: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(f"{json.dumps(result)}\n" for result in results)
