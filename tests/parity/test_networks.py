"""The networks against those of diffusers: outputs with the same weights, names and shapes at full size.

Weights go the way of an export: renamed, written beside a `config.json`, and read by diffusers' own `from_pretrained`.
"""

import json
import resource
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_cosmos
from torch import Tensor, nn

from rcm.artefact import UserError
from rcm.checkpoints.diffusers import config, from_diffusers, to_diffusers
from rcm.flow import Wrapped
from rcm.networks import build
from rcm.parallel import round_weights
from rcm.tree import settings_of

WAN = {"kind": "wan", "width": 96, "mlp_width": 160, "layers": 2, "heads": 4, "text_width": 40, "time_width": 32}
COSMOS = {"kind": "cosmos", "width": 96, "mlp_width": 160, "layers": 2, "heads": 4, "text_width": 40, "adaln_width": 16}
SMALL = {
    "Wan text-to-video": WAN,
    "Wan2.1 image-to-video": {**WAN, "in_channels": 36, "image_width": 24},
    "Wan2.2 image-to-video": {**WAN, "in_channels": 36},
    "Cosmos": COSMOS,
}
OFFICIAL = (
    *("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b", "wan2.2-i2v-a14b"),
    *("cosmos-predict2-t2i-0.6b", "cosmos-predict2-t2i-2b", "cosmos-predict2-t2i-14b"),
)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers takes from torchvision, for the padding mask of Cosmos."""
    nearest = lambda mask, size, **_: F.interpolate(mask, size, mode="nearest")  # noqa: E731
    stub = SimpleNamespace(functional=SimpleNamespace(resize=nearest), InterpolationMode=SimpleNamespace(NEAREST=0))
    monkeypatch.setattr(transformer_cosmos, "transforms", stub, raising=False)


def official_epsilon(theirs: nn.Module) -> None:
    """Of the norms of queries and keys, 1e-6 as in the official Cosmos; in diffusers it is 1e-5."""
    for name, module in theirs.named_modules():
        if name.endswith(("norm_q", "norm_k")):
            module.eps = 1e-6


def velocity_of(theirs: nn.Module, latents: Tensor, time_BP: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
    """diffusers' output, called as `WanTransformer.forward`."""
    one = time_BP.shape[1] == 1
    if isinstance(theirs, diffusers.CosmosTransformer3DModel):
        time = time_BP[:, 0] if one else time_BP[:, None, :, None, None]
        pixels = torch.zeros(1, 1, *(8 * n for n in latents.shape[-2:]), dtype=latents.dtype)
        return theirs(latents, time, text, padding_mask=pixels).sample
    tokens = latents[0, 0].numel() // 4
    time = time_BP[:, 0] if one else time_BP.repeat_interleave(tokens // time_BP.shape[1], dim=1)
    return theirs(latents, time, text, image).sample


@pytest.fixture(scope="module", params=SMALL)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    """A network with random weights, and what diffusers makes of its export."""
    settings, folder = SMALL[request.param], tmp_path_factory.mktemp("export")
    ours = build(settings)
    for seed, (name, parameter) in enumerate(ours.named_parameters()):
        matrix, scale = parameter.ndim > 1 and "modulation" not in name, parameter.ndim == 1 and name.endswith("weight")
        parameter.data = random(*parameter.shape, seed=seed) * (parameter[0].numel() ** -0.5 if matrix else 0.3) + scale
    names = to_diffusers(settings, ours.state_dict())
    state = {names[name]: value for name, value in ours.state_dict().items()}
    assert len(state) == len(names)
    safetensors.torch.save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(settings)))
    kind = getattr(diffusers, config(settings)["_class_name"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_keep_in_fp32_modules", None)  # all are; which is all that needs accelerate
        theirs, said = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    official_epsilon(theirs)
    return ours, theirs.eval()


@pytest.mark.parametrize("steps", [1, 3], ids=["one time", "a time for every frame"])
def test_outputs_are_those_of_diffusers(twins: tuple[nn.Module, nn.Module], steps: int) -> None:
    ours, theirs = twins
    time = torch.linspace(0.1, 0.99, 2 * steps).view(2, steps) * ours.time_scale
    # 10 tokens wide, so that Cosmos' stretched positions count; diffusers takes the last 512 tokens for the text
    latents, text = random(2, 16, 3, 6, 20, seed=1), random(2, 512, 40, seed=2)
    condition = random(2, 20, 3, 6, 20, seed=3) if theirs.config.in_channels == 36 else None
    image = random(2, 257, 24, seed=4) if theirs.config.get("image_dim") else None
    given = [] if condition is None else [None, condition, image]
    whole = latents if condition is None else torch.cat([latents, condition], dim=1)
    with torch.no_grad():
        expected = velocity_of(theirs, whole, time, text, image)
        assert error(ours(latents, time, text, *given), expected) < 1e-5
        if image is not None:  # which counts
            assert error(ours(latents, time, text, None, condition, image.flip(-1)), expected) > 1e-2


def test_the_way_back_gives_the_same_tensors(twins: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = twins
    kind = {"kind": "wan" if isinstance(theirs, diffusers.WanTransformer3DModel) else "cosmos"}
    names = from_diffusers(kind, theirs.state_dict())
    back = {names[name]: value for name, value in theirs.state_dict().items()}
    assert len(back) == len(names)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("name", OFFICIAL)
def test_full_size_has_names_and_shapes_of_diffusers(name: str) -> None:
    settings = settings_of("network", name)
    with torch.device("meta"):
        ours = build(name).state_dict()
        theirs = getattr(diffusers, config(settings)["_class_name"]).from_config(config(settings)).state_dict()
    names = to_diffusers(settings, ours)
    assert {names[ours_]: value.shape for ours_, value in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert from_diffusers(settings, theirs) == {other: ours_ for ours_, other in names.items()}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        (
            "wan2.1-i2v-14b",
            {"image_dim": 1280, "added_kv_proj_dim": 5120, "attention_head_dim": 128, "num_attention_heads": 40,
             "num_layers": 40, "ffn_dim": 13824, "freq_dim": 256, "text_dim": 4096, "in_channels": 36,
             "out_channels": 16, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True,
             "eps": 1e-6},
        ),
        (
            "cosmos-predict2-t2i-2b",
            {"in_channels": 16, "out_channels": 16, "num_attention_heads": 16, "attention_head_dim": 128,
             "num_layers": 28, "mlp_ratio": 4.0, "text_embed_dim": 1024, "adaln_lora_dim": 256,
             "max_size": [128, 240, 240], "patch_size": [1, 2, 2], "rope_scale": [1.0, 4.0, 4.0],
             "concat_padding_mask": True, "extra_pos_embed_type": None},
        ),
    ],
)  # fmt: skip
def test_configuration_is_the_published_one(name: str, published: dict[str, Any]) -> None:
    """As diffusers' scripts convert the official checkpoints."""
    found = config(settings_of("network", name))
    assert found.pop("_class_name") == ("WanTransformer3DModel" if "wan" in name else "CosmosTransformer3DModel")
    assert found == published


def test_what_diffusers_does_not_have_is_refused() -> None:
    own = {**WAN, "positions": [3, 3, 3], "second_time": True}
    with pytest.raises(
        UserError, match="has positions and second_time, which diffusers' WanTransformer3DModel has not"
    ):
        config(own)
    with pytest.raises(UserError, match=r"second_time_embedding\.0\.weight has no place in diffusers' layout"):
        to_diffusers(own, build(own).state_dict())
    with pytest.raises(UserError, match=r"x_embedder\.proj\.1\.weight has no place in diffusers' layout"):
        to_diffusers(WAN, ["x_embedder.proj.1.weight"])
    with pytest.raises(
        UserError, match=r"blocks\.0\.attn2\.norm_added_q\.weight has no place in a network of kind wan"
    ):
        from_diffusers(WAN, ["blocks.0.attn2.norm_added_q.weight"])


@pytest.mark.parametrize("twins", ["Cosmos"], indirect=True)
def test_cosmos_equals_diffusers_in_float64(
    twins: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token, which needs no rotary embedding. Where diffusers has float32 always, float64 takes its place."""

    def sinusoid(time: Tensor) -> Tensor:
        angle = time[:, None] * 10000 ** (-torch.arange(48, dtype=torch.float64) / 48)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def rms_norm(self: RMSNorm, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight

    ours, theirs = (network.double() for network in twins)
    monkeypatch.setattr(theirs.time_embed.time_proj, "forward", sinusoid)
    monkeypatch.setattr(RMSNorm, "forward", rms_norm)
    time = torch.tensor([[0.3], [0.95]], dtype=torch.float64)
    latents, text = random(2, 16, 1, 2, 2, seed=1).double(), random(2, 7, 40, seed=2).double()
    with torch.no_grad():
        assert error(ours(latents, time, text), velocity_of(theirs, latents, time, text, None)) < 1e-12
    ours.float(), theirs.float()


@pytest.mark.parametrize("twins", ["Cosmos"], indirect=True)
def test_wrapping_is_the_denoiser_of_cosmos(twins: tuple[nn.Module, nn.Module]) -> None:
    """x0 = c_skip x_σ + c_out output(c_in x_σ, c_noise), as the text-to-image pipeline of diffusers has it."""
    ours, theirs = twins
    sigma, text = torch.tensor([0.7, 60.0], dtype=torch.float64), random(2, 7, 40, seed=2)
    x_trig = random(2, 16, 1, 4, 4, seed=3, dtype=torch.float64)
    x_sigma = x_trig * (1 + sigma**2).sqrt().view(-1, 1, 1, 1, 1)
    t = (sigma / (sigma + 1)).view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        output = velocity_of(theirs, (x_sigma * (1 - t)).float(), t.view(2, 1).float(), text, None)
        denoised = Wrapped(ours).denoise(x_trig, sigma.atan(), text)
    assert error(denoised, (1 - t) * x_sigma - t * output.double()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "cosmos-predict2-t2i-0.6b"])
def test_a_whole_network(name: str) -> None:
    """At full size, random weights, 16 tokens and 64 of the text: in bfloat16, then in float32 against diffusers."""
    settings = settings_of("network", name)
    kind = getattr(diffusers, config(settings)["_class_name"])
    with torch.device("meta"):
        ours, theirs = build(name), kind.from_config(config(settings))
    round_weights(ours, torch.bfloat16)
    ours.to_empty(device="cpu").requires_grad_(False)
    torch.manual_seed(0)
    for parameter in ours.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    latents, time = random(1, 16, 1, 8, 8, seed=1), torch.full((1, 1), 0.7 * ours.time_scale)
    text = random(1, 64, settings["text_width"], seed=2)
    rounded = ours(latents, time, text)
    assert (rounded.dtype, rounded.shape) == (torch.bfloat16, latents.shape)

    ours.float()
    names = to_diffusers(settings, ours.state_dict())
    shared = {names[name]: value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(shared, assign=True)
    theirs.rope = kind.from_config({**config(settings), "num_layers": 0}).rope  # has tables that are in no state
    official_epsilon(theirs)
    with torch.no_grad():
        expected = velocity_of(theirs.eval(), latents, time, text, None)
    assert error(ours(latents, time, text), expected) < 1e-5
    assert error(rounded.float(), expected) < 0.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 24 * 2**20  # KiB
