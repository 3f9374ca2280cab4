"""The T5 encoders: official names, loading, tokens, cleaning, and prompts that people type."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from rcm.artefact import UserError
from rcm.text import T5Encoder, WordEncoder, build, clean, tokenizer

from .tiny import END, SIZES, tiny_encoder, write_tokenizer

KINDS = ["umt5", "t5"]


@pytest.fixture
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> T5Encoder:
    made = tiny_encoder(getattr(request, "param", "umt5"))
    made.tokenizer = tokenizer(write_tokenizer(tmp_path))
    return made


def by_kind(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("encoder", KINDS, indirect=True)(test)


# --- Names ---------------------------------------------------------------------------------------------------------


def test_umt5_has_the_names_and_shapes_of_the_official_checkpoint() -> None:
    """official/: the public model definition, built on the meta device; `blocks.*` stands for every block."""
    facts = json.loads((Path(__file__).parent / "official" / "umt5-xxl-encoder.json").read_text())
    official = {
        name.replace("*", str(block)): shape
        for name, shape in facts["tensors"].items()
        for block in range(facts["blocks"] if "*" in name else 1)
    }
    with torch.device("meta"):
        encoder = build("umt5-xxl-encoder")
    assert {name: list(value.shape) for name, value in encoder.state_dict().items()} == official
    assert sum(parameter.numel() for parameter in encoder.parameters()) == facts["parameters"] == 5_680_910_336


def test_t5_has_the_names_of_the_file_on_the_hub_but_for_its_decoder() -> None:
    sizes = {"d_model": 1024, "d_ff": 65536, "num_heads": 128, "d_kv": 128, "num_layers": 24, "vocab_size": 32128}
    with torch.device("meta"):
        encoder = build("t5-11b-encoder")
        whole = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).state_dict()
    kept = {name: value.shape for name, value in whole.items() if not name.startswith(encoder.ignored_prefixes)}
    assert {name: value.shape for name, value in encoder.state_dict().items()} == kept
    assert sum(value.numel() for value in encoder.state_dict().values()) == 4_864_791_552


# --- Loading -------------------------------------------------------------------------------------------------------


@by_kind
def test_a_state_returns_as_it_was_loaded_and_nothing_else_is_accepted(encoder: T5Encoder) -> None:
    state = {name: torch.randn_like(value) for name, value in encoder.state_dict().items()}
    encoder.load_state_dict(state)
    assert list(encoder.state_dict()) == list(state)
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in state.items())
    name = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing"):
        encoder.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match="Unexpected"):
        encoder.load_state_dict({**state, f"stack.{encoder.names[name]}x": state[name]})


@by_kind
def test_filled_tensor_by_tensor_from_the_meta_device(encoder: T5Encoder) -> None:
    with torch.device("meta"):
        other = build({"kind": encoder.kind, **SIZES})
    assert all(value.is_meta for value in other.state_dict().values())
    other.to_empty(device="cpu")
    given = encoder.state_dict()
    for name, value in other.state_dict().items():
        value.copy_(given[name])
    other.tokenizer = encoder.tokenizer
    assert torch.equal(other.encode(["a red circle"]), encoder.encode(["a red circle"]))


# --- Encoding ------------------------------------------------------------------------------------------------------


@by_kind
def test_a_prompt_has_the_same_encoding_alone_and_beside_others(encoder: T5Encoder) -> None:
    prompts = ["a red circle", "", "fox", "the quick brown fox jumps"]
    together = encoder.encode(prompts)
    assert together.shape == (4, 12, 16) and together.dtype == torch.float32
    for prompt, row in zip(prompts, together, strict=True):
        torch.testing.assert_close(encoder.encode([prompt])[0], row, rtol=1e-5, atol=1e-6)
    lengths = [len(ids) for ids in encoder.token_ids(prompts)]
    assert [int(row.any(dim=1).sum()) for row in together[:3]] == lengths[:3] == [4, 1, 5]
    assert encoder.encode([]).shape == (0, 12, 16)


@by_kind
def test_tokens_are_those_of_transformers_and_of_a_long_prompt_the_first_ones(
    encoder: T5Encoder, tmp_path: Path
) -> None:
    """The originals pad and truncate to the longest length with transformers' tokenizer."""
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>")
    prompts = ["a red circle, blue", "", "fox & cat", "circle " * 30, "ab" * 7]
    padded = reference(prompts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder.stack(**{key: padded[key] for key in ("input_ids", "attention_mask")}).last_hidden_state
    expected = hidden * padded["attention_mask"][..., None]
    torch.testing.assert_close(encoder.encode(prompts), expected, rtol=1e-5, atol=1e-6)
    assert encoder.cut(prompts) == [3, 4]
    assert encoder.token_ids([""]) == [[END]]


def test_eleven_tokens_and_an_end_fit_and_twelve_do_not(encoder: T5Encoder) -> None:
    assert encoder.cut(["circle " * 11, "circle " * 12]) == [1]


def test_bfloat16_is_computed_in_bfloat16_and_float16_is_refused(encoder: T5Encoder) -> None:
    exact = encoder.encode(["a red circle"])
    rounded = encoder.bfloat16().encode(["a red circle"])
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 3e-2
    with pytest.raises(ValueError, match="float16"):
        encoder.half().encode(["a"])


@by_kind
def test_prompts_that_people_type(encoder: T5Encoder) -> None:
    hostile = ["🟥" * 3, "a/b\\c", "line\nbreak", "-rf --help", "x" * 10_000, "كلب أحمر", "\x00", "red " * 5_000, "​"]
    tokens = encoder.encode(hostile)
    assert tokens.shape == (len(hostile), 12, 16)
    assert tokens.isfinite().all()
    assert all(row.any() for row in tokens)


# --- Cleaning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("  a \n red\t\tcircle ", "a red circle"),
        ("fish &amp;amp; chips", "fish & chips"),  # escaped twice
        ("a cafÃ© in the rain", "a café in the rain"),  # UTF-8 read as Latin-1
        ("“quoted”", '"quoted"'),
        ("ｆｕｌｌ　ｗｉｄｔｈ，", "full width,"),
        ("a\u00a0b\u2003c", "a b c"),
        ("e\u0301", "é"),
        ("🟥 red", "🟥 red"),
        ("&lt;b&gt;", "<b>"),
        (" ", ""),
        ("", ""),
    ],
)
def test_clean(typed: str, meant: str) -> None:
    assert clean(typed) == meant


def test_wan_cleans_its_prompts_and_cosmos_does_not(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    umt5, t5 = map(tiny_encoder, KINDS)
    umt5.tokenizer = t5.tokenizer = tokenizer(folder)
    assert umt5.token_ids(["&amp;"]) == t5.token_ids(["&"]) != t5.token_ids(["&amp;"])


# --- Mistakes ------------------------------------------------------------------------------------------------------


def test_a_missing_or_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        tokenizer(tmp_path / "nowhere")
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        tokenizer(tmp_path)


def test_no_tokenizer_and_that_of_another_model(tmp_path: Path) -> None:
    encoder = tiny_encoder("t5")
    with pytest.raises(ValueError, match="no tokenizer"):
        encoder.encode(["a"])
    for vocabulary in (32, 32128):  # too few rows, and so many that the tokens must be others
        encoder = tiny_encoder("t5", vocabulary=vocabulary)
        encoder.tokenizer = tokenizer(write_tokenizer(tmp_path))
        with pytest.raises(UserError, match=rf"36 tokens, the t5 encoder {vocabulary}: .* another model"):
            encoder.cut(["a"])


@pytest.mark.parametrize(
    ("package", "needs"),
    [("transformers", lambda _: tiny_encoder("t5")), ("ftfy", lambda _: clean("a")), ("tokenizers", tokenizer)],
)
def test_a_missing_package_is_named(
    package: str, needs: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install -e \.\[models\]"):
        needs(tmp_path)


def test_names_and_kinds() -> None:
    assert isinstance(build("words"), WordEncoder)
    with pytest.raises(
        ValueError, match="unknown text 'clip': expected one of t5-11b-encoder, umt5-xxl-encoder, words"
    ):
        build("clip")
