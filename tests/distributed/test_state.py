"""States and checkpoints over ranks: written by any number, read by any other, whole or absent on all of them."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import rcm.checkpoints.dcp
from rcm.artefact import UserError, content_sha256, read_json
from rcm.checkpoints import load_dcp, load_sharded, save_dcp, state_sha256
from rcm.parallel.mesh import Mesh, start
from rcm.training.state import KEPT, States, optimizer_state

CONFIG = {"seed": 0, "lr": 1e-6}
ALONE = Mesh(None, torch.device("cpu"))
LAYOUTS = {1: {}, 2: {"shard": 2}, 4: {"replicate": 2, "shard": 2}}


def build(seed: int, trained: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network with sizes that no number of ranks divides, and its optimiser, after two updates if `trained`."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 7, dtype=torch.float32))
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.5, 0.9), fused=True)
    for _ in range(2 * trained):
        network(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network, optimizer


def sharded(network: nn.Module, mesh: Mesh) -> nn.Module:
    if mesh.group is not None:
        for part in (network[0], network):
            fully_shard(part, mesh=mesh.parameters)
    return network


def tree(network: nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> dict:
    return {
        "student": {
            "network": network.state_dict(),
            "optimizer": optimizer_state(network, optimizer),
            "updates": updates,
        },
        "plain": torch.full((3,), float(updates)),
        "note": {"rates": [0.1, float(updates)], "role": "student"},
    }


def flat(tree: dict) -> dict:
    """Every leaf by its names, DTensors whole."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= {f"{key}.{name}": leaf for name, leaf in flat(value).items()}
        else:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            leaves[key] = whole.detach().clone() if isinstance(whole, torch.Tensor) else copy.deepcopy(whole)
    return leaves


def hand_on(folder: str, world: int) -> tuple[int, dict, list[str]]:
    """Read the state on `world` ranks into other networks, write it as the next, and spoil what was written from."""
    mesh = start(**LAYOUTS[world], device="cpu") if world > 1 else ALONE
    network, _ = build(seed=world, trained=False)
    optimizer = torch.optim.AdamW(sharded(network, mesh).parameters(), betas=(0.5, 0.9), fused=True)
    with States(Path(folder), CONFIG, mesh) as states:
        state = tree(network, optimizer, 0)
        step = states.load(state)
        found = flat(state)
        states.save(step + 1, state)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
                optimizer.state[parameter]["exp_avg"].fill_(7)
                optimizer.state[parameter]["step"].fill_(7)
        state["plain"].zero_()
        state["note"]["rates"].clear()
    files = sorted(path.name for path in (Path(folder) / f"{step + 1:09d}").iterdir())
    return step, found, files


def test_a_state_passes_from_hand_to_hand_bit_for_bit(ranks, tmp_path):
    """Alone, 2 shards, 2 x 2 (copies x shards), alone, 4 ranks, alone."""
    written = tree(*build(seed=0, trained=True), updates=2)
    with States(tmp_path, CONFIG, ALONE) as states:
        states.save(1, written)
    expected = flat(written)
    assert expected["student.optimizer.0.weight.exp_avg"].abs().sum() > 0
    assert expected["student.optimizer.0.weight.step"] == 2
    for done, world in enumerate((1, 2, 4, 2, 4, 1), start=1):
        call = (hand_on, str(tmp_path), world)
        for step, found, files in [hand_on(*call[1:])] if world == 1 else ranks(world, *call):
            assert step == done
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
                assert same, (world, name)
            assert len(files) >= 2 + min(world, 2)
        assert len(list(tmp_path.glob("0*"))) == min(done + 1, KEPT)


def resume(folder: str) -> int | None:
    mesh = start(device="cpu")
    network, _ = build(seed=5, trained=False)
    optimizer = torch.optim.AdamW(sharded(network, mesh).parameters(), fused=True)
    with States(Path(folder), CONFIG, mesh) as states:
        return states.load(tree(network, optimizer, 0))


def write_twice(folder: str, failing_rank: int | None) -> tuple[str, list[str]]:
    """Write states 1 and 2; the second fails on one rank, in the background. The error at the next call, the files."""
    mesh = start(device="cpu")
    network, _ = build(seed=0, trained=False)
    optimizer = torch.optim.AdamW(sharded(network, mesh).parameters(), fused=True)
    hashing = rcm.checkpoints.dcp.sha256_file

    def fail(path: Path) -> str:
        raise OSError(28, "No space left on device")

    try:
        with States(Path(folder), CONFIG, mesh) as states:
            states.save(1, tree(network, optimizer, 1), wait=True)
            if mesh.rank == failing_rank:
                rcm.checkpoints.dcp.sha256_file = fail
            states.save(2, tree(network, optimizer, 2))
            states.save(3, tree(network, optimizer, 3))
    except UserError as error:
        return str(error), sorted(path.name for path in Path(folder).iterdir())
    finally:
        rcm.checkpoints.dcp.sha256_file = hashing
    return "", sorted(path.name for path in Path(folder).iterdir())


def test_a_write_that_fails_on_one_rank_is_told_on_all(ranks, tmp_path):
    for error, names in ranks(2, write_twice, str(tmp_path), 1):
        assert "state after step 2" in error
        assert "No space left on device" in error
        assert [name for name in names if name.isdecimal()] == ["000000001"]
    assert ranks(2, resume, str(tmp_path)) == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "000000001"]


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"])
def test_what_one_rank_finds_damaged_all_leave_out(ranks, tmp_path, file):
    ranks(2, write_twice, str(tmp_path), None)
    path = tmp_path / "000000003" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert ranks(2, resume, str(tmp_path)) == [2, 2]
    assert ranks(4, resume, str(tmp_path)) == [2] * 4


def refused(folder: str, config: dict, width: int) -> str:
    mesh = start(device="cpu")
    network = sharded(nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, 7)), mesh)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    before = flat(tree(network, optimizer, 0))
    with States(Path(folder), config, mesh) as states:
        state = tree(network, optimizer, 0)
        try:
            states.load(state)
        except UserError as error:
            assert repr(before) == repr(flat(state))  # nothing was changed
            return str(error)
    return ""


def test_another_configuration_or_network_is_refused_on_all_ranks(ranks, tmp_path):
    with States(tmp_path, CONFIG, ALONE) as states:
        states.save(1, tree(*build(seed=0, trained=True), updates=2))
    for error in ranks(2, refused, str(tmp_path), CONFIG | {"lr": 1e-5}, 3):
        assert "lr was 1e-06, is 1e-05" in error
    for error in ranks(2, refused, str(tmp_path), CONFIG, 4):
        assert "student.network.0.weight is (3, 5), needs (4, 5)" in error
    assert ranks(2, refused, str(tmp_path), CONFIG, 3) == ["", ""]


def occupied(folder: str) -> str:
    try:
        resume(folder)
    except UserError as error:
        return str(error)
    return ""


def test_all_ranks_learn_that_another_process_has_the_folder(ranks, tmp_path):
    with States(tmp_path, CONFIG, ALONE):
        assert all("another process works in" in error for error in ranks(2, occupied, str(tmp_path)))
    assert ranks(2, occupied, str(tmp_path)) == ["", ""]


# --- Checkpoints of one network


def export(folder: str, world: int) -> str:
    mesh = start(**LAYOUTS[world], device="cpu")
    network = sharded(build(seed=3, trained=False)[0], mesh)
    save_dcp(folder, network.state_dict(), mesh)
    return state_sha256(network.state_dict())


def test_a_checkpoint_written_by_ranks_is_that_of_one_process(ranks, tmp_path):
    state = build(seed=3, trained=False)[0].state_dict()
    save_dcp(tmp_path / "1", state)
    for world in (2, 4):
        folder = tmp_path / str(world)
        assert ranks(world, export, str(folder), world) == [state_sha256(state)] * world
        assert content_sha256(folder) == content_sha256(tmp_path / "1") == state_sha256(state)
        assert {"__0_0.distcp", "__1_0.distcp"} <= read_json(folder / "manifest.json")["files"].keys()
        read = load_dcp(folder)
        assert all(torch.equal(read[name], value) for name, value in state.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "4"]


def fill(folder: str, world: int, dtype: torch.dtype, width: int) -> tuple[str, dict, list[int]]:
    """Load into a sharded network that was built without weights: the error if any, its tensors, bytes on this rank."""
    mesh = start(**LAYOUTS[world], device="cpu")
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, 7)).to(dtype)
    sharded(network, mesh).to_empty(device="cpu")
    error = ""
    try:
        load_sharded(network, folder, mesh)
    except UserError as caught:
        error = str(caught)
    local = sum(parameter.to_local().numel() for parameter in network.parameters())
    return error, flat(network.state_dict()), local


@pytest.mark.parametrize(("world", "dtype"), [(2, torch.float32), (4, torch.float64)])
def test_every_rank_loads_its_part(ranks, tmp_path, world, dtype):
    network = build(seed=3, trained=False)[0]
    save_dcp(tmp_path / "dcp", network.state_dict())
    results = ranks(world, fill, str(tmp_path / "dcp"), world, dtype, 3)
    for error, found, local in results:
        assert error == ""
        assert local < 46  # all of them
        assert all(torch.equal(found[name], value.to(dtype)) for name, value in network.state_dict().items())
        assert all(value.dtype == dtype for value in found.values())
    assert sum(local for *_, local in results) == 46 * (world // 2)  # 5 * 3 + 3 + 3 * 7 + 7, in so many copies


def test_a_checkpoint_that_does_not_fit_or_is_damaged_is_refused_on_all_ranks(ranks, tmp_path):
    assert all("does not exist" in error for error, *_ in ranks(2, fill, str(tmp_path / "dcp"), 2, torch.float32, 3))
    ranks(2, export, str(tmp_path / "dcp"), 2)
    for error, *_ in ranks(2, fill, str(tmp_path / "dcp"), 2, torch.float32, 4):
        assert "does not fit" in error
        assert "0.bias is (3,), needs (4,)" in error
    path = tmp_path / "dcp" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    for error, *_ in ranks(2, fill, str(tmp_path / "dcp"), 2, torch.float32, 3):
        assert "__1_0.distcp is damaged" in error
