"""Small text: character error rates by hand, RapidOCR on rendered words, scores from stored rows."""

import functools
import sys
import time
import types
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from rcm.artefact import UserError
from rcm.data.text_prompts import TEXTS, text_prompts
from rcm.evaluation import small_text
from rcm.evaluation.measured import Measured, read_measured, write_measured
from rcm.evaluation.samples import Expected, PromptSamples, list_samples
from rcm.evaluation.small_text import error_rate, evaluation, levenshtein, measure, plain, read, reading_order


@functools.cache
def by_definition(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(by_definition(a[1:], b[1:]) + (a[0] != b[0]), by_definition(a[1:], b) + 1, by_definition(a, b[1:]) + 1)


def test_levenshteins_distance() -> None:
    known = {
        ("kitten", "sitting"): 3,
        ("flaw", "lawn"): 2,
        ("intention", "execution"): 5,
        ("", "abc"): 3,
        ("a", "a"): 0,
    }
    for (a, b), distance in known.items():
        assert levenshtein(a, b) == levenshtein(b, a) == distance
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(2))
        assert levenshtein(a, b) == by_definition(a, b)


def test_what_is_compared() -> None:
    assert plain(" Open\n\tLATE ") == "open late"
    assert plain("ＯＰＥＮ\u3000１１：４４") == "open 11:44"  # wide forms
    assert plain("ﬁne Straße") == "fine strasse"


@pytest.mark.parametrize(
    ("wanted", "lines", "rate"),
    [
        ("OPEN LATE", ["open late"], 0),
        ("OPEN LATE", ["OPEN", "LATE"], 0),
        ("OPEN LATE", ["OPEN LATF"], 1 / 9),
        ("OPEN LATE", ["OPENLATE"], 1 / 9),
        ("OPEN LATE", ["OPNE LATE"], 2 / 9),
        ("OPEN LATE", ["PIZZA", "OPEN LATE", "Main Street"], 0),  # other writing does not count
        ("OPEN LATE", ["PIZZA", "OPEN", "LATE", "Main Street"], 0),
        ("OPEN LATE", ["OPEN", "PIZZA", "LATE"], 5 / 9),  # either word alone is nearer than all
        ("OPEN LATE", ["late", "open"], 5 / 9),  # order counts
        ("EXIT", [], 1),
        ("EXIT", ["completely other words"], 1),  # never more
        ("EXIT", ["E", "X", "I", "T"], 3 / 4),  # blanks between lines: E X or X I as near as one letter
    ],
)
def test_error_rate_by_hand(wanted: str, lines: list[str], rate: float) -> None:
    assert error_rate(wanted, lines) == pytest.approx(rate)


def test_much_writing_is_compared_soon() -> None:
    """A page of 300 lines has 45,000 runs; but for the shortest, none can be the nearest."""
    start = time.perf_counter()
    assert error_rate("OPEN LATE", [*["the quick brown fox jumps over the lazy dog"] * 299, "open late"]) == 0
    assert time.perf_counter() - start < 10


def test_the_reader_is_given_blue_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    nothing = types.SimpleNamespace(txts=None, boxes=None)
    monkeypatch.setattr(small_text, "_reader", lambda: lambda image: seen.append(image) or nothing)
    image = np.zeros((2, 3, 3), np.uint8)
    image[..., 0] = 200  # red
    assert read(image) == []
    assert seen[0][..., 2].min() == 200 and not seen[0][..., :2].any()


def test_reading_order() -> None:
    found = [
        ((200.0, 12.0, 300.0, 42.0), "LATE"),
        ((10.0, 100.0, 90.0, 130.0), "below"),
        ((100.0, 10.0, 190.0, 40.0), "OPEN"),
        ((250.0, 95.0, 320.0, 160.0), "right"),
        ((0.0, 0.0, 40.0, 9.0), "above"),
    ]
    assert reading_order(found) == ["above", "OPEN", "LATE", "below", "right"]
    assert reading_order([((0.0, 0.0, 10.0, 100.0), "tall"), ((20.0, 0.0, 60.0, 10.0), "small")]) == ["small", "tall"]


def lettering(text: str = "", width: int = 256, height: int = 240, size: int = 34) -> np.ndarray:
    """A sign with a line in an ordinary font."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
    image = Image.new("RGB", (width, height), "#dcd4c8")
    ImageDraw.Draw(image).text((width // 10, height // 3), text, fill="#173054", font=font)
    return np.asarray(image)


def write(folder: Path, prompt: int, text: str, pictures: list[list[np.ndarray]]) -> None:
    (folder / f"{prompt:05d}/samples").mkdir(parents=True)
    (folder / f"{prompt:05d}/metadata.jsonl").write_text(f'{{"prompt": "a sign that says {text}", "text": "{text}"}}\n')
    for number, frames in enumerate(pictures):
        first, *others = map(Image.fromarray, frames)
        first.save(folder / f"{prompt:05d}/samples/{number:04d}.png", save_all=True, append_images=others)


def test_rendered_words_are_read_and_wrong_ones_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    blank, late = lettering(), lettering("OPEN LATE")
    write(tmp_path, 0, "OPEN LATE", [[late], [blank]])
    write(tmp_path, 4, "OPEN DATE", [[blank, blank, late, blank]])  # the middle frame
    told: list[int] = []
    rows = list(measure(list_samples([tmp_path]), told.append))
    assert {row["wanted"] for row in rows[:2]} == {"OPEN LATE"}
    assert (rows[2]["prompt"], rows[2]["wanted"]) == (4, "OPEN DATE")
    assert [(row["filename"], row["read"], row["cer"]) for row in rows] == [
        ("00000/samples/0000.png", "OPEN LATE", 0),
        ("00000/samples/0001.png", "", 1),
        ("00004/samples/0000.png", "OPEN LATE", pytest.approx(1 / 9)),
    ]
    assert told == [1, 1, 1]
    with pytest.raises(UserError, match=r"00004/samples/0000\.png has 4 frames, expected 1"):
        list(measure(list_samples([tmp_path]), frames=1))
    assert capfd.readouterr() == ("", "")  # the reader is quiet


@pytest.mark.slow
def test_every_text_of_the_suite_is_read_back_without_a_mistake() -> None:
    """The oracle control: what the rate says of a perfect model."""
    rates = {text: error_rate(text, read(lettering(text, 832, 480, 48))) for text in TEXTS}
    assert not {text: rate for text, rate in rates.items() if rate}


def test_who_read_is_known() -> None:
    by = small_text.by()
    assert by["name"] == "Small text (RapidOCR)"
    assert len(by["models"]) == 2  # one finds lines, one reads them
    assert all(len(digest) == 64 for digest in by["models"].values())
    assert list(by["versions"]) == ["rapidocr", "onnxruntime"]


def test_without_rapidocr_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"RapidOCR .*`pip install -e \.\[scoring\]`"):
        small_text.by()


def test_samples_without_a_text_are_refused(tmp_path: Path) -> None:
    for metadata in ({"prompt": "a cat"}, {"prompt": "a cat", "text": " "}, {"prompt": "a cat", "text": 7}):
        item = PromptSamples(0, metadata, (tmp_path / "00000/samples/0000.png",))
        with pytest.raises(UserError, match=r"00000/metadata\.jsonl names no text .* expected samples of suite=text"):
            list(measure([item]))


# --- Scores --------------------------------------------------------------------------------------------------------

PROMPTS = text_prompts(5, 3)
HEADER: dict[str, Any] = {
    "measured": "text",
    "by": {"name": small_text.NAME, "models": {"det": "a", "rec": "b"}, "device": "cpu", "versions": {"rapidocr": "3"}},
    "known": None,
    "sampling": {"steps": 4, "sigma_max": 80.0},
}


def row(prompt: int, number: int, cer: float) -> dict[str, Any]:
    name = f"{prompt:05d}/samples/{number:04d}.png"
    return {"prompt": prompt, "filename": name, "wanted": PROMPTS[prompt]["text"], "read": "", "cer": cer}


def scored(rows: list[dict[str, Any]], folder: Path, **options: Any) -> Any:
    write_measured(folder / "text.jsonl", HEADER, rows)
    measured = read_measured([folder / "text.jsonl"], "text")
    return evaluation(measured, model="rcm-0", steps=4, media="images", resamples=400, **options)


def test_scores_are_means_over_prompts(tmp_path: Path) -> None:
    cers = [(0.0, 0.5), (0.0, 0.0), (1.0, 0.25)]
    rows = [row(prompt, number, cer) for prompt, pair in enumerate(cers) for number, cer in enumerate(pair)]
    found = scored(rows, tmp_path, expected=Expected(PROMPTS, 2), paper="2B", prompts_file="text.jsonl")
    scores = found.scores
    assert scores["per_prompt"] == {
        "tag": ["text"] * 3,
        "text.cer": [0.25, 0.0, 0.625],
        "text.exact": [0.5, 1.0, 0.0],
    }
    cer, exact = scores["metrics"]["text.cer"], scores["metrics"]["text.exact"]
    assert (cer["value"], exact["value"]) == pytest.approx((0.875 / 3, 0.5))
    assert 0 <= cer["low"] < cer["value"] < cer["high"] <= 0.625
    assert (cer["n_prompts"], cer["kind"]) == (3, "analogue")
    assert (scores["model"], scores["steps"], scores["n_prompts"], scores["n_samples"]) == ("rcm-0", 4, 3, 6)
    evaluator = scores["evaluator"]
    assert (evaluator["name"], evaluator["paper"], evaluator["missing"]) == ("Small text (RapidOCR)", "2B", [])
    assert (evaluator["models"], evaluator["sampling"]) == (HEADER["by"]["models"], HEADER["sampling"])
    assert [line["correct"] for line in found.results] == [True, False, True, True, False, False]


def test_missing_samples_are_refused_unless_allowed(tmp_path: Path) -> None:
    rows = [row(0, 0, 0.0), row(0, 1, 0.0), row(2, 1, 1.0)]
    expected = Expected(PROMPTS, 2)
    with pytest.raises(UserError, match=r"3 of 6 samples are missing, the first 00001/samples/0000"):
        scored(rows, tmp_path, expected=expected)
    found = scored(rows, tmp_path, expected=expected, allow_missing=True).scores
    assert found["evaluator"]["missing"] == [
        f"0000{name}.png" for name in ("1/samples/0000", "1/samples/0001", "2/samples/0000")
    ]
    assert found["metrics"]["text.cer"]["value"] == 0.5
    assert found["per_prompt"]["text.cer"] == [0.0, None, 1.0]  # prompts keep their places
    assert (found["n_prompts"], found["metrics"]["text.exact"]["n_prompts"]) == (2, 2)
    for few in ([*rows[:2], row(1, 0, 0.0)], [*rows[:1], row(2, 0, 1.0)]):
        with pytest.raises(UserError, match=r"1 of [34] samples are missing, the first 00001/"):
            scored(few, tmp_path)
    with pytest.raises(UserError, match="holds no samples"):
        evaluation(Measured(HEADER, []), model="rcm-0", steps=4, media="images")


def test_samples_of_other_prompts_are_refused(tmp_path: Path) -> None:
    other = {**row(1, 0, 0.0), "wanted": "SOMETHING ELSE"}
    with pytest.raises(UserError, match=r"00001/samples/0000\.png: 'SOMETHING ELSE' was looked for, but"):
        scored([row(0, 0, 0.0), other, row(2, 0, 0.0)], tmp_path, expected=Expected(PROMPTS, 1))
