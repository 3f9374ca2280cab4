"""Any checkpoint opens lazily, under official names; networks are filled from it, in their own types."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rcm.networks
from rcm.artefact import UserError
from rcm.checkpoints import (
    LazyState,
    download,
    export_safetensors,
    lazy,
    load_weights,
    open_state,
    save_dcp,
    save_pth,
)
from rcm.tree import settings_of

from .test_formats import make_state, same

SIZES = {"width": 24, "mlp_width": 32, "layers": 2, "heads": 2, "in_channels": 4, "out_channels": 4, "text_width": 16}
SMALL: dict[str, dict[str, Any]] = {
    "wan": settings_of("network", "wan2.1-t2v-1.3b") | SIZES | {"time_width": 8},
    "cosmos": settings_of("network", "cosmos-predict2-t2i-0.6b") | SIZES | {"adaln_width": 8},
}


def network(kind: str = "wan", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    built = rcm.networks.build(SMALL[kind])
    for value in built.parameters():
        nn.init.normal_(value, std=0.3)
    return built


def write_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    """Two files and an index."""
    folder.mkdir()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = [dict(sorted(state.items())[k::2]) for k in range(2)]
    for file, half in zip(files, halves, strict=True):
        save_file({key: value.clone().contiguous() for key, value in half.items()}, folder / file)
    index = {key: file for file, half in zip(files, halves, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def written(folder: Path, form: str, state: dict[str, Tensor]) -> Path:
    path = folder / form
    if form in ("x.pth", "x.pt"):
        torch.save(state, path)
    elif form == "old.pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif form == "x.safetensors":
        save_file({key: value.clone().contiguous() for key, value in state.items()}, path)
    elif form == "export.safetensors":
        export_safetensors(path, state, {"sampler": {}})
    elif form == "dcp":
        save_dcp(path, state)
    else:
        write_shards(path, state)
    return path


FORMS = ["x.pth", "x.pt", "old.pth", "x.safetensors", "export.safetensors", "sharded", "dcp"]


@pytest.mark.parametrize("form", FORMS)
def test_every_format(tmp_path: Path, form: str) -> None:
    state = open_state(written(tmp_path, form, make_state()))
    assert isinstance(state, LazyState) and same(dict(state), make_state())
    described = {key: (value.shape, value.dtype) for key, value in state.described.items()}
    assert described == {key: (value.shape, value.dtype) for key, value in make_state().items()}
    assert {value.device.type for value in state.described.values()} == {"meta"}


@pytest.mark.parametrize("form", FORMS)
def test_names_are_official(tmp_path: Path, form: str) -> None:
    """As a training of Cosmos-Predict2 leaves them; TransformerEngine writes its state as BytesIO or as bytes."""
    other = {
        "blocks.0.attn._extra_state": torch.zeros(4, dtype=torch.uint8),
        "pos_embedder.seq": torch.arange(3.0),
        "pos_embedder.dim_spatial_range": torch.ones(2),
        "pos_embedder.dim_temporal_range": torch.ones(2),
        "accum_iteration": torch.tensor(3),
        "accum_video_sample_counter": torch.tensor(3),
    }
    state = {f"module.net.{key}": value for key, value in {**make_state(), **other}.items()}
    if form in ("x.pth", "x.pt"):
        state["module.net._extra_state"] = io.BytesIO(b"\x80\x02 some bytes \xff")  # type: ignore[assignment]
    assert same(dict(open_state(written(tmp_path, form, state))), make_state())


@pytest.mark.parametrize("name", ["extra_pos_embedder.seq", "pos_embedder.weight", "seq", "my_accum_iteration"])
def test_what_only_looks_like_a_computed_buffer_stays(tmp_path: Path, name: str) -> None:
    save_pth(tmp_path / "x.pth", {name: torch.ones(1)})
    assert list(open_state(tmp_path / "x.pth")) == [name]


def test_one_tensor_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not asked for is not read: damage elsewhere in the file stays unseen."""
    state = {f"t{number}": torch.full((50_000,), float(number)) for number in range(5)}
    torch.save(state, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[content.index(torch.full((9,), 3.0).numpy().tobytes()) + 70_000] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    opened = open_state(tmp_path / "x.pth")
    assert all(torch.equal(opened[name], state[name]) for name in state if name != "t3")
    with pytest.raises(UserError, match=r"x\.pth is damaged.*CRC"):
        opened["t3"]


@pytest.mark.parametrize("form", ["x.safetensors", "x.pth"])
def test_a_download_is_verified_before_use(tmp_path: Path, form: str) -> None:
    """A checkpoint that is whole, but another one."""
    out = tmp_path / f"downloaded {form}"
    download(str(written(tmp_path, form, {"a": torch.ones(100)})), out)
    assert len(open_state(out)) == 1
    out.write_bytes(written(tmp_path, form, {"a": torch.zeros(100)}).read_bytes())
    with pytest.raises(UserError, match=rf"{form} has changed since it was downloaded"):
        open_state(out)
    assert open_state(out, verified=True)["a"].sum() == 0


def test_the_old_format_is_read_tensor_by_tensor_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied weights, as T5's, are one record; the file has no checksums but those of its download."""
    shared = torch.randn(100, 30)
    state = {"shared.weight": shared, "decoder.embed_tokens.weight": shared, "x": torch.randn(3000), "row": shared[7]}
    path = written(tmp_path, "old.pth", state)
    download(str(path), tmp_path / "y.bin")
    monkeypatch.setattr("torch.load", None)
    assert same(dict(open_state(tmp_path / "y.bin")), state)
    content = bytearray(path.read_bytes())
    for kept in (5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(UserError, match=r"old\.pth is damaged"):
            open_state(path)
    content[-9] ^= 1
    (tmp_path / "y.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"y\.bin has changed since it was downloaded"):
        open_state(tmp_path / "y.bin")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
@pytest.mark.parametrize("form", ["x.pth", "export.safetensors", "dcp"])
def test_damage(tmp_path: Path, form: str, damage: str) -> None:
    path = written(tmp_path, form, make_state())
    file = path / "__0_0.distcp" if path.is_dir() else path
    content = bytearray(file.read_bytes())
    content[content.index(make_state()["shared"].numpy().tobytes())] ^= 1
    file.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        dict(open_state(path))


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", make_state())
    with pytest.raises(UserError, match="does not exist"):
        open_state(tmp_path / "absent")
    index = folder / "model.safetensors.index.json"
    intact = json.loads(index.read_text())

    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            open_state(folder)

    index.write_text(json.dumps({"weight_map": intact["weight_map"] | {"more": "model-00001-of-00002.safetensors"}}))
    refused("lacks more, which")
    index.write_text(json.dumps({"weight_map": intact["weight_map"] | {"more": "../x.safetensors"}}))
    refused("outside of its folder")
    index.write_text("{}")
    refused("is damaged")
    index.write_text(json.dumps(intact))
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(r"lacks model-00002-of-00002\.safetensors")
    index.unlink()
    assert len(open_state(folder)) == 5  # one file alone needs no index
    (folder / "model-00001-of-00002.safetensors").unlink()
    refused("expected one index, or one file of tensors")


# --- Into a network


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No configured network is compared with what does not fit, for that takes a second."""
    monkeypatch.setattr("rcm.checkpoints.opening.options", lambda group: [])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("meta", [True, False])
def test_load_weights(tmp_path: Path, form: str, meta: bool) -> None:
    source = network()
    with torch.device("meta" if meta else "cpu"):
        target = rcm.networks.build(SMALL["wan"])
    load_weights(target, written(tmp_path, form, source.state_dict()))
    assert same(target.state_dict(), source.state_dict())
    assert all(value.requires_grad for value in target.parameters())


def test_data_types_are_the_networks(tmp_path: Path) -> None:
    source = network()
    path = written(tmp_path, "x.pth", source.state_dict())
    with torch.device("meta"):
        target = rcm.networks.build(SMALL["wan"]).bfloat16()
        target.time_embedding.float()
    load_weights(target, path)
    expected = {
        key: value if key.startswith("time_embedding") else value.bfloat16()
        for key, value in source.state_dict().items()
    }
    assert same(target.state_dict(), expected)


@pytest.mark.usefixtures("strangers")
def test_flattened_patch_embedding(tmp_path: Path) -> None:
    """Converted files hold Conv3d's kernel as Linear's: unfolding the latents, both give the same tokens."""
    source, target = network(), network(seed=1)
    state = dict(source.state_dict())
    kernel = state["patch_embedding.weight"]
    state["patch_embedding.weight"] = kernel.flatten(1)
    latents = torch.randn(1, 4, 1, 2, 2)
    tokens = nn.functional.linear(latents.flatten(1), kernel.flatten(1), state["patch_embedding.bias"])
    load_weights(target, written(tmp_path, "x.pth", state))
    torch.testing.assert_close(target.patch_embedding(latents).flatten(1), tokens, rtol=1e-5, atol=1e-6)
    assert same(target.state_dict(), source.state_dict())
    state["patch_embedding.weight"] = kernel.flatten(1)[:, :-1]
    with pytest.raises(UserError, match=r"patch_embedding\.weight is \(24, 15\), needs \(24, 4, 1, 2, 2\)"):
        load_weights(target, written(tmp_path, "x.safetensors", state))


@pytest.mark.usefixtures("strangers")
def test_what_does_not_fit_is_listed_and_leaves_the_network(tmp_path: Path) -> None:
    target = network()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = dict(target.state_dict())
    del state["head.head.bias"]
    state |= {"extra": torch.ones(1), "blocks.0.modulation": torch.ones(3)}
    with pytest.raises(UserError) as caught:
        load_weights(target, written(tmp_path, "x.pth", state))
    assert re.search(
        r"x\.pth does not fit the WanTransformer .*missing head\.head\.bias; unexpected extra; shapes differ: "
        r"blocks\.0\.modulation is \(3,\), needs \(1, 6, 24\)$",
        str(caught.value),
    )
    assert same(target.state_dict(), before)


def test_the_network_that_a_checkpoint_looks_like_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = rcm.networks.build("wan2.1-t2v-1.3b").state_dict()
    large = {key: torch.zeros(1, dtype=torch.uint8).expand(value.shape) for key, value in shapes.items()}
    torch.save({f"net.{key}": value for key, value in large.items()}, tmp_path / "x.pth")  # one number for each
    with pytest.raises(UserError, match=r"it has the names and shapes of wan2\.1-t2v-1\.3b: choose that network, or"):
        load_weights(network("cosmos"), tmp_path / "x.pth")


class Encoder(nn.Module):
    ignored_prefixes = ("decoder.", "lm_head.")

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 2)


@pytest.mark.usefixtures("strangers")
def test_parts_of_other_networks_are_not_read(tmp_path: Path) -> None:
    encoder = Encoder()
    state = {key: value + 1 for key, value in encoder.state_dict().items()}
    others = {"decoder.weight": torch.ones(1), "lm_head.weight": torch.ones(1)}
    load_weights(encoder, written(tmp_path, "x.pth", {**state, **others}))
    assert same(encoder.state_dict(), state)
    with pytest.raises(UserError, match="unexpected encoders"):
        load_weights(encoder, written(tmp_path, "x.safetensors", {**state, "encoders": torch.ones(1)}))


def test_a_buffer_that_no_checkpoint_holds_needs_a_built_network(tmp_path: Path) -> None:
    class Positions(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("positions", torch.arange(3), persistent=False)

    save_pth(tmp_path / "x.pth", Positions().state_dict())
    with torch.device("meta"):
        target = Positions()
    with pytest.raises(ValueError, match=r"loses its buffers \['positions'\]"):
        load_weights(target, tmp_path / "x.pth")
    built = Positions()
    load_weights(built, tmp_path / "x.pth")
    assert torch.equal(built.positions, torch.arange(3))


# --- Lazy states


def test_lazy_states_are_renamed_reshaped_cast_and_watched() -> None:
    state = lazy(make_state(), "it")
    assert lazy(state, "it") is state and len(state) == len(make_state())
    assert same(dict(state.renamed({"a": "double"})), {"a": make_state()["double"]})
    shape = torch.Size([3, 4, 4])
    assert same({"a": state.reshaped({"shared": shape})["shared"]}, {"a": make_state()["shared"].reshape(shape)})
    cast = dict(state.cast(torch.bfloat16))
    expected = {k: v.bfloat16() if v.is_floating_point() else v for k, v in make_state().items()}
    assert same(cast, expected)
    seen: list[str] = []
    assert same(dict(state.watched(seen.append)), make_state()) and sorted(seen) == sorted(make_state())
