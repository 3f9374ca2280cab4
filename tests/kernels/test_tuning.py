"""Which tile a call takes: forced, measured on this card, or shipped; and the file of measured ones."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flash_jvp import compiled, sweep, tuning
from flash_jvp.sweep import Shape
from flash_jvp.tuning import Tile

CARD = torch.device("cuda", 0)
MEASURED = Tile(16, 128, 2, 5)  # shipped nowhere


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A card with a name, and its file."""
    pytest.importorskip("triton", reason="Triton is not installed: its version is part of the file's name")
    monkeypatch.setenv("FLASH_JVP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fictional 1/2 GB")
    tuning._measured.cache_clear()
    tuning._chosen.cache_clear()
    tuning._fastest.cache_clear()
    yield tuning.cache_file(CARD)
    tuning._measured.cache_clear()
    tuning._chosen.cache_clear()
    tuning._fastest.cache_clear()


def chosen(kernel: str = "forward_jvp", queries: int = 32760, d: int = 128) -> Tile:
    return tuning._chosen(kernel, 90, CARD, 2, d, queries, queries)


def test_the_file_is_named_after_card_and_triton(card: Path) -> None:
    import triton

    assert card.name == f"NVIDIA-Fictional-1-2-GB-triton-{triton.__version__}.json"


def test_measured_tiles_are_taken_for_all_lengths_of_their_bucket_and_no_others(card: Path) -> None:
    before = chosen()
    assert before == tuning.shipped("forward_jvp", 90, 2, 128)
    tuning.save(card, {tuning.cache_key("forward_jvp", 2, 128, 32760, 32760): MEASURED})
    assert chosen() == MEASURED
    assert chosen(queries=20000) == MEASURED
    assert before == chosen(queries=32769) == chosen(queries=16384)
    assert chosen(d=64) == tuning.shipped("forward_jvp", 90, 2, 64)
    assert chosen("forward") == tuning.shipped("forward", 90, 2, 128)


def test_the_measured_backward_is_taken_for_its_bucket(card: Path) -> None:
    q = torch.empty(1, 1, 4000, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 1, 500, 64, dtype=torch.bfloat16, device="meta")
    key = tuning.cache_key("backward", 2, 64, 4096, 512)
    tuning.save(card, {key: "cudnn", tuning.cache_key("forward", 2, 64, 4096, 512): MEASURED})
    assert tuning._fastest(CARD, key) == "cudnn"
    assert chosen("forward", 4096, 64) != MEASURED  # its keys are 4,096, not 512
    assert tuning._fastest(CARD, tuning.cache_key("backward", 2, 128, 4096, 512)) is None
    assert tuning.backward(q, k) is None  # not on a card


def test_a_second_sweep_keeps_what_the_first_one_measured(card: Path) -> None:
    tuning.save(card, {tuning.cache_key("forward", 2, 64, 4096, 4096): MEASURED})
    tuning.save(card, {tuning.cache_key("forward", 2, 128, 4096, 4096): MEASURED})
    assert chosen("forward", 4080, 64) == chosen("forward", 4080, 128) == MEASURED
    assert [path.name for path in card.parent.iterdir()] == [card.name]  # no temporary file is left


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": [1]}', '{"a": 3}', '{"a": ["x", 1, 1, 1]}'])
def test_a_broken_file_is_named_and_not_used(card: Path, text: str) -> None:
    card.parent.mkdir()
    card.write_text(text)
    with pytest.warns(UserWarning, match=card.name):
        assert chosen() == tuning.shipped("forward_jvp", 90, 2, 128)


def test_a_forced_tile_goes_first_and_ends_with_its_block() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    q = torch.empty(1, 1, 8, 16)
    with tuning.forced("forward", MEASURED):
        with tuning.forced("forward", Tile(16, 16, 4, 1)):
            assert tuning.tile("forward", q, q) == Tile(16, 16, 4, 1)
        assert tuning.tile("forward", q, q) == MEASURED
    assert not tuning._forced


def test_the_tables_are_complete() -> None:
    """Every card and kernel has its tiles, and no tile has a side that the tensor cores cannot take."""
    assert set(tuning.TILES_16) == {*tuning.FAMILIES.values(), "small"}
    for table in tuning.TILES_16.values():
        assert set(table) == set(tuning.KERNELS)
    tables = [tiles for table in tuning.TILES_16.values() for tiles in table.values()]
    for tile in itertools.chain(*tables, tuning.TILES_32):
        assert all(n >= 16 and n.bit_count() == 1 for n in (tile.block_m, tile.block_n))
    assert set(tuning.FAMILIES) <= set(compiled.SHARED_KIB)
    small = {arch for arch, kib in compiled.SHARED_KIB.items() if kib < 160}
    assert small == set(compiled.SHARED_KIB) - set(tuning.FAMILIES)


def test_the_sweep_tries_the_shipped_tile_first_and_each_once() -> None:
    for kernel, size, d in itertools.product(tuning.KERNELS, (2, 4), (64, 128, 256)):
        usual = tuning.shipped(kernel, 90, size, d)
        tiles = sweep.candidates(kernel, usual)
        assert tiles[0] == usual
        assert len(set(tiles)) == len(tiles) > 10


def test_shapes_are_read_as_they_are_printed() -> None:
    assert Shape.parse("1,12,32760,128") == Shape(1, 12, 32760, 32760, 128)
    assert Shape.parse("1,12,32760,512,128") == Shape(1, 12, 32760, 512, 128)
    assert Shape.parse(str(Shape(1, 2, 3, 4, 5))) == Shape(1, 2, 3, 4, 5)
    for text in ("1,2,3", "1,2,3,4,5,6", "1,2,0,4", "a"):
        with pytest.raises(ValueError, match=r".*"):
            Shape.parse(text)


def test_reference_rows_are_those_of_the_whole() -> None:
    q, k, v, tq, _, tv = sweep._sample(Shape(1, 2, 9, 7, 16), torch.float32, torch.device("cpu"))
    rows = torch.tensor([0, 8])
    o, to = sweep._rows_in_float64(q[:, :, rows], k, v, [tq[:, :, rows], None, tv], 0.25)
    s = (q @ k.mT / 4).double()
    p = s.softmax(-1)
    h = p * (tq @ k.mT / 4).double()
    expected = p @ tv.double() + (h - p * h.sum(-1, keepdim=True)) @ v.double()
    assert torch.allclose(o, (p @ v.double())[:, :, rows], atol=1e-6)
    assert torch.allclose(to, expected[:, :, rows], atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_sweep_says_so() -> None:
    command = [sys.executable, "-m", "flash_jvp.sweep"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "flash_jvp.sweep: no CUDA device is visible; tiles can only be measured on one\n"
