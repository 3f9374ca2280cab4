"""Captions of panels: what the numbers are and are not, and where they are from."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from rcm.report.facts import short
from rcm.report.rows import Line, Lines, Row
from rcm.report.scores import joined

ABOUT = {  # evaluators, and what their numbers are not
    "GenEval (HF Mask2Former)": "The detector is transformers' Mask2Former, by another training run than GenEval's own "
    "(mmdet): these are not GenEval (mmdet) numbers, least of all in counting, where a detection needs a score of 0.9.",
    "GenEval (mmdet)": "Judged by the official evaluator in its own environment.",
    "VBench (official code)": "Measured by the official code.",
    "VBench-Long (official code)": "Measured by the official code for clips of 5 s and more, which cuts them into "
    "parts, so not comparable with VBench.",
    "VBench (native part)": "Only what is implemented here; without the other dimensions there is no total.",
}
CARD = "H100"  # on which the paper timed its frames per second
OF_VBENCH = 16  # dimensions
DETECTORS = ("GenEval (HF Mask2Former)", "GenEval (mmdet)")
NOT_REPRODUCED = "not reproduced: the TI2V network is not part of this version"


def how(row: Row, bounded: bool) -> str:
    """Samples, and intervals where there are some."""
    each, rest = divmod(int(row.n_samples), max(1, int(row.n_prompts)))
    count = f"{row.n_prompts} prompts, {row.n_samples} samples{'' if rest else f' ({each} each)'}"
    return " ".join(filter(None, (f"{count}.", brackets(row, bounded), ABOUT.get(row.evaluator))))


def brackets(row: Row, bounded: bool) -> str:
    """What stands in brackets, if anything does."""
    if not bounded:
        return ""
    return f"Brackets are 95 % bootstrap intervals over prompts{f' ({row.bootstrap})' if row.bootstrap else ''}."


def shapeeval(own: Lines, row: Row, bounded: bool) -> str:
    """Of the tiny world's headline."""
    each = int(row.n_samples) / max(1, int(row.n_prompts))
    return (
        f"GenEval's protocol in a world of coloured shapes: {row.n_prompts} prompts with {each:g} samples each, "
        f"the same initial noise for every model; overall is the mean of the six tasks. "
        f"{brackets(row, bounded)} {kinds(own, ['shapeeval.overall'])}"
    )


def geneval(row: Row, bounded: bool) -> str:
    """Of GenEval's headline."""
    return f"Share of correct images; overall is the mean of the six tasks. {how(row, bounded)}"


def vbench(row: Row, bounded: bool) -> str:
    """Of VBench's headline."""
    count = dimensions(row)
    whole = f"{count} of {OF_VBENCH}" if count < OF_VBENCH else OF_VBENCH
    made = f"Fractions; {whole} dimensions, normalised and weighed as VBench does; total is 0.8 quality + 0.2 semantic."
    made += " A missing dimension counts as raw 0, so these totals are not VBench's." if count < OF_VBENCH else ""
    return f"{made} {how(row, bounded)}"


def dimensions(row: Row) -> int:
    """How many of VBench's dimensions there are."""
    found = re.match(rf"(\d+) of {OF_VBENCH} dimensions", row.missing)
    return OF_VBENCH - int(found[1]) if found else OF_VBENCH


def small_text(row: Row, bounded: bool) -> str:
    """Of the text that was read back."""
    return (
        "Prompts with a word in them, which is read back from the samples. Character error rate (CER): edits from what "
        "is read to what is wanted, as a share of the latter's length; less is better. Exact: share of samples that "
        "are read without a mistake. The paper has no such number: its project page shows pictures. "
        f"{how(row, bounded)}"
    )


def diversity(measured: Lines, keys: Sequence[str], row: Row, first: Row, bounded: bool) -> str:
    """Of diversity, whose samples and models are its own."""
    if "diversity.clip_distance" in keys or "diversity.vbench2" in keys:
        text = (
            "Over samples of one prompt, beside the quality of the same model with the same sampler: noise and broken "
            "samples are diverse too. Distances are means over pairs of the first 8 samples of 1 − cosine of CLIP and "
            "DINOv2 features; VBench-2.0's diversity compares VGG-19 features of all samples."
        )
    else:
        text = (
            "Over samples of one prompt, on what the caption leaves open; only samples that satisfy the caption count. "
            "Vendi is the effective number of different samples among eight, entropies are in bits. The pixel distance "
            "is secondary: noise raises it. Quality stands beside, by the same sampler."
        )
    if row.n_samples:
        text += f" {row.n_prompts} prompts, {row.n_samples} samples"
        text += f", prompts' SHA-256 {row.prompts_sha256[:12]}." if row.prompts_sha256 else "."
    if row.models and row.models != first.models:
        text += f" Models: {short(row.models)}."
    sigma = _by_value(measured, lambda row: row.sigma_max)
    sigma = f"σ_max: {sigma}." if sigma else ""
    return " ".join(filter(None, (text, brackets(first, bounded), sigma, kinds(measured, keys))))


def speed(speeds: Mapping[Line, Row]) -> str:
    """On what the frames per second were timed."""
    devices = sorted({row.device for row in speeds.values()})
    precisions = joined(sorted({row.sampled for row in speeds.values() if row.sampled}))
    where = f"on {devices[0]}" if len(devices) == 1 else "on the device beside it, so not to be compared across devices"
    made = f"Frames/s: batch 1, sampling and decoding{f', {precisions}' if precisions else ''}, {where}."
    return f"{made} The paper's are of one {CARD}{'' if CARD in ' '.join(devices) else ', so not beside these'}."


def beside(row: Row) -> str:
    """Of measured scores beside the paper's."""
    about = (
        f"Measured − published, of the {row.params} model at the numbers of steps that the paper has. "
        "Intervals cover the draw of prompts, not training."
    )
    if row.table == "table1":
        detector = " The detector here is not GenEval's own." if "Mask2Former" in row.evaluator else ""
        return f"{about} Fractions; the paper rounds to 0.01 and states neither its seeds nor its detector.{detector}"
    return (
        f"{about} Percent, as the paper prints. It names neither the file of its GPT-4o-augmented prompts nor which of "
        "VBench and VBench-Long it took; a later test of the 1.3B teacher by its authors is lower by 0.24 in total."
    )


# --- Where numbers are from ---------------------------------------------------------------------------------------


def apart(firsts: Mapping[str, Row], key: str, title: str) -> str:
    """Why groups are no columns of one panel: told once, under `title`, the first of group 1."""
    others = [f"group {name} differs in {row.differs}" for name, row in firsts.items() if row.differs]
    if not others:
        return ""
    if firsts[key].differs:
        return f"Not comparable with the other groups; in what they differ stands under “{title}”."
    return f"Not comparable with the other groups: {'; '.join(others)}."


def _by_value(own: Lines, value: Callable[[Row], str], every: bool = False) -> str:
    """ "1600" if all models agree, else "1600 (rCM, DMD2); 5000 (Teacher)"; `every`: with names in any case."""
    facts = {line: value(next(iter(found.values()))) for line, found in own.items() if line.seed != "mean"}
    said: dict[str, list[Line]] = defaultdict(list)
    at: dict[tuple[str, str], set[str]] = defaultdict(set)
    for line, text in facts.items():
        at[line.model, line.steps].add(text)
        if text:
            said[text].append(line)
    silent = any(not text and line.block == "models" for line, text in facts.items())
    if len(said) == 1 and not every and not silent:
        return next(iter(said))
    by_seed = {model for (model, _), texts in at.items() if len(texts) > 1}
    who = {line: line.name + f" (seed {line.seed})" * (line.model in by_seed) for line in facts}
    values = Counter(name for lines in said.values() for name in {who[line] for line in lines})
    parts = []
    for text, lines in said.items():
        names = dict.fromkeys(who[line] + f" at {line.steps}" * (values[who[line]] > 1) for line in lines)
        parts.append(f"{text} ({', '.join(names)})")
    return "; ".join(parts)


def provenance(own: Lines, row: Row) -> str:
    """Evaluator, prompts, sampling and checkpoints of a group, for its caption."""
    shapes = row.evaluator == "ShapeEval"
    evaluator = f"Evaluator: {row.evaluator}, version {row.version}"
    evaluator += f"; {short(row.models)}" if row.models else ""
    devices = _by_value(own, lambda row: ", ".join(filter(None, (row.device, row.versions))))
    evaluator += f"; on {devices}" if devices else ""
    evaluator += f"; GPUs: {row.gpus}" if row.gpus else ""
    source = row.prompts_file + (f", SHA-256 {row.prompts_file_sha256[:16]}" if row.prompts_file_sha256 else "")
    prompts = f"SHA-256 {row.prompts_sha256[:12] or 'unknown'}"
    facts = {
        "Known-image check": _by_value(own, lambda row: row.known or "none") if row.evaluator in DETECTORS else "",
        "Prompts": f"{prompts} as they were scored, from {source}" if source else prompts,
        "Size": _by_value(own, lambda row: row.size),
        "Sampling": _by_value(own, lambda row: row.sampled) or ("" if shapes else "not noted with the samples"),
        "Sampler": _by_value(own, lambda row: row.sampler),
        "σ_max": _by_value(own, lambda row: row.sigma_max),
        "Times": _by_value(own, lambda row: row.times),
        "Checkpoints (SHA-256)": _by_value(own, lambda row: row.checkpoint_sha256[:12], every=True),
        "Missing": row.missing,
    }
    return " ".join([f"{evaluator}.", *(f"{name}: {fact}." for name, fact in facts.items() if fact)])


def kinds(own: Lines, keys: Iterable[str]) -> str:
    """How near measures are to those they are named after."""
    found = {found[key].kind.replace("_", " ") for key in keys for found in own.values() if key in found} - {""}
    return f"Kind: {', '.join(sorted(found))}." if found else ""
