"""What a score says of how it came about, as text, and by that which scores may be compared.

Scores are comparable if all of `COMPARED` is the same and all of `JOINING` is not different. Tables, figures, findings
and the page take it from here.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rcm.report.scores import CONTROLS, Score, headline, in_order, lacking

COMPARED = {  # what must agree, and what to call it
    "media": "medium",
    "evaluator": "evaluator",
    "version": "version of the evaluator",
    "package": "version of the evaluator's package",
    "models": "models",
    "protocol": "protocol",
    "prompts_sha256": "prompts",
    "n_prompts": "number of prompts",
    "n_samples": "number of samples",
    "size": "size",
    "checked": "known-image check",
    "gpus": "number of GPUs",
    "missing": "what is missing",
}
JOINING = {  # the same, but a score without it goes with all others: the teacher has no σ_max of students
    "starts": "σ_max",
    "diversity": "samples or models of diversity",
    "native": "models of native dimensions",
}
PACKAGES = ("vbench", "vbench_commit", "mmdet", "transformers", "rapidocr")  # what judges, beside the models
_NAMED = 3  # missing samples that a text names


def facts(score: Score) -> dict[str, str]:
    """What rows of tables tell of a score's evaluation and sampling."""
    said = evaluator(score)
    sampling, known, bootstrap = (said.get(key) or {} for key in ("sampling", "known", "bootstrap"))
    section = sampling.get("sampler") or {}
    sampled = (_valued("seed", sampling), text(sampling.get("precision")), text(sampling.get("device")))
    return {
        "n_prompts": text(score.get("n_prompts")),
        "n_samples": text(score.get("n_samples")),
        "evaluator": name(score),
        "version": text(said.get("version")),
        "models": models(said),
        "protocol": text(said.get("protocol")),
        "known": _known(known) if known else "",
        "gpus": text(said.get("gpus")),
        "missing": "; ".join(filter(None, (_dimensions(score), _samples(lacking(score)[1])))),
        "prompts_file": text(said.get("prompts_file")),
        "prompts_file_sha256": text(said.get("prompts_file_sha256")),
        "prompts_sha256": text(said.get("prompts_sha256")),
        "bootstrap": f"{bootstrap['resamples']} resamples, seed {bootstrap['seed']}" if bootstrap else "",
        "device": text(said.get("device")),
        "versions": listed(said.get("versions")),
        "size": size(sampling),
        "sampler": sampler(section),
        "times": " ".join(f"{time:.4g}" for time in sampling.get("times") or ()),
        "sigma_max": "" if sampling.get("sigma_max") is None else f"{sampling['sigma_max']:g}",
        "checkpoint_sha256": text(sampling.get("checkpoint_sha256")),
        "sampled": ", ".join(filter(None, sampled)),
    }


def evaluator(score: Score) -> Mapping[str, Any]:
    """The block of a score that says how it was evaluated."""
    found: Mapping[str, Any] = score.get("evaluator") or {}
    return found


def name(score: Score) -> str:
    """The evaluator's name; scores of the tiny world need not say it."""
    found = evaluator(score).get("name") or ("ShapeEval" if headline(score) == "shapeeval.overall" else "unknown")
    return str(found)


def sigma_max(score: Score) -> float | None:
    """Where the sampling of a student began, if its score says so; that of the teacher is its sampler's affair."""
    if score["model"] == "teacher" or score["model"] in CONTROLS:
        return None
    start = (evaluator(score).get("sampling") or {}).get("sigma_max")
    return None if start is None else float(start)


def text(value: object) -> str:
    """A fact as it is printed: nothing for None."""
    return "" if value is None else str(value)


def listed(found: Mapping[str, object] | None) -> str:
    """ "torch 2.13.0, transformers 5.23.0"."""
    return ", ".join(f"{key} {value}" for key, value in (found or {}).items() if value is not None)


def short(said: str) -> str:
    """Hashes by their first twelve digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b", r"\1", said)


def models(said: Mapping[str, Any]) -> str:
    """Detector and models with their hashes; `by` is the header of measurements."""
    parts = []
    for found in (said.get("detector"), said.get("models"), (said.get("by") or {}).get("models")):
        words = listed(found) if isinstance(found, Mapping) else text(found)
        parts += [words] if words and words not in parts else []
    return ", ".join(parts)


def size(sampling: Mapping[str, Any]) -> str:
    """ "832×480×81": width, height and frames, one frame left out."""
    width, height, frames = (sampling.get(key) for key in ("width", "height", "frames"))
    return f"{width}×{height}" + (f"×{frames}" if frames != 1 else "") if width else ""


def sampler(section: Mapping[str, Any]) -> str:
    """ "unipc, guidance 5 (×2 evaluations a step), shift 5" of a teacher; of a student what is not usual."""
    guidance = section.get("guidance")
    unguided = 0 if section.get("guidance_form") == "conditional" else 1
    guided = "" if guidance is None else f"guidance {guidance:g}" + " (×2 evaluations a step)" * (guidance != unguided)
    named = text(section.get("sampler") or section.get("name"))
    return ", ".join(filter(None, (named, guided, _valued("shift", section), "ODE" if section.get("ode") else "")))


def _valued(key: str, found: Mapping[str, Any]) -> str:
    return "" if found.get(key) is None else f"{key} {found[key]:g}"


def _known(known: Mapping[str, Any]) -> str:
    """ "0.95 (19 of 20 facts)"."""
    count = known.get("facts")
    return f"{known['score']:.3g}" + (f" ({round(known['score'] * count)} of {count} facts)" if count else "")


def _dimensions(score: Score) -> str:
    found = lacking(score)[0]
    return f"{len(found)} of 16 dimensions ({', '.join(found)})" if found else ""


def _samples(found: Sequence[str]) -> str:
    cut = f", … and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{len(found)} sample{'s' * (len(found) > 1)} ({', '.join(found[:_NAMED])}{cut})" if found else ""


# --- What may be compared --------------------------------------------------------------------------------------------


def compared(score: Score) -> dict[str, str]:
    """What must agree with another score's, by the keys of `COMPARED` and `JOINING`."""
    said = evaluator(score)
    known, start, diverse, native = facts(score), sigma_max(score), said.get("diversity") or {}, said.get("native")
    found = known | {
        "media": str(score["media"]),
        "package": listed({key: (said.get("versions") or {}).get(key) for key in PACKAGES}),
        "checked": "made" if known["known"] else "none",
        "missing": ", ".join(part for parts in lacking(score) for part in parts) or "nothing",
        "n_samples": "" if said.get("samples_uncounted") else known["n_samples"],
        "starts": "" if start is None else f"{start:g}",
        "diversity": ""
        if not diverse
        else f"{diverse.get('prompts_sha256')} {diverse.get('samples')} {models(diverse)}",
        "native": models(native) if native else "",
    }
    return {key: found[key] for key in (*COMPARED, *JOINING)}


def comparable(scores: Iterable[Score]) -> list[list[Score]]:
    """Scores in the order of tables, in groups within which they may be compared.

    What lacks a fact of `JOINING` stands in each group that its other facts allow: the teacher beside students of each
    σ_max.
    """
    known = [(run, compared(score), score) for run, score in in_order(scores)]
    known.sort(key=lambda item: (item[0].order, *item[1].values()))
    strict: dict[tuple[str, ...], list[tuple[dict[str, str], Score]]] = defaultdict(list)
    for _, found, score in known:
        strict[tuple(found[key] for key in COMPARED)].append((found, score))
    groups = list(strict.values())
    for key in JOINING:
        groups = [part for group in groups for part in _split(group, key)]
    return [[score for _, score in group] for group in groups]


def _split(group: list[tuple[dict[str, str], Score]], key: str) -> list[list[tuple[dict[str, str], Score]]]:
    values = dict.fromkeys(found[key] for found, _ in group if found[key])
    return [[item for item in group if item[0][key] in ("", value)] for value in values] or [group]


def differences(groups: Sequence[Sequence[Score]]) -> dict[str, list[str]]:
    """In what groups differ: what to call it, and the values of each."""
    found: dict[str, list[str]] = {}
    for key, words in (COMPARED | JOINING).items():
        values = [next((x for score in group if (x := compared(score)[key])), "") for group in groups]
        if len(set(values) - ({""} if key in JOINING else set())) > 1:
            found[words] = values
    return found
