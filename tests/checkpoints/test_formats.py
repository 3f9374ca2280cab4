"""`.pth`, DCP and safetensors: bit-exact round trips, equal bytes for equal states, damage named, nothing unpickled."""

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from rcm.artefact import UserError, content_sha256, read_json, sha256_file, sha256_folder, write_json
from rcm.checkpoints import (
    State,
    export_safetensors,
    lazy,
    load_dcp,
    load_into,
    load_pth,
    open_dcp,
    read_export,
    save_dcp,
    save_pth,
    state_sha256,
)
from rcm.checkpoints.safe import write_safetensors

METADATA = {"sampler": {"times": [1.1, 0.5], "sigma_max": 80.0}, "network": {"width": 8}, "note": "é"}


def make_state() -> State:
    """Every shape and type that is awkward: no dimension, no element, not contiguous, part of a storage, NaN, -0."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 8, generator=generator)
    return {
        "blocks.0.weight": wide[:, :5],
        "blocks.0.bias": wide[0].bfloat16(),
        "transposed": torch.randn(4, 3, generator=generator).t(),
        "half": wide[1].half(),
        "double": wide[2].double(),
        "count": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-42]),
        "shared": wide,
    }


def same(one: State, two: State) -> bool:
    """Bits, types, shapes and names."""

    def bits(value: Tensor) -> Tensor:
        return value.contiguous().reshape(-1).view(torch.uint8)

    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype
        and one[key].shape == two[key].shape
        and torch.equal(bits(one[key]), bits(two[key]))
        for key in one
    )


def write_pth(path: Path, state: State) -> Path:
    save_pth(path / "x.pth", state)
    return path / "x.pth"


def write_dcp(path: Path, state: State) -> Path:
    save_dcp(path / "dcp", state)
    return path / "dcp"


def write_export(path: Path, state: State) -> Path:
    export_safetensors(path / "x.safetensors", state, METADATA)
    return path / "x.safetensors"


def read_state_of_export(path: Path) -> State:
    state, metadata = read_export(path)
    assert metadata == METADATA
    return state


FORMATS = pytest.mark.parametrize(
    ("write", "read"),
    [(write_pth, load_pth), (write_dcp, load_dcp), (write_export, read_state_of_export)],
    ids=["pth", "dcp", "safetensors"],
)
Write = Callable[[Path, State], Path]
Read = Callable[[Path], State]


@FORMATS
def test_round_trip_is_bit_exact(tmp_path: Path, write: Write, read: Read) -> None:
    assert same(read(write(tmp_path, make_state())), make_state())


@FORMATS
def test_equal_states_give_equal_bytes(tmp_path: Path, write: Write, read: Read) -> None:
    hashes = []
    for folder, state in (("a", make_state()), ("b", dict(reversed(make_state().items())))):
        path = write(tmp_path / folder, state)
        hashes.append(sha256_folder(path) if path.is_dir() else sha256_file(path))
    assert hashes[0] == hashes[1]


@FORMATS
def test_old_checkpoint_is_replaced(tmp_path: Path, write: Write, read: Read) -> None:
    write(tmp_path, make_state())
    path = write(tmp_path, {"other": torch.ones(2)})
    assert read(path).keys() == {"other"}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@FORMATS
def test_missing_checkpoint(tmp_path: Path, write: Write, read: Read) -> None:
    path = write(tmp_path / "a", make_state()).relative_to(tmp_path / "a")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / path))):
        read(tmp_path / path)


@FORMATS
@pytest.mark.parametrize("state", [{}, {"a": 1}, {"a": {"b": torch.ones(1)}}, [torch.ones(1)]])
def test_only_flat_states_are_written(tmp_path: Path, write: Write, read: Read, state: Any) -> None:
    with pytest.raises(UserError, match="expected a flat dict of tensors"):
        write(tmp_path, state)
    assert not list(tmp_path.iterdir())


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


@FORMATS
def test_flipped_bits_are_never_taken_for_weights(tmp_path: Path, write: Write, read: Read) -> None:
    """Wherever a bit flips: an error that names the checkpoint, or (in padding) the very same tensors."""
    state = make_state()
    path = write(tmp_path, state)
    refused = 0
    for file in files(path):
        intact = file.read_bytes()
        for position in range(0, len(intact), max(1, len(intact) // 150)):
            file.write_bytes(intact[:position] + bytes([intact[position] ^ 16]) + intact[position + 1 :])
            try:
                assert same(read(path), state)
            except UserError as error:
                assert str(path) in str(error)
                assert "\n" not in str(error)
                refused += 1
        file.write_bytes(intact)
    assert refused > 50
    assert same(read(path), state)


@FORMATS
@pytest.mark.parametrize("keep", [0, 1, 64, 0.5, 0.99])
def test_truncated_and_zeroed_files_are_refused(tmp_path: Path, write: Write, read: Read, keep: float) -> None:
    path = write(tmp_path, make_state())
    for file in files(path):
        intact = file.read_bytes()
        kept = int(keep * len(intact)) if isinstance(keep, float) else keep
        for damaged in (intact[:kept], intact[:kept] + bytes(len(intact) - kept)):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=re.escape(str(path))):
                read(path)
        file.write_bytes(intact)
    assert same(read(path), make_state())


@FORMATS
def test_interrupted_write_leaves_the_old(
    tmp_path: Path, write: Write, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, make_state())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rcm.artefact.sync", interrupt)  # everything is written, nothing renamed
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, {"other": torch.ones(2)})
    assert same(read(path), make_state())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# --- What is particular to a format


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("new_format", [True, False])
def test_pth_that_would_run_code(tmp_path: Path, new_format: bool) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "x.pth"
    torch.save({"a": Trap(trap)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_pth(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap was real


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"weights": {"a": torch.ones(1)}}, "'weights' of type dict"),
        ({"model": {"a": torch.ones(1)}, "step": 3}, "'model' of type dict"),
        ({"model": {"a": {"b": torch.ones(1)}}}, "'a' of type dict"),
        ([torch.ones(1)], "list"),
        (torch.ones(1), "Tensor"),
        ({"a": torch.ones(1), "step": 3}, "'step' of type int"),
        ({1: torch.ones(1)}, "1 of type Tensor"),
        ({}, "no tensors"),
    ],
)
def test_pth_of_another_kind(tmp_path: Path, content: Any, what: str) -> None:
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=f"{re.escape(str(path))} holds.*{what}.*expected a flat dict of tensors"):
        load_pth(path)


@pytest.mark.parametrize("prefix", ["net.", "module.", "_orig_mod.", "module._orig_mod.net."])
def test_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    save_pth(tmp_path / "x.pth", {f"{prefix}{key}": value for key, value in make_state().items()})
    assert same(load_pth(tmp_path / "x.pth"), make_state())


def test_a_prefix_of_some_keys_is_a_name(tmp_path: Path) -> None:
    state = {"net.a": torch.ones(1), "head": torch.ones(2)}
    save_pth(tmp_path / "x.pth", state)
    assert same(load_pth(tmp_path / "x.pth"), state)


@pytest.mark.parametrize("outer", ["model", "state_dict"])
def test_one_outer_level_is_taken_off(tmp_path: Path, outer: str) -> None:
    torch.save({outer: make_state()}, tmp_path / "x.pth")
    assert same(load_pth(tmp_path / "x.pth"), make_state())


def test_pth_as_torch_writes_and_reads_it(tmp_path: Path) -> None:
    """Both ways, with parameters, views of one storage, an OrderedDict with attributes, and types without storages."""
    wide = torch.randn(40, 50)
    module = nn.Linear(3, 2)
    odd = {"low": torch.ones(3).to(torch.float8_e4m3fn), "short": torch.tensor([1, 65535], dtype=torch.uint16)}
    state = {**make_state(), **odd, "one": wide[3:5, 7:], "two": wide.t()[::2], "three": wide[0, 0]}
    state |= {"grad": nn.Parameter(torch.ones(2)), **module.state_dict()}
    torch.save(state, tmp_path / "theirs.pth")
    save_pth(tmp_path / "ours.pth", state)
    for read in (
        load_pth(tmp_path / "theirs.pth"),
        load_pth(tmp_path / "ours.pth"),
        torch.load(tmp_path / "ours.pth", weights_only=True),
        torch.load(tmp_path / "ours.pth", weights_only=True, mmap=True),
    ):
        assert same(read, state)
    torch.save(module.state_dict(), tmp_path / "module.pth")
    assert same(load_pth(tmp_path / "module.pth"), module.state_dict())


def test_pth_is_aligned_as_torchs_own(tmp_path: Path) -> None:
    save_pth(tmp_path / "x.pth", make_state())
    state = torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)
    base = min(value.data_ptr() for value in state.values() if value.numel()) % 64
    assert {value.data_ptr() % 64 for value in state.values() if value.numel()} == {base}


class Loader:
    """Unpickled, it calls a function of torch that is no part of a tensor."""

    def __reduce__(self) -> tuple:
        return (torch.set_num_threads, (1,))


@pytest.mark.parametrize("content", [{"a": Loader()}, {"a": torch.eye(3).to_sparse()}, {"a": torch.device("cpu")}])
def test_pth_with_other_objects(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"Python objects other than tensors"):
        load_pth(tmp_path / "x.pth")


@pytest.mark.parametrize("bomb", ["compressed", "large"])
def test_pth_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str) -> None:
    """It is refused before its pickle is read."""
    monkeypatch.setattr("zipfile.ZipFile.read", None)
    kind = zipfile.ZIP_DEFLATED if bomb == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "x.pth", "w", kind) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26 + 1))
    said = "data.pkl is compressed" if bomb == "compressed" else "data.pkl has 67108865 bytes"
    with pytest.raises(UserError, match=said):
        load_pth(tmp_path / "x.pth")


@pytest.mark.parametrize("change", ["offset", "shape", "stride"])
def test_pth_whose_tensors_reach_beyond_their_records(tmp_path: Path, change: str) -> None:
    """A pickle that is intact but lies."""
    torch.save({"a": torch.zeros(300)[7:107].view(10, 10)}, tmp_path / "honest.pth")
    lies = {
        "offset": (b"K\x07K", b"K\xc9K"),
        "shape": (b"K\nK\n\x86q", b"K\x7fK\n\x86q"),
        "stride": (b"K\nK\x01", b"K\x7fK\x01"),
    }
    with (
        zipfile.ZipFile(tmp_path / "honest.pth") as honest,
        zipfile.ZipFile(tmp_path / "x.pth", "w") as lying,
    ):
        for name in honest.namelist():
            content = honest.read(name)
            if name.endswith(".pkl"):
                assert lies[change][0] in content
                content = content.replace(*lies[change], 1)
            lying.writestr(name, content)
    with pytest.raises(UserError, match="a is larger than its record"):
        load_pth(tmp_path / "x.pth")


def test_pth_of_the_old_format(tmp_path: Path) -> None:
    torch.save(make_state(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert same(load_pth(tmp_path / "x.pth"), make_state())


def test_pth_holds_no_more_than_its_tensors(tmp_path: Path) -> None:
    save_pth(tmp_path / "x.pth", {"a": torch.zeros(1_000_000)[:2]})
    assert (tmp_path / "x.pth").stat().st_size < 10_000


def test_torch_itself_reads_the_dcp_folder(tmp_path: Path) -> None:
    save_dcp(tmp_path / "dcp", make_state())
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "x.pth")
    assert same(torch.load(tmp_path / "x.pth", weights_only=True), make_state())


def test_dcp_is_known_by_its_tensors(tmp_path: Path) -> None:
    save_dcp(tmp_path / "dcp", make_state())
    assert content_sha256(tmp_path / "dcp") == state_sha256(make_state())


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_dcp_without_one_of_its_files(tmp_path: Path, name: str) -> None:
    save_dcp(tmp_path / "dcp", make_state())
    (tmp_path / "dcp" / name).unlink()
    with pytest.raises(UserError, match=f"{re.escape(name)} is missing"):
        load_dcp(tmp_path / "dcp")


@pytest.mark.parametrize("content", ["trap", "string", "nothing"])
def test_dcp_metadata_that_is_more_than_metadata(tmp_path: Path, content: str) -> None:
    """Even where the manifest vouches for it."""
    folder, trap = tmp_path / "dcp", tmp_path / "sprung"
    save_dcp(folder, make_state())
    (folder / ".metadata").write_bytes(
        pickle.dumps({"trap": Trap(trap), "string": "metadata", "nothing": None}[content])
    )
    manifest = read_json(folder / "manifest.json")
    manifest["files"][".metadata"] = sha256_file(folder / ".metadata")
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match=re.escape(str(folder))):
        load_dcp(folder)
    assert not trap.exists()
    if content == "trap":
        pickle.loads((folder / ".metadata").read_bytes())
        assert trap.exists()  # the trap was real


def test_dcp_is_never_unpickled_by_torchs_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dcp(tmp_path / "dcp", make_state())

    def refused(*_: object) -> None:
        raise AssertionError("unrestrained")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.pickle.load", refused)
    assert same(load_dcp(tmp_path / "dcp"), make_state())
    assert same(dict(open_dcp(tmp_path / "dcp")), make_state())


def test_dcp_with_tensors_of_another_checkpoint(tmp_path: Path) -> None:
    save_dcp(tmp_path / "dcp", make_state())
    manifest = read_json(tmp_path / "dcp" / "manifest.json")
    write_json(tmp_path / "dcp" / "manifest.json", manifest | {"content_sha256": "0" * 64})
    with pytest.raises(UserError, match="does not hold the tensors"):
        load_dcp(tmp_path / "dcp")


def test_safetensors_as_its_own_library_writes_it(tmp_path: Path) -> None:
    """Byte for byte, with one entry in the header: its own order of several is random."""
    state = {key: value.contiguous().clone() for key, value in make_state().items()}
    state |= {"é": torch.ones(2).to(torch.float8_e5m2), "byte": torch.ones(3, dtype=torch.uint8)}
    for metadata in (None, {"format": "pt"}):
        save_file(state, tmp_path / "theirs.safetensors", metadata=metadata)
        write_safetensors(tmp_path / "ours.safetensors", lazy(state, "it"), metadata or {})
        theirs, ours = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("theirs", "ours"))
        assert theirs == ours


def test_safetensors_of_another_origin(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.ones(1)}, path, metadata=metadata)
        with pytest.raises(UserError, match="expected a file made by `rcm export`"):
            read_export(path)
    for entry in ("", "[]", "{}", '{"metadata": 1, "sha256": ""}'):
        save_file({"a": torch.ones(1)}, path, metadata={"rcm": entry})
        with pytest.raises(UserError, match="is damaged"):
            read_export(path)


def test_state_hash_follows_names_types_shapes_and_bits() -> None:
    one = {"a": torch.zeros(4)}
    others: list[State] = [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": -torch.zeros(4)},
        {"a": torch.zeros(4), "b": torch.zeros(0)},
    ]
    assert len({state_sha256(state) for state in [one, *others]}) == 6
    assert state_sha256({"a": torch.zeros(8)[::2]}) == state_sha256(one)
    assert state_sha256({"a": torch.zeros(4, requires_grad=True)}) == state_sha256(one)


# --- Into a module


def test_load_into() -> None:
    torch.manual_seed(0)
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_into(target, source.state_dict())
    assert same(target.state_dict(), source.state_dict())


def test_load_into_lists_what_does_not_fit() -> None:
    module = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(UserError, match=r"^x\.pth does not fit the Linear .*missing bias; unexpected extra$"):
        load_into(module, {"weight": torch.ones(2, 3), "extra": torch.ones(1)}, "x.pth")
    with pytest.raises(UserError, match=r"weight is \(3, 2\), needs \(2, 3\)"):
        load_into(module, {"weight": torch.ones(3, 2), "bias": torch.ones(2)})
    with pytest.raises(UserError, match=r"and 15 more"):
        load_into(module, {f"k{number}": torch.ones(1) for number in range(20)})
    assert same(dict(module.state_dict()), before)
