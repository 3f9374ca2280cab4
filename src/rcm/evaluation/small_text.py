"""Small text: samples of prompts with a text in them, read back by RapidOCR; how many characters are wrong.

The character error rate (CER) is Levenshtein's distance between the text wanted and the one read, over the length of
the one wanted. Both are compared after Unicode's NFKC, without regard to case, every white space as one blank. A
picture may show other writing too, which is no mistake: of all runs of lines that follow one another in reading order,
the one nearest to the text counts, and the empty run is one of them. So the rate is 1 where nothing is read, and never
more.

Of a clip the middle frame is read. The reader's own errors are part of the rate: it makes none on the suite's texts in
plain lettering; on slanted, bent or drawn letters nobody measured them. Its models lie in rapidocr's wheel.
"""

import importlib.metadata
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rcm.artefact import UserError, sha256_file
from rcm.evaluation.measured import Measured
from rcm.evaluation.samples import Expected, PromptSamples, missing, read_frames
from rcm.evaluation.scores import VERSION, Evaluation, by_prompt, scored, sha256_of

NAME = "Small text (RapidOCR)"

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, pixels


# --- Comparing -----------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """A text as it is compared: NFKC, no case, white space as one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def levenshtein(first: str, second: str) -> int:
    """The least number of characters to insert, delete or replace that makes one text the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above, row = row, [i]
        for j, b in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def error_rate(wanted: str, lines: Sequence[str]) -> float:
    """CER of the run of lines that is nearest to the text wanted, in [0, 1]."""
    target, texts = plain(wanted), [text for text in map(plain, lines) if text]
    best = len(target)
    for start, end in combinations(range(len(texts) + 1), 2):
        run = " ".join(texts[start:end])
        if len(run) - len(target) < best:  # a longer one cannot be nearer
            best = min(best, levenshtein(target, run))
    return best / len(target)


def reading_order(found: Sequence[tuple[Box, str]]) -> list[str]:
    """Texts from top to bottom, and from left to right where boxes stand beside one another.

    They do if the middle of each lies within the height of the other.
    """
    rows: list[list[tuple[Box, str]]] = []
    for entry in sorted(found, key=lambda entry: entry[0][1] + entry[0][3]):
        if rows and _beside(rows[-1][0][0], entry[0]):
            rows[-1].append(entry)
        else:
            rows.append([entry])
    return [text for row in rows for _, text in sorted(row, key=lambda entry: entry[0][0])]


def _beside(a: Box, b: Box) -> bool:
    return a[1] < (b[1] + b[3]) / 2 < a[3] and b[1] < (a[1] + a[3]) / 2 < b[3]


# --- Reading -------------------------------------------------------------------------------------------------------


def _package() -> ModuleType:
    try:
        import onnxruntime  # noqa: F401  by which rapidocr reads
        import rapidocr
    except ImportError as error:
        raise UserError(f"small text is read by RapidOCR ({error}): `pip install -e .[scoring]`") from error
    return rapidocr


@cache
def _reader() -> Any:
    # without its classifier of upside-down lines, which turns some upright ones
    return _package().RapidOCR(params={"Global.log_level": "critical", "Global.use_cls": False})


def read(image: np.ndarray) -> list[str]:
    """The lines of text in an image uint8 (H, W, 3), in reading order."""
    found = _reader()(np.ascontiguousarray(image[..., ::-1]))  # blue first, as OpenCV has it
    if found.txts is None:
        return []
    boxes = [(*corners.min(0).tolist(), *corners.max(0).tolist()) for corners in np.asarray(found.boxes)]
    return reading_order(list(zip(boxes, found.txts, strict=True)))


def by() -> dict[str, Any]:
    """Who reads: the models' hashes and the packages' versions, for the header of the measurement."""
    folder = Path(str(_package().__file__)).parent / "models"
    models = sorted(path for path in folder.glob("*.onnx") if "_cls_" not in path.name)
    return {
        "name": NAME,
        "models": {path.stem: sha256_file(path) for path in models},
        "device": "CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("rapidocr", "onnxruntime")},
    }


def measure(
    items: Sequence[PromptSamples],
    advance: Callable[[int], object] = lambda count: None,
    *,
    frames: int | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each sample, which must have `frames`: {"prompt", "filename", "wanted", "read" (its lines), "cer"}.

    Raises UserError for a prompt whose metadata have no "text".
    """
    for item in items:
        wanted = item.metadata.get("text")
        if not isinstance(wanted, str) or not plain(wanted):
            raise UserError(
                f"{item.paths[0].parents[1] / 'metadata.jsonl'} names no text that is to be read (key 'text'); "
                "expected samples of suite=text"
            )
        for path in item.paths:
            clip = read_frames(path, frames)
            lines = read(clip[len(clip) // 2])
            row: dict[str, Any] = {"prompt": item.index, "filename": item.name(path), "wanted": wanted}
            yield row | {"read": "\n".join(lines), "cer": error_rate(wanted, lines)}
            advance(1)


# --- Scores --------------------------------------------------------------------------------------------------------


def evaluation(
    measured: Measured,
    *,
    model: str,
    steps: int,
    media: str,
    resamples: int = 1000,
    seed: int = 0,
    expected: Expected | None = None,
    allow_missing: bool = False,
    prompts_file: str | None = None,
    paper: str | None = None,
) -> Evaluation:
    """Scores of one model: `text.cer`, and `text.exact`, the share of samples whose text is read without a mistake.

    Args:
        measured: what `measure` saw.
        model, steps, media: who made the samples; only passed on, as are `prompts_file` and `paper`.
        resamples, seed: of the bootstrap over prompts.
        expected: the suite's prompts and number of samples; without, all prompts must have the same number.
        allow_missing: name missing samples in the evaluator's block instead of refusing them.
    """
    rows = measured.rows
    if not rows:
        raise UserError("the measurement of small text holds no samples; measure the samples of suite=text")
    lacking = missing(expected, [row["filename"] for row in rows], allow_missing)
    cers: dict[int, list[float]] = {}
    for row in rows:
        wanted = row["wanted"] if expected is None else expected.prompts[row["prompt"]].get("text")
        if wanted != row["wanted"]:
            raise UserError(
                f"{row['filename']}: {row['wanted']!r} was looked for, but the prompt file says {wanted!r}; measure "
                "the samples of these prompts"
            )
        cers.setdefault(row["prompt"], []).append(row["cer"])
    values = {
        prompt: {"text.cer": float(np.mean(found)), "text.exact": float(np.mean([cer == 0 for cer in found]))}
        for prompt, found in cers.items()
    }
    columns = by_prompt(values, cers if expected is None else range(len(expected.prompts)))
    tags = ["text"] * len(columns["text.cer"])
    evaluator = {
        **measured.evaluator,
        "version": VERSION,
        "prompts_sha256": None if expected is None else sha256_of(expected.prompts),
        "prompts_file": prompts_file,
        "missing": lacking,
        "paper": paper,
    }
    kinds = dict.fromkeys(columns, "analogue")  # of the paper's pictures: it has no number
    about = {"model": model, "steps": steps, "media": media, "n_prompts": len(cers), "n_samples": len(rows)}
    scores = scored(about, {"tag": tags, **columns}, kinds, evaluator, resamples=resamples, seed=seed)
    return Evaluation(scores, [{**row, "correct": row["cer"] == 0} for row in rows])
