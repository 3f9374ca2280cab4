"""Embeddings in a file: what comes back, how it is found, and what damage says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rcm.artefact import UserError
from rcm.text import Embeddings

PROMPTS = ["a red circle", "", 'he said "é🟥"\n', "long"]
ENCODER = {"text": {"kind": "t5"}, "weights_sha256": "00"}


def rows(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Encodings of 5, 1, 3 and 8 tokens of 4 features, padded to 8."""
    torch.manual_seed(0)
    full = torch.randn(4, 8, 4).to(dtype)
    for row, length in zip(full, (5, 1, 3, 8), strict=True):
        row[length:] = 0
    return list(full)


def written(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    Embeddings.write(path, PROMPTS, rows(dtype), tokens=8, encoder=ENCODER, cut=[3])
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_come_back_bit_by_bit_in_any_order(dtype: torch.dtype, tmp_path: Path) -> None:
    read = Embeddings(written(tmp_path / "text.safetensors", dtype))
    assert (read.tokens, read.width, read.prompts, read.encoder) == (8, 4, PROMPTS, ENCODER)
    order = [2, 0, 0, 3, 1]
    encoded = read.encode([PROMPTS[number] for number in order])
    assert encoded.dtype == torch.float32
    assert torch.equal(encoded, torch.stack([rows(dtype)[number].float() for number in order]))
    assert read.cut([PROMPTS[number] for number in order]) == [3]
    read.verify()


def test_no_padding_is_stored_and_equal_embeddings_are_equal_bytes(tmp_path: Path) -> None:
    one, other = written(tmp_path / "one.safetensors"), tmp_path / "other.safetensors"
    Embeddings.write(other, PROMPTS, (row[:8] for row in rows()), tokens=8, encoder=ENCODER, cut=(3,))
    assert one.read_bytes() == other.read_bytes()
    with safe_open(one, framework="pt") as file:
        assert [len(file.get_tensor(name)) for name in sorted(file.keys())] == [5, 1, 3, 8]


def test_a_prompt_that_is_not_there_is_quoted(tmp_path: Path) -> None:
    read = Embeddings(written(tmp_path / "text.safetensors"))
    with pytest.raises(UserError, match=r"no embedding of the prompt 'A red circle'; make it with `rcm embed`"):
        read.encode(["a red circle", "A red circle"])


def test_each_prompt_once() -> None:
    with pytest.raises(ValueError, match="2 prompts, but only 1 different ones"):
        Embeddings.write("unused", ["a", "a"], rows()[:2], tokens=8, encoder={})


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "text.safetensors")
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"text\.safetensors is damaged"):
            Embeddings(path).verify()


def test_damage_of_one_prompt_leaves_the_others(tmp_path: Path) -> None:
    path = written(tmp_path / "text.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last one, "long"
    path.write_bytes(content)
    read = Embeddings(path)
    assert torch.equal(read.encode(PROMPTS[:3]), torch.stack(rows()[:3]))
    with pytest.raises(UserError, match=r"damaged .*'long' does not match its checksum"):
        read.encode(["long"])


def test_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not exist; make them with `rcm embed`"):
        Embeddings(tmp_path / "nothing.safetensors")
    for name, metadata in (("none", None), ("other", {"rcm": json.dumps({"metadata": {}, "sha256": "0"})})):
        save_file({"x": torch.zeros(2)}, tmp_path / name, metadata=metadata)
        with pytest.raises(UserError, match="holds no embeddings"):
            Embeddings(tmp_path / name)
    (tmp_path / "short").write_bytes(written(tmp_path / "text.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        Embeddings(tmp_path / "short")
