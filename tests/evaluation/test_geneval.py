"""GenEval's decision on cases worked out by hand."""

import pytest

from rcm.data import prompts
from rcm.evaluation.geneval import relations, summarise
from rcm.evaluation.geneval import judge as decide
from rcm.evaluation.shapes import ShapeDetection, color_of


def _at(cls: str, score: float = 0.95, x: float = 0.0, y: float = 0.0, color: str = "red") -> ShapeDetection:
    return ShapeDetection(cls, (x, y, x + 10, y + 10), score, color=color)


def judge(metadata, detections, color_of=color_of):
    return decide(metadata, detections, color_of)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((12, 0, 22, 10), {"left of"}),
        ((2, 0, 12, 10), set()),  # an offset of 2 is a tenth of both widths
        ((11, 11, 21, 21), {"left of", "above"}),
        ((-12, 0, -2, 10), {"right of"}),
        ((0, -30, 10, -20), {"below"}),
        ((0, 0, 10, 10), set()),
    ],
)
def test_relations(other: tuple[float, float, float, float], expected: set[str]) -> None:
    assert relations((0, 0, 10, 10), other) == expected


def test_single_object() -> None:
    caption = prompts.single_object("circle")
    assert judge(caption, [_at("circle", 0.31)]) == (True, "")
    assert not judge(caption, [_at("circle", 0.30)])[0]  # above, not at, the threshold
    assert not judge(caption, [_at("square")])[0]
    assert judge(caption, [_at("circle"), _at("circle", x=20), _at("square", x=40)])[0]  # others do no harm
    assert judge(caption, []) == (False, "expected circle >= 1, found 0")


def test_two_object() -> None:
    caption = prompts.two_object("circle", "square")
    assert judge(caption, [_at("square", 0.4), _at("circle", 0.4)])[0]
    assert not judge(caption, [_at("circle"), _at("circle", x=20)])[0]


def test_counting() -> None:
    caption = prompts.counting("circle", 2)
    two = [_at("circle", 0.91), _at("circle", 0.95, x=20)]
    assert judge(caption, two)[0]
    assert not judge(caption, two[:1])[0]
    assert not judge(caption, [*two, _at("circle", 0.92, x=40)])[0]  # three are too many
    assert judge(caption, [*two, _at("circle", 0.9, x=40)])[0]  # the third is not sure enough to count
    assert judge(caption, [*two, _at("square", x=40)])[0]
    assert not judge(caption, [two[1], _at("circle", 0.9, x=40)])[0]


def test_colors_are_those_of_the_most_confident_objects() -> None:
    caption = prompts.colors("circle", "red")
    assert judge(caption, [_at("circle", 0.9, color="red"), _at("circle", 0.8, x=20, color="blue")])[0]
    assert not judge(caption, [_at("circle", 0.8, color="red"), _at("circle", 0.9, x=20, color="blue")])[0]
    assert judge(caption, [_at("circle", color="blue")], color_of=lambda detection: "red")[0]


def test_position() -> None:
    caption = prompts.position("star", "left of", "cross")
    assert judge(caption, [_at("star", x=0), _at("cross", x=20)])[0]
    assert not judge(caption, [_at("star", x=20), _at("cross", x=0)])[0]
    assert not judge(caption, [_at("star", y=20), _at("cross", y=0)])[0]
    assert judge(caption, [_at("star", x=0, y=0), _at("cross", x=15, y=15)])[0]  # a diagonal is both
    passed, reason = judge(caption, [_at("star", x=0)])
    assert not passed
    assert "no object for star to be left of" in reason


def test_color_attr() -> None:
    caption = prompts.color_attr("star", "red", "cross", "blue")
    assert judge(caption, [_at("star", color="red"), _at("cross", x=20, color="blue")])[0]
    assert not judge(caption, [_at("star", color="blue"), _at("cross", x=20, color="red")])[0]


def test_at_most_sixteen_objects_of_a_class_are_looked_at() -> None:
    many = [_at("circle", x=20.0 * i) for i in range(20)]
    caption = {"tag": "counting", "include": [], "exclude": [{"class": "circle", "count": 17}]}
    assert judge(caption, many)[0]
    assert not judge({**caption, "exclude": [{"class": "circle", "count": 16}]}, many)[0]


def test_overall_is_the_mean_of_the_tasks() -> None:
    tags = ["single_object"] * 4 + ["counting"]
    scores = summarise(tags, [True, True, True, False, False])
    assert scores == {"single_object": 0.75, "counting": 0.0, "overall": 0.375}
