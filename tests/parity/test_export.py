"""Exports in diffusers' layout, read by diffusers' own `from_pretrained`, and back again."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from torch import nn

from rcm.artefact import UserError, sha256_folder
from rcm.checkpoints import (
    export_diffusers,
    export_safetensors,
    fitted,
    load_dcp,
    load_pth,
    open_state,
    read_export,
    save_dcp,
    save_pth,
)
from rcm.networks import build

from .test_networks import SMALL, error, official_epsilon, random, resize, velocity_of

__all__ = ["resize"]  # a fixture


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    ours = build(SMALL[kind])
    for value in ours.parameters():
        nn.init.normal_(value, std=0.05)
    return ours.eval()


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 100_000])
@pytest.mark.parametrize("kind", SMALL)
def test_diffusers_loads_it_and_gives_the_same_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, shard_bytes: int
) -> None:
    settings, ours = SMALL[kind], network(kind)
    export_diffusers(tmp_path / "x", ours.state_dict(), settings, shard_bytes=shard_bytes)
    files = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert ("diffusion_pytorch_model.safetensors" in files) is (shard_bytes > 10**9)
    assert len(files) > 4 or shard_bytes > 10**9
    name = json.loads((tmp_path / "x" / "config.json").read_text())["_class_name"]
    kind_of_theirs = getattr(diffusers, name)
    monkeypatch.setattr(kind_of_theirs, "_keep_in_fp32_modules", None)  # all are; which is all that needs accelerate
    theirs, said = kind_of_theirs.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(said.values()), said
    official_epsilon(theirs)
    latents, text, time = random(2, 16, 3, 6, 8, seed=1), random(2, 512, 40, seed=2), torch.tensor([[0.2], [0.9]])
    time = time * ours.time_scale
    condition = random(2, 20, 3, 6, 8, seed=3) if theirs.config.in_channels == 36 else None
    image = random(2, 257, 24, seed=4) if theirs.config.get("image_dim") else None
    given = [] if condition is None else [None, condition, image]
    with torch.no_grad():
        found = ours(latents, time, text, *given)
        whole = latents if condition is None else torch.cat([latents, condition], dim=1)
        expected = velocity_of(theirs.eval(), whole, time, text, image)
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("kind", SMALL)
def test_round_trips_are_bit_exact(tmp_path: Path, kind: str) -> None:
    """.pth -> DCP -> .pth, .safetensors and diffusers' folder -> DCP: the same bits and the same identity."""
    settings, own = SMALL[kind], network(kind).bfloat16().state_dict()
    save_pth(tmp_path / "a.pth", own)
    save_dcp(tmp_path / "dcp", open_state(tmp_path / "a.pth"))
    state = open_state(tmp_path / "dcp")
    save_pth(tmp_path / "b.pth", state)
    export_safetensors(tmp_path / "b.safetensors", state, {"network": settings})
    export_diffusers(tmp_path / "b", state, settings, shard_bytes=50_000)
    save_dcp(tmp_path / "again", fitted(open_state(tmp_path / "b"), own, "b", kind, settings=settings))
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    for found in (
        load_pth(tmp_path / "b.pth"),
        read_export(tmp_path / "b.safetensors")[0],
        load_dcp(tmp_path / "again"),
    ):
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) and found[name].dtype == own[name].dtype for name in own)
    assert (tmp_path / "again/manifest.json").read_text() == (tmp_path / "dcp/manifest.json").read_text()


def test_equal_networks_give_equal_bytes(tmp_path: Path) -> None:
    state = network("Cosmos").state_dict()
    for name, given in (("a", state), ("b", dict(reversed(state.items())))):
        export_diffusers(tmp_path / name, given, SMALL["Cosmos"], shard_bytes=100_000)
    assert sha256_folder(tmp_path / "a") == sha256_folder(tmp_path / "b")


def test_shards_are_no_larger_than_asked_but_for_single_tensors(tmp_path: Path) -> None:
    state = network("Cosmos").state_dict()
    export_diffusers(tmp_path / "x", state, SMALL["Cosmos"], shard_bytes=40_000)
    for path in (tmp_path / "x").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118 (not a dict)
            assert sum(sizes) <= 40_000 or len(sizes) == 1
    index = json.loads((tmp_path / "x/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())


def test_a_network_that_diffusers_does_not_have(tmp_path: Path) -> None:
    settings = {**SMALL["Wan text-to-video"], "second_time": True}
    with pytest.raises(UserError, match="second_time"):
        export_diffusers(tmp_path / "x", build(settings).state_dict(), settings)
    assert not (tmp_path / "x").exists()
