"""The Cosmos-Predict2 transformer against an independent implementation, and its tangents, also in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from rcm import dual, networks
from rcm.flow import Wrapped
from rcm.networks import build, cosmos

SIZES = {"kind": "cosmos", "width": 96, "mlp_width": 160, "layers": 2, "heads": 4, "text_width": 40, "adaln_width": 16}
RENAMED = {  # names in diffusers -> official names
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder": "t_embedder.1",
    "time_embed.norm": "t_embedding_norm",
    "transformer_blocks": "blocks",
    "norm_out.linear_1": "final_layer.adaln_modulation.1",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
    "proj_out": "final_layer.linear",
    "norm1.linear_": "adaln_modulation_self_attn.",
    "norm2.linear_": "adaln_modulation_cross_attn.",
    "norm3.linear_": "adaln_modulation_mlp.",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out.0": "output_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
}


def official(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomised(network: nn.Module) -> nn.Module:
    for seed, parameter in enumerate(network.parameters()):
        parameter.data = random(*parameter.shape, seed=seed, dtype=parameter.dtype) * 0.1
    return network


def sinusoid_in_float64(time: Tensor) -> Tensor:
    angle = time[:, None] * 10000 ** (-torch.arange(48, dtype=torch.float64) / 48)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Twins:
    """The same weights in this implementation and in that of diffusers, called alike."""

    def __init__(self) -> None:
        from diffusers import CosmosTransformer3DModel  # slow to import

        self.theirs = randomised(
            CosmosTransformer3DModel(
                in_channels=17,  # its own padding mask needs torchvision, to resize it: the channel is given instead
                concat_padding_mask=False,
                out_channels=16,
                num_attention_heads=4,
                attention_head_dim=24,
                num_layers=2,
                mlp_ratio=160 / 96,
                text_embed_dim=40,
                adaln_lora_dim=16,
                rope_scale=(1.0, 4.0, 4.0),
                extra_pos_embed_type=None,
            )
        ).eval()
        for block in self.theirs.transformer_blocks:
            for attention in (block.attn1, block.attn2):
                attention.norm_q.eps = attention.norm_k.eps = 1e-6  # as in the official network; here it is 1e-5
        self.ours = build(SIZES)
        self.ours.load_state_dict({official(name): value for name, value in self.theirs.state_dict().items()})

    @torch.no_grad()
    def __call__(self, latents: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        masked = torch.cat([latents, torch.zeros_like(latents[:, :1])], dim=1)
        per_frame = time[:, 0] if time.shape[1] == 1 else time[:, None, :, None, None]
        theirs = self.theirs(masked, timestep=per_frame, encoder_hidden_states=text, fps=None)
        return self.ours(latents, time, text), theirs.sample


@pytest.fixture(scope="module")
def twins() -> Twins:
    return Twins()


@pytest.mark.parametrize("steps", [1, 3], ids=["one time", "a time for every frame"])
def test_equals_the_transformer_of_diffusers(twins: Twins, steps: int) -> None:
    latents = random(2, 16, 3, 6, 20, seed=1, dtype=torch.float32)  # 10 tokens wide: the stretched positions count
    time, text = torch.linspace(0.1, 0.99, 2 * steps).view(2, steps), random(2, 7, 40, seed=2, dtype=torch.float32)
    velocity, expected = twins(latents, time, text)
    assert (velocity - expected).norm() < 1e-5 * expected.norm()


def test_equals_the_transformer_of_diffusers_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token, which needs no rotary embedding. Where diffusers has float32 always, float64 takes its place."""
    from diffusers.models.normalization import RMSNorm

    def rms_norm(self: RMSNorm, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight

    twins = Twins()
    twins.ours.double(), twins.theirs.double()
    monkeypatch.setattr(twins.theirs.time_embed.time_proj, "forward", sinusoid_in_float64)
    monkeypatch.setattr(RMSNorm, "forward", rms_norm)
    time = torch.tensor([[0.3], [0.95]], dtype=torch.float64)
    velocity, expected = twins(random(2, 16, 1, 2, 2, seed=1), time, random(2, 7, 40, seed=2))
    assert (velocity - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("heads", [1, 4])
def test_rotary_frequencies_have_the_published_base(heads: int) -> None:
    """10000 · scale^(d / (d - 2)) to the power of -2 k / d, with d channels for the axis: a third of the head."""
    size, scale = 96 // heads, (1.0, 4.0, 2.0)
    rows = size // 6 * 2
    angles = cosmos.stretched_angles(1, 2, 1, size, scale, torch.device("cpu"))[1]
    base = 10000 * 4 ** (rows / (rows - 2))
    expected = [base ** (-2 * k / rows) for k in range(rows // 2)]
    assert angles[(size - 2 * rows) // 2 :][: rows // 2].tolist() == pytest.approx(expected, rel=1e-12)
    assert angles[: (size - 2 * rows) // 2].abs().max() == angles[-(rows // 2) :].abs().max() == 0


def test_wrapping_is_the_denoiser_of_cosmos(twins: Twins) -> None:
    """x0 = c_skip x_σ + c_out output(c_in x_σ, c_noise), as the text-to-image pipeline of diffusers has it."""
    sigma, text = torch.tensor([0.7, 60.0], dtype=torch.float64), random(2, 7, 40, seed=2)
    x_trig = random(2, 16, 1, 4, 4, seed=3)
    x_sigma = x_trig * (1 + sigma**2).sqrt().view(-1, 1, 1, 1, 1)
    t = (sigma / (sigma + 1)).view(-1, 1, 1, 1, 1)
    masked = torch.cat([x_sigma * (1 - t), torch.zeros(2, 1, 1, 4, 4)], dim=1).float()
    with torch.no_grad():
        output = twins.theirs(masked, timestep=t.flatten().float(), encoder_hidden_states=text.float()).sample.double()
        denoised = Wrapped(twins.ours).denoise(x_trig, sigma.atan(), text)
    expected = (1 - t) * x_sigma - t * output
    assert (denoised - expected).norm() < 1e-5 * expected.norm()


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v


@pytest.fixture
def tiny() -> nn.Module:
    return randomised(
        build({**SIZES, "width": 32, "mlp_width": 48, "heads": 2, "in_channels": 3, "out_channels": 3}).double()
    )


@pytest.mark.parametrize("per_frame", [False, True])
def test_dual_pass_is_func_jvp_with_plain_attention(
    tiny: nn.Module, per_frame: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, text = random(2, 3, 3, 4, 4, seed=0), random(2, 5, 40, seed=1)
    time = random(2, 3 if per_frame else 1, seed=2).abs()
    tangents = random(2, 3, 3, 4, 4, seed=3), random(*time.shape, seed=4)
    result = dual.jvp(lambda x, t: tiny(x, t, text), (latents, time), tangents)
    monkeypatch.setattr(cosmos.Attention, "attend", staticmethod(plain_attention))
    expected = torch.func.jvp(lambda x, t: tiny(x, t, text), (latents, time), tangents)
    for value, exact in zip(result, expected, strict=True):
        assert exact.norm() > 0.1
        assert (value - exact).norm() < 1e-10 * exact.norm()


def test_tangent_is_a_finite_difference(tiny: nn.Module) -> None:
    """Of the wrapped network, along state and time together, against central differences."""
    wrapped, h = Wrapped(tiny), 1e-5
    x, tx, text = random(2, 3, 1, 4, 4, seed=0), random(2, 3, 1, 4, 4, seed=3), random(2, 5, 40, seed=1)
    t, tt = torch.tensor([0.4, 1.5], dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64)
    _, tangent = dual.jvp(lambda x, t: wrapped.velocity(x, t, text), (x, t), (tx, tt))
    with torch.no_grad():
        ahead, behind = (wrapped.velocity(x + s * tx, t + s * tt, text) for s in (h, -h))
    difference = (ahead - behind) / (2 * h)
    assert (tangent - difference).norm() < 1e-7 * difference.norm()


@pytest.mark.parametrize("part", ["t_embedder", "t_embedding_norm", "blocks.1.adaln_modulation_mlp"])
def test_the_time_reaches_a_rounded_network_unrounded(tiny: nn.Module, part: str) -> None:
    """bfloat16 tokens, float32 time: the modulation changes with it as in float64, though bfloat16 sees one time."""
    for parameter in tiny.parameters():
        parameter.data = parameter.data.bfloat16().double()
    x, text, times = random(1, 3, 1, 4, 4, seed=0), random(1, 5, 40, seed=1), torch.tensor([[0.75], [0.7501]])
    assert times.bfloat16().unique().numel() == 1
    outputs: list[Tensor] = []
    tiny.get_submodule(part).register_forward_hook(lambda _, inputs, output: outputs.append(output.double()))
    for dtype in (torch.float64, torch.bfloat16):
        for name, module in tiny.named_children():
            module.to(torch.float32 if name in tiny.precise and dtype == torch.bfloat16 else dtype)
        assert all(tiny(x, t[None], text).dtype == dtype for t in times)
    exact, rounded = outputs[1] - outputs[0], outputs[3] - outputs[2]
    assert (rounded - exact).norm() < 1e-2 * exact.norm()  # a difference of 1e-4 of float32 values


@pytest.mark.parametrize("change", [{"heads": 5}, {"width": 36, "heads": 4}])
def test_impossible_sizes_are_named(change: dict[str, int]) -> None:
    sizes = {**SIZES, **change}
    with pytest.raises(ValueError, match=f"width {sizes['width']} does not split into {sizes['heads']} heads"):
        networks.build(sizes)


def test_inputs_that_do_not_fit_are_named(tiny: nn.Module) -> None:
    text = torch.zeros(1, 2, 40)
    with pytest.raises(ValueError, match="do not divide into patches"):
        tiny(torch.zeros(1, 3, 1, 5, 4), torch.zeros(1, 1), text)
    with pytest.raises(ValueError, match="time must be"):
        tiny(torch.zeros(1, 3, 3, 4, 4), torch.zeros(1, 2), text)
