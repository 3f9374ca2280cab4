"""The stage `embed`: which prompts, what it says, what it refuses, and that nothing is done twice."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from rcm.artefact import read_json, sha256_file
from rcm.checkpoints import download, save_pth
from rcm.data.prompts import colors, to_jsonl
from rcm.text import Embeddings, build, tokenizer

from ..text.tiny import SIZES, tiny_encoder, write_tokenizer
from .conftest import Run

COLORS = ["red", "green", "blue"]
CAPTIONS = [colors("circle", color)["prompt"] for color in COLORS]
NEGATIVE = "teacher.negative_prompt=grey"
SMALL = [
    "inference.device=cpu",
    "inference.precision=float32",
    "network.text_width=16",
    *(f"text.{key}={value}" for key, value in SIZES.items()),
    "text.tokens=8",
]
T5 = ["experiment=cosmos-predict2-0.6b-images", *SMALL]
UMT5 = ["experiment=wan2.1-1.3b-clips", "synthesizer.text_width=16", *SMALL]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(to_jsonl([colors("circle", color) for color in [*COLORS, "red"]]))
    return path


@pytest.fixture
def t5(tmp_path: Path) -> list[object]:
    """Overrides and options of a tiny T5; its checkpoint holds a decoder too."""
    state = tiny_encoder("t5").state_dict()
    state |= {"decoder.block.0.x": torch.zeros(3), "lm_head.weight": torch.zeros(4)}
    save_pth(tmp_path / "t5.pth", state)
    return [*T5, "--encoder", tmp_path / "t5.pth", "--tokenizer", write_tokenizer(tmp_path / "tokenizer")]


def test_words_need_no_weights_and_are_encoded_as_the_encoder_does(prompts: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "text.safetensors"
    said = run("embed", NEGATIVE, "--prompts", prompts, "--out", out)
    read = Embeddings(out)
    assert read.prompts == [*CAPTIONS, "", "grey"]
    assert torch.equal(read.encode(read.prompts), build("words").encode(read.prompts))
    assert "embed: 5 prompts in " in said and "cut" not in said


def test_t5_and_a_part_of_the_prompts(prompts: Path, t5: list[object], run: Run, tmp_path: Path) -> None:
    out = tmp_path / "text.safetensors"
    said = run("embed", *t5, NEGATIVE, "--prompts", prompts, "--part", "2-of-2", "--out", out)
    read = Embeddings(out)
    assert read.prompts == [CAPTIONS[1], CAPTIONS[0], "", "grey"]
    encoder = tiny_encoder("t5", tokens=8)
    encoder.tokenizer = tokenizer(tmp_path / "tokenizer")
    torch.testing.assert_close(read.encode(read.prompts), encoder.encode(read.prompts), rtol=1e-5, atol=1e-6)
    assert f"longer than 8 tokens and cut: the prompt {CAPTIONS[1]!r}" in said
    assert read.cut([CAPTIONS[1], ""]) == [0]
    provenance = read_json(out.with_name("text.safetensors.prov.json"))
    assert {item["path"] for item in provenance["inputs"]} == {"prompts.jsonl", "t5.pth", "tokenizer"}


def test_umt5_and_the_negative_prompts_of_teacher_and_data(run: Run, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "text.safetensors"
    prompts.write_text("a  red &amp;amp; circle\n\nblur\n")
    encoder = tiny_encoder("umt5", tokens=8)
    encoder.tokenizer = tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    save_pth(tmp_path / "umt5.pth", encoder.state_dict())
    opened = ["--encoder", tmp_path / "umt5.pth", "--tokenizer", tmp_path / "tokenizer"]
    negative = ["teacher.negative_prompt=grey", "synthesis.negative_prompt=blur"]
    run("embed", *UMT5, *negative, "--prompts", prompts, *opened, "--out", out)
    read = Embeddings(out)
    assert read.prompts == ["a  red &amp;amp; circle", "blur", "", "grey"]
    expected = encoder.encode(["a red & circle", "blur", "", "grey"])
    torch.testing.assert_close(read.encode(read.prompts), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_stored_as_such_and_says_the_same_roughly(
    prompts: Path, t5: list[object], run: Run, tmp_path: Path
) -> None:
    exact, rounded = tmp_path / "exact.safetensors", tmp_path / "rounded.safetensors"
    run("embed", *t5, "--prompts", prompts, "--out", exact)
    run("embed", *t5, "inference.precision=bfloat16", "--prompts", prompts, "--out", rounded)
    one, other = (Embeddings(path).encode(CAPTIONS) for path in (exact, rounded))
    assert torch.equal(other, other.bfloat16().float())
    assert 1e-4 < (one - other).norm() / one.norm() < 3e-2
    assert exact.stat().st_size > rounded.stat().st_size


def test_nothing_is_done_twice_but_damage_and_changes_are_seen(
    prompts: Path, t5: list[object], run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "text.safetensors"
    stage = ["embed", *t5, "--prompts", prompts, "--out", out]
    again = f"{out} holds these prompts by this encoder already"
    assert again not in run(*stage)
    content, inode = out.read_bytes(), out.stat().st_ino
    assert again in run(*stage)
    assert out.stat().st_ino == inode
    out.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert again not in run(*stage)
    assert out.read_bytes() == content
    save_pth(tmp_path / "t5.pth", tiny_encoder("t5", seed=1).state_dict())
    assert again not in run(*stage)
    assert out.read_bytes() != content
    assert again not in run(*stage, "teacher.negative_prompt=blur")


def test_a_downloaded_encoder_is_verified_and_hashed_once(
    prompts: Path, t5: list[object], run: Run, fail: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hashed, downloading = list[str](), importlib.import_module("rcm.checkpoints.download")
    t5[t5.index(tmp_path / "t5.pth")] = encoder = tmp_path / "downloaded.pth"
    download(str(tmp_path / "t5.pth"), encoder)
    monkeypatch.setattr(downloading, "sha256_file", lambda path: (hashed.append(Path(path).name), sha256_file(path))[1])
    stage = ["embed", *t5, "--prompts", prompts, "--out", tmp_path / "text.safetensors"]
    run(*stage)
    assert hashed == ["downloaded.pth"]
    provenance = read_json(tmp_path / "text.safetensors.prov.json")
    assert sha256_file(encoder) in {item["sha256"] for item in provenance["inputs"]}
    save_pth(encoder, tiny_encoder("t5", seed=1).state_dict())
    assert "downloaded.pth has changed since it was downloaded" in fail(*stage)


def test_mistakes(prompts: Path, t5: list[object], fail: Run, tmp_path: Path) -> None:
    out = ["--prompts", prompts, "--out", tmp_path / "text.safetensors"]
    assert "needs its weights and its tokenizer: add --encoder" in fail("embed", *T5, *out)
    assert "add --tokenizer" in fail("embed", *t5[:-2], *out)
    assert "text encoder words has neither weights nor tokenizer: omit --encoder" in fail(
        "embed", *out, "--encoder", prompts
    )
    assert "4-of-3" in fail("embed", *out, "--part", "4-of-3")
    assert "t5.pth does not fit the T5Encoder" in fail("embed", *t5, NEGATIVE, "text.layers=3", "text.tokens=20", *out)
    assert "it belongs to another model" in fail("embed", *t5, "text.vocabulary=32128", *out)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({}))
    assert "tokenizer.json is damaged" in fail("embed", *t5, *out)
    assert "nowhere does not exist" in fail("embed", *t5[:-1], tmp_path / "nowhere", *out)
    assert not (tmp_path / "text.safetensors").exists()
