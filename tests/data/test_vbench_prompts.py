"""VBench's three files become one suite; what does not fit together is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from rcm.artefact import UserError
from rcm.data.vbench_prompts import vbench_prompts

NAMES = ["a still lake", "a red car", "The bund Shanghai, oil painting", "a cat", "The bund Shanghai, oil painting"]
LONG = ["A lake, mirror-like.", "A car, red.", "Thick brush strokes.", "A cat sits.", "The bund at night."]
INFO: list[dict[str, Any]] = [
    {"prompt_en": NAMES[0], "dimension": ["temporal_flickering"]},
    {"prompt_en": NAMES[1], "dimension": ["color"], "auxiliary_info": {"color": "red"}},
    {"prompt_en": NAMES[2], "dimension": ["appearance_style"], "auxiliary_info": {"appearance_style": "oil painting"}},
    {"prompt_en": NAMES[3], "dimension": ["object_class", "color"], "auxiliary_info": {"object": "cat"}},
    {"prompt_en": NAMES[4], "dimension": ["overall_consistency", "aesthetic_quality"]},
]


def files(folder: Path, names: list[str] = NAMES, long: list[str] = LONG, info: Any = INFO) -> tuple[Path, Path, Path]:
    made = folder / "long.txt", folder / "names.txt", folder / "info.json"
    for path, lines in zip(made, (long, names), strict=False):
        path.write_text("\n".join(lines), encoding="utf-8")
    made[2].write_text(json.dumps(info))
    return made


def test_a_suite(tmp_path: Path) -> None:
    assert vbench_prompts(*files(tmp_path), still_samples=25) == [
        {
            "prompt": "A lake, mirror-like.",
            "name": "a still lake",
            "dimension": ["temporal_flickering"],
            "auxiliary_info": {},
            "samples": 25,
        },
        {"prompt": "A car, red.", "name": "a red car", "dimension": ["color"], "auxiliary_info": {"color": "red"}},
        {
            "prompt": "Thick brush strokes.",
            "name": NAMES[2],
            "dimension": ["appearance_style", "overall_consistency", "aesthetic_quality"],
            "auxiliary_info": {"appearance_style": "oil painting"},
        },
        {
            "prompt": "A cat sits.",
            "name": "a cat",
            "dimension": ["object_class", "color"],
            "auxiliary_info": {"object": "cat"},
        },
    ]


def test_without_more_samples_and_without_dimensions(tmp_path: Path) -> None:
    source, names, info = files(tmp_path)
    assert "samples" not in vbench_prompts(source, names, info, still_samples=None)[0]
    plain = vbench_prompts(source, names, None, still_samples=25)
    assert plain == [{"prompt": text, "name": name} for text, name in zip(LONG[:4], NAMES[:4], strict=True)]


def test_the_official_numbers(tmp_path: Path) -> None:
    """946 lines, 944 prompts, 6,220 samples with 25 of each of the 75 for flicker: facts of the published files."""
    lines = [f"prompt {number}" for number in range(944)]
    lines[900:900], lines[940:940] = [lines[10]], [lines[11]]
    info = [{"prompt_en": line, "dimension": ["scene"]} for line in lines]
    for entry in info[100:175]:
        entry["dimension"] = ["temporal_flickering"]
    made = vbench_prompts(*files(tmp_path, lines, lines, info), still_samples=25)
    assert (len(lines), len(made)) == (946, 944)
    assert sum(item.get("samples", 5) for item in made) == 6220


def test_the_name_is_that_of_the_official_code(tmp_path: Path) -> None:
    info = [{**entry} for entry in INFO]
    info[3]["prompt_en"] = "a cat "
    assert vbench_prompts(*files(tmp_path, info=info), still_samples=None)[3]["name"] == "a cat "


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"names": NAMES[:4]}, r"names\.txt has 4 lines, but .*long\.txt has 5 prompts"),
        ({"long": LONG[:3]}, r"names\.txt has 5 lines, but .*long\.txt has 3 prompts"),
        ({"long": ["", *LONG[1:]]}, r"long\.txt has 4 prompts"),
        ({"info": INFO[:4]}, r"info\.json has 4 entries, but .*names\.txt has 5 lines"),
        (
            {"info": [INFO[1], INFO[0], *INFO[2:]]},
            r"info\.json, entry 1: the prompt is 'a red car', but .*still lake",
        ),
        ({"info": [{"prompt_en": "a still lake"}, *INFO[1:]]}, r"info\.json, entry 1: expected \{\"prompt_en\""),
        ({"info": [{**INFO[0], "dimension": "color"}, *INFO[1:]]}, r"info\.json, entry 1: expected"),
        ({"info": {"a": 1}}, r"info\.json is no list"),
        (
            {"info": [*INFO[:4], {**INFO[4], "auxiliary_info": {"appearance_style": "other"}}]},
            "'The bund Shanghai, oil painting' stands there twice, with different 'appearance_style'",
        ),
        ({"names": ["x/y", *NAMES[1:]], "info": [{**INFO[0], "prompt_en": "x/y"}, *INFO[1:]]}, "line 1: .*a slash"),
        (
            {"names": ["x" * 249, *NAMES[1:]], "info": [{**INFO[0], "prompt_en": "x" * 249}, *INFO[1:]]},
            r"names\.txt, line 1: no file can be called NAME-24\.mp4, for it has 256 bytes",
        ),
    ],
)
def test_mistakes(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        vbench_prompts(*files(tmp_path, **changed), still_samples=25)


def test_the_longest_name_fits(tmp_path: Path) -> None:
    names = ["x" * 248, *NAMES[1:]]
    info = [{**INFO[0], "prompt_en": names[0]}, *INFO[1:]]
    assert vbench_prompts(*files(tmp_path, names, LONG, info), still_samples=None)[0]["name"] == names[0]
    (tmp_path / f"{names[0]}-24.mp4").touch()
