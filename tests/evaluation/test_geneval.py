"""GenEval's decision: relations, reasons and the summary; test_geneval_cases.py has the decisions themselves."""

import numpy as np
import pytest

from rcm.data import prompts
from rcm.evaluation.geneval import Detection, judge, relations, summarise


def _at(cls: str, score: float = 0.95, x: float = 0.0, y: float = 0.0) -> Detection:
    return Detection(cls, (x, y, x + 10, y + 10), score)


def _red(detection: Detection) -> str:
    return "red"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((-12, 0, -2, 10), {"right of"}),
        ((0, -30, 10, -20), {"below"}),
        ((0, 30, 10, 40), {"above"}),
        ((-20, 20, -10, 30), {"right of", "above"}),
        ((0, 0, 10, 10), set()),
        ((4, 0, 14, 10), set()),  # (4 - 2) / 4 is at, not beyond, a half
    ],
)
def test_relations(other: tuple[float, float, float, float], expected: set[str]) -> None:
    assert relations((0, 0, 10, 10), other) == expected


def test_reasons_say_what_was_expected_and_found() -> None:
    assert judge(prompts.single_object("dog"), [_at("dog")], _red) == (True, "")
    assert judge(prompts.single_object("dog"), [], _red) == (False, "expected dog >= 1, found 0")
    three = [_at("dog", x=20.0 * k) for k in range(3)]
    assert judge(prompts.counting("dog", 2), three, _red)[1] == "expected dog < 3, found 3"
    assert judge(prompts.colors("dog", "blue"), three, _red)[1] == "expected blue dog >= 1, found red"
    beside = prompts.position("dog", "left of", "cat")
    assert judge(beside, [_at("dog")], _red)[1].endswith("no object for dog to be left of")
    assert (
        judge(beside, [_at("cat"), _at("dog", x=20)], _red)[1] == "expected dog left of target, found right of target"
    )
    both = judge(prompts.color_attr("dog", "blue", "cat", "green"), [_at("dog"), _at("cat")], _red)[1]
    assert both.splitlines() == ["expected blue dog >= 1, found red", "expected green cat >= 1, found red"]


def test_colours_are_asked_of_the_very_objects_that_were_given() -> None:
    twins = [_at("dog", 0.8), _at("dog", 0.9), _at("dog", 0.9), _at("dog", 0.2), _at("cat", 0.99)]
    asked = []

    def color_of(detection: Detection) -> str:
        asked.append(detection)
        return "red"

    caption = {"tag": "colors", "include": [{"class": "dog", "count": 2, "color": "red"}], "prompt": "two red dogs"}
    assert judge(caption, twins, color_of)[0]
    assert [next(i for i, given in enumerate(twins) if given is seen) for seen in asked] == [1, 2]


def test_overall_is_the_mean_of_the_tasks() -> None:
    tags = ["single_object"] * 4 + ["counting"]
    scores = summarise(tags, [True, True, True, False, False])
    assert scores == {"single_object": 0.75, "counting": 0.0, "overall": 0.375}
    for wrong, said in ((["texture"], "texture"), ([], "none")):
        with pytest.raises(ValueError, match=rf"expected tags among single_object, .*; got {said}"):
            summarise(wrong, [True] * len(wrong))


def test_detections_compare_and_captions_may_leave_keys_out() -> None:
    masks = [np.zeros((2, 2), bool), np.ones((2, 2), bool)]
    one, other = (Detection("dog", (0, 0, 2, 2), 0.9, mask) for mask in masks)
    assert one == other and len({one, other, _at("dog")}) == 2
    assert judge({"include": [{"class": "dog", "count": 1}], "exclude": None}, [one], _red) == (True, "")
