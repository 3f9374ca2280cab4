"""Captions with checkable metadata: GenEval's generator, over any vocabulary, and the suites made with it.

A caption is one JSON object a line, as GenEval's `evaluation_metadata.jsonl` has it:

    {"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?: [{"class", "count"}], "prompt"}

A caption of a clip adds `"motion": "left" | "right" | "up" | "down"`; without it the clip stands still. With `COCO`,
seed 43 and n = 100 the generator gives the 553 prompts of GenEval (Ghosh et al., arXiv 2310.11513) byte by byte.
Prompts are data: nothing here or downstream uses one as a path, a pattern or a command.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np

from rcm.artefact import UserError, json_value
from rcm.data import world

Metadata = dict[str, Any]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MOTIONS = tuple(world.DIRECTIONS)
_NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Vocabulary:
    """What captions speak of; `uncolored` names the one class that is never given a colour."""

    classes: tuple[str, ...]
    colors: tuple[str, ...]
    uncolored: str | None = None

    def colorable(self) -> list[str]:
        """Classes that may have a colour, from the one after `uncolored` on, as GenEval's index shift orders them."""
        if self.uncolored is None:
            return list(self.classes)
        start = self.classes.index(self.uncolored) + 1
        return [*self.classes[start:], *self.classes[: start - 1]]


TINY = Vocabulary(world.SHAPES, tuple(world.COLORS))
COCO = Vocabulary(
    classes=(
        *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
        *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
        *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
        *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
        *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
        *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
        *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
        *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
        *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
    ),
    colors=("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"),
    uncolored="person",
)
VOCABULARIES = {"tiny": TINY, "coco": COCO}


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def single_object(name: str) -> Metadata:
    """One object of a class."""
    include = [{"class": name, "count": 1}]
    return {"tag": "single_object", "include": include, "prompt": f"a photo of {_with_article(name)}"}


def two_object(first: str, second: str) -> Metadata:
    """One object of each of two classes."""
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    prompt = f"a photo of {_with_article(first)} and {_with_article(second)}"
    return {"tag": "two_object", "include": include, "prompt": prompt}


def counting(name: str, count: int) -> Metadata:
    """Exactly `count` objects of a class."""
    return {
        "tag": "counting",
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
        "prompt": f"a photo of {_NUMBERS[count]} {_plural(name)}",
    }


def colors(name: str, color: str) -> Metadata:
    """One object of a class in a colour."""
    include = [{"class": name, "count": 1, "color": color}]
    return {"tag": "colors", "include": include, "prompt": f"a photo of {_with_article(color)} {name}"}


def position(name: str, relation: str, other: str) -> Metadata:
    """`name` stands in `relation` to `other`; GenEval lists `other` first and refers to it by its index 0."""
    include = [{"class": other, "count": 1}, {"class": name, "count": 1, "position": [relation, 0]}]
    prompt = f"a photo of {_with_article(name)} {relation} {_with_article(other)}"
    return {"tag": "position", "include": include, "prompt": prompt}


def color_attr(first: str, first_color: str, second: str, second_color: str) -> Metadata:
    """Two classes, each in its own colour."""
    include = [
        {"class": first, "count": 1, "color": first_color},
        {"class": second, "count": 1, "color": second_color},
    ]
    prompt = f"a photo of {_with_article(first_color)} {first} and {_with_article(second_color)} {second}"
    return {"tag": "color_attr", "include": include, "prompt": prompt}


def geneval(vocabulary: Vocabulary, *, seed: int = 43, n: int = 100) -> list[Metadata]:
    """GenEval's prompts: every class once, `n` draws of each other task, exact duplicates dropped.

    The order of the draws is GenEval's, so that `geneval(COCO)` is its file of 553 prompts.
    """
    rng = np.random.default_rng(seed)
    names, paints, plain = vocabulary.classes, vocabulary.colors, vocabulary.colorable()
    drawn = [single_object(names[i]) for i in rng.choice(len(names), size=len(names), replace=False)]
    for _ in range(n):
        i, j = rng.choice(len(names), size=2, replace=False)
        drawn.append(two_object(names[i], names[j]))
    for _ in range(n):
        i = rng.choice(len(names))
        drawn.append(counting(names[i], int(rng.integers(2, 4, endpoint=True))))
    for _ in range(n):
        i = rng.choice(len(plain))
        drawn.append(colors(plain[i], paints[rng.choice(len(paints))]))
    for _ in range(n):
        i, j = rng.choice(len(names), size=2, replace=False)
        drawn.append(position(names[i], world.RELATIONS[rng.choice(len(world.RELATIONS))], names[j]))
    for _ in range(n):
        i, j = rng.choice(len(plain), size=2, replace=False)
        k, m = rng.choice(len(paints), size=2, replace=False)
        drawn.append(color_attr(plain[i], paints[k], plain[j], paints[m]))
    return list({_line(item): item for item in drawn}.values())


def every_caption(vocabulary: Vocabulary) -> dict[str, list[Metadata]]:
    """All distinct captions of the six templates, by task."""
    names, paints, plain = vocabulary.classes, vocabulary.colors, vocabulary.colorable()
    return {
        "single_object": [single_object(a) for a in names],
        "two_object": [two_object(a, b) for a, b in permutations(names, 2)],
        "counting": [counting(a, count) for a in names for count in (2, 3, 4)],
        "colors": [colors(a, c) for a, c in product(plain, paints)],
        "position": [position(a, rel, b) for (a, b), rel in product(permutations(names, 2), world.RELATIONS)],
        "color_attr": [
            color_attr(a, c, b, d) for (a, b), (c, d) in product(permutations(plain, 2), permutations(paints, 2))
        ],
    }


def as_clip(metadata: Metadata, motion: str | None) -> Metadata:
    """The caption of a clip in which the first-mentioned object moves (`motion` None: nothing moves)."""
    prompt = metadata["prompt"].replace("a photo of", "a video of", 1)
    clip = {key: value for key, value in metadata.items() if key != "prompt"}
    if motion is not None:
        mover = metadata["include"][-1 if metadata["tag"] == "position" else 0]["class"]
        subject = {"single_object": "", "colors": "", "counting": ", one"}.get(metadata["tag"], f", the {mover}")
        clip["motion"] = motion
        prompt = f"{prompt}{subject} moving {motion}"
    return {**clip, "prompt": prompt}


def _draw_motion(
    metadata: Metadata, still: float, rng: np.random.Generator, fits: Callable[[Metadata], bool]
) -> Metadata:
    """A clip of the caption: still with probability `still`, or in one of the directions that the world can show."""
    moving = [clip for clip in (as_clip(metadata, motion) for motion in MOTIONS) if fits(clip)]
    if not moving or rng.random() < still:
        return as_clip(metadata, None)
    return moving[rng.integers(len(moving))]


def evaluation_suite(
    vocabulary: Vocabulary,
    *,
    seed: int,
    per_task: int,
    media: str = "images",
    still: float = 0.25,
    tasks: Sequence[str] = TASKS,
    fits: Callable[[Metadata], bool] = world.compatible,
) -> list[Metadata]:
    """The first `per_task` distinct GenEval prompts of each task, fewer where the vocabulary has no more.

    For clips a share `still` has no motion, and a task with too few captions takes them again with other motions;
    `fits` says which motions the world can show.
    """
    available = {task: len(captions) for task, captions in every_caption(vocabulary).items()}
    n = 4 * per_task
    while True:  # until no task can give more
        prompts = geneval(vocabulary, seed=seed, n=n)
        by_task = {task: [item for item in prompts if item["tag"] == task][:per_task] for task in tasks}
        if all(len(by_task[task]) == min(per_task, available[task]) for task in tasks):
            break
        n *= 2
    chosen = [item for task in tasks for item in by_task[task]]
    if media == "images":
        return chosen
    rng = np.random.default_rng([seed, 1])
    clips: list[Metadata] = []
    for task in tasks:
        drawn = [_draw_motion(item, still, rng, fits) for item in by_task[task]]
        for item in by_task[task] * (1 + len(MOTIONS)):
            drawn.append(_draw_motion(item, still, rng, fits))
        clips += list({_line(item): item for item in drawn}.values())[:per_task]
    return clips


def training_suite(
    vocabulary: Vocabulary,
    *,
    seed: int,
    number: int,
    weights: Mapping[str, float],
    media: str = "images",
    still: float = 0.25,
    fits: Callable[[Metadata], bool] = world.compatible,
) -> list[Metadata]:
    """`number` captions in random order: tasks by weight, and within a task every caption equally often.

    Captions recur when a task's share is larger than its number of captions.
    """
    unknown = set(weights) - set(TASKS)
    if unknown:
        raise UserError(
            f"unknown task {sorted(unknown)[0]!r} in the weights of the training prompts: use {', '.join(TASKS)}"
        )
    rng = np.random.default_rng([seed, 2])
    captions = every_caption(vocabulary)
    total = sum(weights.values())
    ends = np.rint(np.cumsum([weights.get(task, 0.0) / total * number for task in TASKS])).astype(int)
    drawn: list[Metadata] = []
    for task, share in zip(TASKS, np.diff(ends, prepend=0), strict=True):
        pool = captions[task]
        rounds = -(-int(share) // len(pool))
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(rounds)]) if rounds else np.zeros(0, int)
        drawn += [pool[i] for i in order[:share]]
    drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    return drawn if media == "images" else [_draw_motion(item, still, rng, fits) for item in drawn]


def _line(metadata: Mapping[str, Any]) -> str:
    return json.dumps(metadata)


def to_jsonl(prompts: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(f"{_line(item)}\n" for item in prompts)


def read_prompts(path: str | Path) -> list[Metadata]:
    """Read and check a prompt file (any `evaluation_metadata.jsonl`).

    Raises UserError that names the line and the key which is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no prompt file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt file {str(path)!r}: {error}") from None
    return parse_prompts(text, str(path))


def parse_prompts(text: str, name: str = "prompts") -> list[Metadata]:
    """Parse the text of a prompt file; `name` stands in error messages."""
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            item = json_value(line)
        except ValueError as error:
            raise UserError(f"{name}, line {number}: not JSON ({error})") from None
        fault = _fault(item)
        if fault:
            raise UserError(f"{name}, line {number}: {fault}")
        prompts.append(item)
    if not prompts:
        raise UserError(f"{name}: no prompts; expected one JSON object a line")
    return prompts


def _fault(item: Any) -> str | None:
    """What is wrong with one line, or None."""
    if not isinstance(item, dict):
        return "expected a JSON object such as GenEval's evaluation_metadata.jsonl has"
    if not isinstance(item.get("prompt"), str) or not item["prompt"]:
        return "key 'prompt' must be a text that is not empty"
    try:
        item["prompt"].encode()
    except UnicodeEncodeError:
        return "key 'prompt' holds half of a surrogate pair, which is no text"
    if item.get("tag") not in TASKS:
        return f"key 'tag' must be one of {', '.join(TASKS)}; got {item.get('tag')!r}"
    if not isinstance(item.get("include"), list) or not item["include"]:
        return "key 'include' must be a list of objects that is not empty"
    if not isinstance(item.get("exclude", []), list):
        return "key 'exclude' must be a list"
    if "motion" in item and item["motion"] not in MOTIONS:
        return f"key 'motion' must be one of {', '.join(MOTIONS)} or absent; got {item['motion']!r}"
    for key in ("include", "exclude"):
        for index, entry in enumerate(item.get(key, [])):
            fault = _entry_fault(entry, index)
            if fault:
                return f"key '{key}[{index}]{fault}"
    return None


def _entry_fault(entry: Any, index: int) -> str | None:
    """What is wrong with one entry of `include` or `exclude`, from its key on."""
    if not isinstance(entry, dict):
        return "' must be an object with 'class' and 'count'"
    if not isinstance(entry.get("class"), str) or not entry["class"]:
        return ".class' must be a text that is not empty"
    count = entry.get("count")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        return f".count' must be a whole number from 1 on; got {count!r}"
    if "color" in entry and not isinstance(entry["color"], str):
        return ".color' must be a text"
    if "position" in entry:
        place = entry["position"]
        if not (isinstance(place, list) and len(place) == 2 and place[0] in world.RELATIONS):
            return f".position' must be [relation, index] with one of {', '.join(world.RELATIONS)}; got {place!r}"
        if isinstance(place[1], bool) or not isinstance(place[1], int) or not 0 <= place[1] < index:
            return f".position' must point to an entry before its own; got index {place[1]!r}"
    return None
