"""VBench's scores from the results of its own code and from the dimensions measured here, with intervals over prompts.

Keys: `vbench.DIMENSION`, `vbench.quality`, `vbench.semantic` and `vbench.total` are of the official code,
`vbench_native.DIMENSION` of `rcm.evaluation.vbench_native`; native numbers never enter the totals.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from rcm.artefact import UserError, reason
from rcm.evaluation import bootstrap, features
from rcm.evaluation.measured import Measured
from rcm.evaluation.samples import Expected, missing
from rcm.evaluation.scores import VERSION, Evaluation, metric, sha256_of

FORMAT = "1"  # of what workflow/scripts/vbench_official.py writes
QUALITY = {  # minimum, maximum and weight of the official aggregation
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
DIMENSIONS = (*QUALITY, *SEMANTIC)
TOTALS = ("total", "quality", "semantic")
NAMES = {
    "vbench": "VBench (official code)",
    "vbench-long": "VBench-Long (official code)",
    "vbench-native": "VBench (native part)",
}
_QUALITY_SHARE, _SEMANTIC_SHARE = 4.0, 1.0  # of the total
_JUDGED = 5  # videos of a prompt that the official code looks at, however many there are
_SELECTIVE = ("temporal_flickering", "color")  # leave out videos that move, or in which the object is never seen
_SCALE = {"imaging_quality": 100.0}  # of the values of single videos; those of the others are fractions
_SLACK = 1e-3  # cosines in float16 exceed 1
_HEADER: dict[str, tuple[Callable[[Any], bool], str]] = {  # what a value must be, and its name
    "device": (lambda value: isinstance(value, str), "a text"),
    "versions": (lambda value: isinstance(value, dict), "an object"),
    "missing": (
        lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
        "a list of texts",
    ),
    "failed": (lambda value: isinstance(value, dict), "an object"),
    "static": (
        lambda value: (
            isinstance(value, dict)
            and all(isinstance(kept, list) and all(type(one) is int for one in kept) for kept in value.values())
        ),
        "an object of lists of whole numbers",
    ),
}
# prompt-3.mp4; VBench-Long cuts it into prompt-3_000.mp4 or prompt-3-Scene-1_000.mp4
_VIDEO = re.compile(r"(?P<name>.+?)-(?P<index>\d{1,9})(-Scene-\d+)?(_(\d+|full))?\.\w+", re.ASCII | re.DOTALL)

Videos = dict[str, dict[int, float]]  # values by name of the prompt and number of the sample


# --- Aggregation ---------------------------------------------------------------------------------------------------


def aggregate(raw: Mapping[str, float], allow_missing: bool = False) -> dict[str, float]:
    """Quality, semantic and total score of raw dimensions: fractions in, fractions out, nothing is clipped.

    A dimension is brought to (x - minimum) / (maximum - minimum); quality and semantic score are weighted means of
    theirs, the total is (4 quality + semantic) / 5.

    Args:
        raw: values by the names in `DIMENSIONS`.
        allow_missing: count a missing dimension as raw 0, as the official code does, which makes its share negative
            where its minimum is above 0; without, it is a UserError, as are unknown names and what is no number.
    """
    unknown = sorted(map(str, raw.keys() - set(DIMENSIONS)))
    if unknown:
        raise UserError(f"VBench has no dimension {', '.join(unknown)}; it has {', '.join(DIMENSIONS)}")
    for name, value in raw.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= 1 + _SLACK:
            raise UserError(f"VBench's {name} is {value!r}; expected a number, a fraction such as 0.83")
    lacking = [name for name in DIMENSIONS if name not in raw]
    if lacking and not allow_missing:
        raise UserError(
            f"VBench's totals lack {', '.join(lacking)}; evaluate all {len(DIMENSIONS)} dimensions, or allow missing "
            "ones (evaluation.allow_missing=true), which then count as raw 0"
        )
    sums = _aggregated({name: np.array([float(raw.get(name, 0.0))]) for name in DIMENSIONS})
    return {name: float(sums[name][0]) for name in ("quality", "semantic", "total")}


def _aggregated(raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    quality, semantic = _weighted(raw, QUALITY), _weighted(raw, SEMANTIC)
    total = (_QUALITY_SHARE * quality + _SEMANTIC_SHARE * semantic) / (_QUALITY_SHARE + _SEMANTIC_SHARE)
    return {"total": total, "quality": quality, "semantic": semantic}


def _weighted(raw: Mapping[str, np.ndarray], constants: Mapping[str, tuple[float, float, float]]) -> np.ndarray:
    terms = [weight * (raw[name] - low) / (high - low) for name, (low, high, weight) in constants.items()]
    return np.sum(terms, axis=0) / sum(weight for _, _, weight in constants.values())


# --- Results of the official code ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Official:
    """What the official code found: scores by dimension, and values of videos by dimension.

    `about` is what the project's script notes beside the results: versions, device, gpus, missing, failed, static. It
    is empty for a file that the official code itself wrote.
    """

    path: Path
    scores: dict[str, float]
    videos: dict[str, Videos]
    about: dict[str, Any] = field(default_factory=dict)

    def sample(self, dimension: str, name: str, index: int) -> int:
        """Number of the sample behind a video: the filter of flicker gives new numbers to those that pass."""
        kept = self.about.get("static", {}).get(name) if dimension == "temporal_flickering" else None
        if kept is not None and index >= len(kept):
            raise UserError(f"{self.path} has video {index} of {name!r}, but {len(kept)} passed the filter of flicker")
        return index if kept is None else kept[index]


def parse_video(path: Any, where: Path) -> tuple[str, int]:
    """Prompt's name and sample's number of a video, or of a part of it that VBench-Long cut out."""
    match = _VIDEO.fullmatch(Path(path).name) if isinstance(path, str) else None
    if match is None:
        raise UserError(f"{where} names a video {path!r}; expected VBench's PROMPT-NUMBER.mp4")
    return match["name"], int(match["index"])


def read_official(path: str | Path, protocol: str) -> Official:
    """Read what workflow/scripts/vbench_official.py or the official code itself (`*_eval_results.json`) wrote.

    Raises UserError that names the file: damaged, of another version or protocol, an unknown dimension, a score or
    value that is no fraction.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no results of VBench's code in {path}; run the rule of its official environment") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the results of VBench's code in {path}: {reason(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no results of VBench's code; expected an object with a dimension a key")
    about: dict[str, Any] = {}
    if "official" in found:
        about = {key: value for key, value in found.items() if key != "results"}
        _check_header(about, path, protocol)
        found = found.get("results")
        if not isinstance(found, dict):
            raise UserError(f"{path} lacks the key results; run VBench's code again")
    scores, videos = {}, {}
    for dimension, entry in found.items():
        if dimension not in DIMENSIONS:
            raise UserError(f"{path} has an unknown dimension {dimension!r}; VBench has {', '.join(DIMENSIONS)}")
        where = f"{path}, {dimension}"
        if not isinstance(entry, list) or len(entry) not in (2, 3) or not isinstance(entry[-1], list):
            raise UserError(f"{where}: expected [score, [videos]], as VBench 0.1.5 writes it; got another version's")
        if not entry[-1]:
            raise UserError(f"{where}: there is a score but no video; run VBench's code again")
        scores[dimension] = _fraction(entry[0], where, 1.0)
        videos[dimension] = _by_video(entry[-1], dimension, path, protocol)
    return Official(path, scores, videos, about)


def _check_header(about: Mapping[str, Any], path: Path, protocol: str) -> None:
    if about.get("version") != FORMAT:
        raise UserError(f"{path} is of version {about.get('version')!r}, expected {FORMAT!r}; run VBench's code again")
    if about["official"] != protocol:
        raise UserError(
            f"{path} holds results of {about['official']!r}, but evaluation.scorer is {protocol}; "
            "set the one that was run, or run the other"
        )
    if about.get("gpus") != 1:
        raise UserError(
            f"{path} was made by {about.get('gpus')} processes, which gives other scores; run VBench's code in one"
        )
    for key, (fits, wanted) in _HEADER.items():
        if key in about and not fits(about[key]):
            raise UserError(f"{path}: key {key!r} must be {wanted}; run VBench's code again")


def _fraction(value: Any, where: str, scale: float) -> float:
    """A number of the results as a fraction; cosines may be below 0."""
    if isinstance(value, bool | int | float) and abs(value) <= scale * (1 + _SLACK):
        return float(value) / scale
    raise UserError(f"{where}: {value!r} is no fraction such as 0.83; the file is damaged or of another version")


def _by_video(entries: Sequence[Any], dimension: str, path: Path, protocol: str) -> Videos:
    """Values of videos: the mean over its parts, where VBench-Long cut one. VBench judges each video once."""
    parts: dict[str, dict[int, list[float]]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or "video_path" not in entry or "video_results" not in entry:
            raise UserError(f"{path}, {dimension}: expected video_path and video_results of each video, got {entry!r}")
        name, index = parse_video(entry["video_path"], path)
        value = _fraction(entry["video_results"], f"{path}, {dimension} of {name}-{index}", _SCALE.get(dimension, 1.0))
        found = parts.setdefault(name, {}).setdefault(index, [])
        if found and protocol == "vbench":
            raise UserError(f"{path}, {dimension}: the video {name}-{index} is there twice; run VBench's code again")
        found.append(value)
    return {name: {index: float(np.mean(values)) for index, values in own.items()} for name, own in parts.items()}


# --- Scores --------------------------------------------------------------------------------------------------------


def evaluation(
    native: Measured | None = None,
    official: str | Path | None = None,
    *,
    protocol: str,
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
    """Scores of one model.

    The score of a dimension is the official file's. Its interval is of the mean over prompts, drawn within the sets of
    dimensions that prompts are about; the totals come from the same draws.

    Args:
        native: what `rcm.evaluation.vbench_native` measured.
        official: results of the official code.
        protocol: vbench | vbench-long, which take official results, or vbench-native, which has no totals.
        expected: the suite's prompts (with "name" and "dimension") and numbers of samples; without, nothing is known
            to be missing but dimensions.
        allow_missing: name what is missing in the evaluator's block instead of refusing; see `aggregate`.
        diversity: measurements of the diversity suite, whose columns are added.
        prompts_file, paper: name of the prompt file and of the model in the paper's table; only passed on.
        model, steps: who made the samples; only passed on.
        resamples, seed: of the bootstrap.
    """
    if protocol not in NAMES:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(NAMES)}")
    if (official is None) != (protocol == "vbench-native"):
        takes = "--official FILE" if official is None else "no results of VBench's own code; leave --official out"
        raise UserError(f"evaluation.scorer is {protocol}, which takes {takes}")
    if native is None and official is None:
        raise UserError("there is nothing to evaluate: give --measured FILE")
    theirs = None if official is None else read_official(official, protocol)
    ours = _native_videos(native)
    prompts = _prompts(expected, native, theirs)
    lacking = _missing(expected, native, theirs, prompts, allow_missing)
    count = None if native is None else len(native.rows)
    if native is None and expected is not None:
        count = sum(map(expected.of, range(len(expected.prompts)))) - sum(name not in DIMENSIONS for name in lacking)

    draws = Draws(["+".join(dimensions) for dimensions in prompts.values()], resamples, seed)
    table = _Table(draws)
    if theirs is not None:
        columns = {name: _means(prompts, theirs.videos[name]) for name in DIMENSIONS if name in theirs.scores}
        table.totals(aggregate(theirs.scores, allow_missing), theirs.scores, columns)
        for name, column in columns.items():
            table.add(f"vbench.{name}", column, theirs.scores[name], "official")
    for name in [name for name in DIMENSIONS if name in ours]:
        table.add(f"vbench_native.{name}", _means(prompts, ours[name]), None, "same_formula")
    if diversity is not None:
        for key, values in features.columns(diversity, allow_missing).items():
            table.columns[key] = values
            table.metrics[key] = metric(key, values, [], "same_formula", resamples=resamples, seed=seed)

    about = {} if theirs is None else theirs.about
    by = {} if native is None else native.header["by"]
    sampling = None if native is None else native.header.get("sampling")
    evaluator: dict[str, Any] = {
        "name": NAMES[protocol],
        "version": VERSION,
        "protocol": protocol,
        "models": {} if theirs is not None else by.get("models"),
        "device": about.get("device") if theirs is not None else by.get("device"),
        "versions": about.get("versions") if theirs is not None else by.get("versions"),
        "gpus": about.get("gpus") if theirs is not None else 1,
        "known": None,
        "prompts_sha256": sha256_of(expected.prompts) if expected else (sampling or {}).get("prompts_sha256"),
        "prompts_file": prompts_file,
        "sampling": sampling,
        "missing": lacking,
        "paper": paper,
        "bootstrap": {"resamples": resamples, "seed": seed},
    }
    if theirs is not None:
        evaluator["videos"] = {name: sum(map(len, found.values())) for name, found in theirs.videos.items()}
        if native is not None:
            evaluator["native"] = by
            if protocol == "vbench":  # VBench-Long looks at parts of videos, and its filter leaves no names
                evaluator["native_minus_official"] = differences(ours, theirs)
    if diversity is not None:
        evaluator["missing"] += features.lacking(diversity)
        evaluator["diversity"] = features.block(diversity)
    results = _results(prompts, ours, theirs)
    if count is None:  # the official code leaves out other videos of each model
        evaluator["samples_uncounted"] = True
    scores = {
        "model": model,
        "steps": steps,
        "media": "clips",
        "n_prompts": len(prompts),
        "n_samples": len(results) if count is None else count,
        "metrics": table.metrics,
        "evaluator": evaluator,
        "per_prompt": table.columns,
    }
    return Evaluation(scores, results)


class Draws:
    """How often each prompt is taken: once in row 0, by chance within the strata in the rows of the resamples."""

    def __init__(self, tags: Sequence[str], resamples: int, seed: int):
        self.tags = list(tags)
        rng = np.random.default_rng(seed)
        self.counts = np.ones((1 + resamples, len(tags)))
        for tag in sorted(set(tags)):
            members = np.flatnonzero(np.array(tags) == tag)
            shares = np.full(len(members), 1 / len(members))
            self.counts[1:, members] = rng.multinomial(len(members), shares, size=resamples)

    def means(self, column: Sequence[float | None]) -> np.ndarray:
        """Mean over the prompts that have a value (1 + resamples,); NaN where none of them is drawn."""
        values = np.array([np.nan if value is None else value for value in column], dtype=float)
        found = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            return np.asarray(self.counts[:, found] @ values[found] / self.counts[:, found].sum(axis=1))


class _Table:
    """Metrics with intervals, and their values by prompt."""

    def __init__(self, draws: Draws):
        self.draws = draws
        self.metrics: dict[str, dict[str, Any]] = {}
        self.columns: dict[str, list[Any]] = {"tag": draws.tags}

    def add(self, key: str, column: list[float | None], value: float | None, kind: str) -> None:
        """A metric of the prompts' values; `value` replaces their mean, and the interval moves with it.

        The official score is not always the mean over prompts: it may weight by frames, and prompts may lack videos.
        """
        drawn = self.draws.means(column)
        shown = float(drawn[0]) if value is None else value
        self._set(key, shown, drawn[1:] + (shown - drawn[0]), sum(x is not None for x in column), kind)
        self.columns[key] = column

    def totals(
        self, sums: Mapping[str, float], scores: Mapping[str, float], columns: Mapping[str, list[float | None]]
    ) -> None:
        """The totals of the dimensions' draws.

        A prompt has no total of its own. Its values here are pseudo-values: the total, plus what the prompt's deviation
        from the mean of each of its dimensions adds to it, times the number of prompts. Their mean is the total, and a
        bootstrap of that mean, paired with another model's, has the total's spread to first order.
        """
        moved = {name: np.zeros(len(self.draws.counts)) for name in DIMENSIONS}
        share = {name: np.zeros(len(self.draws.tags)) for name in DIMENSIONS}  # in the mean, of each prompt's deviation
        for name, column in columns.items():
            drawn = self.draws.means(column)
            moved[name] = drawn + (scores[name] - drawn[0])
            values = np.array([drawn[0] if value is None else value for value in column])
            share[name] = (values - drawn[0]) / sum(value is not None for value in column)
        there = np.any([[value is not None for value in column] for column in columns.values()], axis=0)
        count = int(there.sum())
        drawn_sums, added = _aggregated(moved), _aggregated(share)
        offset = _aggregated({name: np.zeros(1) for name in DIMENSIONS})
        for name in TOTALS:
            self._set(f"vbench.{name}", sums[name], drawn_sums[name][1:], count, "official")
            pseudo = sums[name] + count * (added[name] - offset[name])
            self.columns[f"vbench.{name}"] = [
                float(value) if has else None for value, has in zip(pseudo, there, strict=True)
            ]

    def _set(self, key: str, value: float, drawn: np.ndarray, count: int, kind: str) -> None:
        low, high = np.nanpercentile(drawn, bootstrap.TAILS)
        self.metrics[key] = {"value": value, "low": float(low), "high": float(high), "n_prompts": count, "kind": kind}


def _means(prompts: Mapping[str, Any], videos: Videos) -> list[float | None]:
    """Mean over the videos of each prompt."""
    return [float(np.mean(list(videos[name].values()))) if videos.get(name) else None for name in prompts]


def _native_videos(native: Measured | None) -> dict[str, Videos]:
    found: dict[str, Videos] = {}
    for row in [] if native is None else native.rows:
        number = int(Path(row["filename"]).stem)
        for dimension, value in row["values"].items():
            found.setdefault(dimension, {}).setdefault(row["name"], {})[number] = value
    return found


def _prompts(expected: Expected | None, native: Measured | None, theirs: Official | None) -> dict[str, tuple[str, ...]]:
    """Names of the prompts and the dimensions they are about: the suite's, or without it those of what was measured.

    Two of VBench's prompts occur twice, about other dimensions each time; their videos are the same.
    """
    about: dict[str, set[str]] = {}
    for item in [] if expected is None else expected.prompts:
        if not isinstance(item.get("name"), str) or not isinstance(item.get("dimension"), list):
            raise UserError(
                f"the prompt {item.get('prompt')!r} lacks VBench's name or dimensions; make the prompts again with "
                "`rcm prompts --names all_dimension.txt --info VBench_full_info.json`"
            )
        about.setdefault(item["name"], set()).update(item["dimension"])
    suite = set(about)
    for row in [] if native is None else native.rows:
        about.setdefault(row["name"], set()).update(row["dimension"])
    for dimension, videos in {} if theirs is None else theirs.videos.items():
        for name in videos:
            about.setdefault(name, set()).add(dimension)
    strange = [name for name in about if name not in suite]
    if expected is not None and strange:
        where = "the measured samples" if theirs is None else theirs.path
        raise UserError(
            f"{len(strange)} prompts of {where} are not of the prompt file, the first {strange[0]!r}; "
            "check which prompts are meant"
        )
    return {name: tuple(one for one in DIMENSIONS if one in asked) for name, asked in about.items()}


def _missing(
    expected: Expected | None,
    native: Measured | None,
    theirs: Official | None,
    prompts: Mapping[str, Sequence[str]],
    allow_missing: bool,
) -> list[str]:
    """Dimensions and videos that should be there and are not; a UserError unless they are allowed to be missing."""
    lacking = []
    if native is not None and expected is not None:
        lacking += missing(expected, [row["filename"] for row in native.rows], allow_missing)
    if theirs is None:
        return lacking
    dimensions = [name for name in DIMENSIONS if name not in theirs.scores]
    if dimensions and not allow_missing:
        reasons = {**dict.fromkeys(dimensions, ""), **theirs.about.get("failed", {})}
        named = ", ".join(name + f" ({reasons[name]})" * bool(reasons[name]) for name in dimensions)
        raise UserError(
            f"{theirs.path} lacks {len(dimensions)} of {len(DIMENSIONS)} dimensions: {named}; run VBench's code on "
            "them, or allow missing ones (evaluation.allow_missing=true), which then count as raw 0"
        )
    counts: dict[str, int] = {}
    if expected is not None:
        for number, item in enumerate(expected.prompts):
            counts[item["name"]] = max(counts.get(item["name"], 0), min(expected.of(number), _JUDGED))
    gone = dict.fromkeys(theirs.about.get("missing", []))
    for name, count in counts.items():
        for dimension in prompts[name]:
            if dimension in theirs.scores and dimension not in _SELECTIVE:
                found = theirs.videos[dimension].get(name, {})
                gone |= dict.fromkeys(f"{name}-{index}.mp4" for index in range(count) if index not in found)
    if gone and not allow_missing:
        raise UserError(
            f"{theirs.path} lacks {len(gone)} videos, the first {next(iter(gone))}; sample them and run VBench's code "
            "again, or allow missing samples (evaluation.allow_missing=true)"
        )
    return [*dimensions, *lacking, *gone]


def differences(ours: Mapping[str, Videos], theirs: Official) -> dict[str, float]:
    """Mean over the videos that both measured of native minus official, by dimension.

    Flicker is left out where nothing says which samples passed the official filter, for it gives them new numbers.
    """
    found: dict[str, float] = {}
    for dimension in [name for name in DIMENSIONS if name in ours and name in theirs.videos]:
        if dimension == "temporal_flickering" and not theirs.about.get("static"):
            continue
        pairs = [
            (ours[dimension].get(name, {}).get(theirs.sample(dimension, name, index)), value)
            for name, values in theirs.videos[dimension].items()
            for index, value in values.items()
        ]
        both = [mine - value for mine, value in pairs if mine is not None]
        if both:
            found[dimension] = float(np.mean(both))
    return found


def _results(prompts: Mapping[str, Any], ours: Mapping[str, Videos], theirs: Official | None) -> list[dict[str, Any]]:
    """An object for each sample that has a value."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    parts = [("vbench_native", name, videos) for name, videos in ours.items()]
    parts += [("vbench", name, videos) for name, videos in ({} if theirs is None else theirs.videos).items()]
    for family, dimension, videos in parts:
        for name, values in videos.items():
            for index, value in values.items():
                number = theirs.sample(dimension, name, index) if theirs and family == "vbench" else index
                line = lines.setdefault((name, number), {"filename": f"{name}-{number}.mp4", "prompt": name})
                line[f"{family}.{dimension}"] = value
    order = {name: place for place, name in enumerate(prompts)}
    return [lines[key] for key in sorted(lines, key=lambda key: (order[key[0]], key[1]))]
