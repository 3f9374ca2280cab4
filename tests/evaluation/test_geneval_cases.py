"""GenEval's decision against cases worked out by hand from the written rules in geneval_cases.yaml."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rcm.data.prompts import TASKS
from rcm.evaluation.geneval import Detection, judge, relations


def _cases() -> Iterator[Any]:
    text = (Path(__file__).parent / "geneval_cases.yaml").read_text(encoding="utf-8")
    for task, captions in yaml.safe_load(text).items():
        for entry in captions if task in TASKS else ():
            for outcome in ("right", "wrong"):
                for why, found in entry.get(outcome, {}).items():
                    metadata = {"tag": task, **entry["caption"], "prompt": "a photo"}
                    yield pytest.param(metadata, found, outcome == "right", id=f"{task}-{outcome}-{why}")


CASES = list(_cases())


@pytest.mark.parametrize(("metadata", "found", "correct"), CASES)
def test_the_judge_agrees(metadata: dict[str, Any], found: list[list[Any]], correct: bool) -> None:
    detections = [Detection(cls, (x0, y0, x1, y1), score) for cls, x0, y0, x1, y1, score, *_ in found]

    def color_of(detection: Detection) -> str:
        (place,) = [i for i, given in enumerate(detections) if given is detection]  # the very object, not an equal one
        assert len(found[place]) == 7, "asked for the colour of an object that is not judged"
        return str(found[place][6])

    passed, why = judge(metadata, detections, color_of)
    assert passed is correct, why
    assert bool(why) is not correct


def test_there_are_enough_cases_of_each_task_and_outcome() -> None:
    counts = Counter((case.values[0]["tag"], case.values[2]) for case in CASES)
    for task in TASKS:
        assert counts[task, True] + counts[task, False] >= 20
        assert min(counts[task, True], counts[task, False]) >= 5
    assert len({case.id for case in CASES}) == len(CASES) == 193  # a name used twice would hide one


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((12, 0, 22, 10), {"left of"}),
        ((2, 0, 12, 10), set()),
        ((11, 11, 21, 21), {"left of", "above"}),
    ],
)
def test_the_relations_that_are_published(other: tuple[float, float, float, float], expected: set[str]) -> None:
    assert relations((0, 0, 10, 10), other) == expected
