"""Parsing: overrides anywhere, prompts that look like options, mistakes in one sentence."""

from pathlib import Path

import pytest

from rcm.artefact import UserError
from rcm.cli import one_line
from rcm.cli.parser import parse

DOWNLOAD = ["--name", "codec", "--out", "x.pth"]


@pytest.mark.parametrize("place", [0, 2, 4])
def test_overrides_may_stand_anywhere(place: int) -> None:
    words = ["experiment=tiny-clips", "seed=3"]
    parsed = parse("download", [*DOWNLOAD[:place], *words, *DOWNLOAD[place:]])
    assert (parsed.overrides, parsed.name, parsed.out) == (words, "codec", Path("x.pth"))


@pytest.mark.parametrize("prompt", ["-x", "--steps=3 of them", "--", "-", "", "a b", "--prompt", "=", "@file"])
def test_a_prompt_may_be_any_text(prompt: str) -> None:
    assert parse("generate", [f"--prompt={prompt}", "--out", "x.png"]).prompt == prompt
    if not prompt.startswith(("--prompt", "--steps=")):  # then it was forgotten
        assert parse("generate", ["--prompt", prompt, "--out", "x.png"]).prompt == prompt


@pytest.mark.parametrize(
    ("stage", "arguments", "said"),
    [
        ("download", ["--name", "codec"], "required: --out"),
        ("convert", ["--checkpoint", "c", "--out", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        ("download", [*DOWNLOAD, "seed"], "'seed' is neither an option nor a key=value"),
        ("download", [*DOWNLOAD, "--ouT", "y"], "unrecognized arguments: --ouT"),
        ("generate", ["--prompt", "--out", "x.png"], "--prompt"),
        ("generate", ["--prompt", "x", "--out", "x.png", "--steps", "four"], "'four' is no whole number"),
        ("generate", ["--prompt", "x", "--out", "x.png", "--seed", "-1"], "'-1' is no whole number"),
        ("generate", ["--prompt", "x", "--out", "x.png", "steps=4"], "unrecognized arguments: steps=4"),
        ("synthesize", ["--teacher", "t", "--prompts", "p", "--out", "o", "--shard", "5-of-4"], "'5-of-4' is no part"),
        ("measure", ["--samples", "s", "--out", "o", "--weights", "clip=x"], "with a NAME of detector, clip_large"),
        ("measure", ["--samples", "s", "--out", "o", "--weights", "dino"], "'dino' is no NAME=PATH"),
        ("measure", ["--samples", "s", "--out", "o", "--weights", "dino=x", "dino=y"], "dino stands there twice"),
    ],
)
def test_mistakes_are_one_sentence(stage: str, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(stage, arguments)
    assert said in str(caught.value) and f"rcm {stage} --help" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sample_is_of_a_checkpoint_or_a_control() -> None:
    rest = ["--codec", "c", "--prompts", "p", "--steps", "1", "--part", "1-of-1", "--out", "o"]
    with pytest.raises(UserError, match="one of the arguments --checkpoint --control is required"):
        parse("sample", rest)
    with pytest.raises(UserError, match="not allowed with argument"):
        parse("sample", [*rest, "--checkpoint", "x", "--control", "oracle"])
    assert parse("sample", [*rest, "--control", "oracle"]).checkpoint is None


def test_weights_are_named() -> None:
    rest = ["experiment=mini", "--samples", "a", "b", "--out", "o.jsonl"]
    given = parse("measure", [*rest, "--weights", "dino=some=place", "vgg=x.pth"])
    assert given.weights == {"dino": Path("some=place"), "vgg": Path("x.pth")}
    assert (given.samples, given.overrides) == ([Path("a"), Path("b")], ["experiment=mini"])
    assert parse("measure", rest).weights is None


def test_messages_are_one_line_and_not_endless() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    long = one_line("start " + "x" * 10_000 + " end")
    assert len(long) <= 1000 and long.startswith("start ") and long.endswith(" end")
