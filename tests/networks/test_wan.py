"""The Wan2.1 transformer against an independent implementation, and what the tiny scale adds to it."""

import pytest
import torch

from rcm.networks import build

SIZES = {"width": 96, "mlp_width": 160, "layers": 2, "heads": 4, "text_width": 40, "time_width": 32}
RENAMED = {  # names in diffusers -> official names
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm2": "norm3",
}


def official(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name.replace("scale_shift_table", "modulation")


def randomised(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
    return network


@pytest.fixture(scope="module")
def twins() -> tuple[torch.nn.Module, torch.nn.Module]:
    from diffusers import WanTransformer3DModel  # slow to import

    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=40,
        freq_dim=32,
        ffn_dim=160,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
    )
    theirs = randomised(theirs, 0).eval()
    ours = build({"kind": "wan", **SIZES})
    ours.load_state_dict({official(name): value for name, value in theirs.state_dict().items()})
    return ours, theirs


def test_equals_the_transformer_of_diffusers(twins):
    ours, theirs = twins
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 3, 6, 8, generator=generator)
    text = torch.randn(2, 7, 40, generator=generator)
    time = torch.tensor([3.0, 731.5])
    with torch.no_grad():
        expected = theirs(latents, timestep=time, encoder_hidden_states=text).sample
        velocity = ours(latents, time[:, None], text)
    assert (velocity - expected).norm() / expected.norm() < 1e-5


def test_a_time_for_every_frame_equals_one_time_where_all_agree(twins):
    ours, _ = twins
    latents, text = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 7, 40)
    time = torch.tensor([[100.0], [900.0]])
    assert torch.allclose(ours(latents, time, text), ours(latents, time.expand(-1, 3), text), atol=1e-5)
    mixed = time.expand(-1, 3).clone()
    mixed[:, 1] += 300
    assert not torch.allclose(ours(latents, time, text), ours(latents, mixed, text), atol=1e-3)


def test_absolute_positions_tell_cells_apart_where_the_input_does_not():
    sizes = {**SIZES, "in_channels": 4, "out_channels": 4, "patch": (1, 1, 1)}
    blank, time, text = torch.zeros(1, 4, 1, 3, 3), torch.zeros(1, 1), torch.randn(1, 5, 40)
    plain = randomised(build({"kind": "wan", **sizes}), 2)(blank, time, text)
    placed = randomised(build({"kind": "wan", **sizes, "positions": (1, 3, 3)}), 2)(blank, time, text)
    assert plain.flatten(2).std(-1).max() < 1e-5
    assert placed.flatten(2).std(-1).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 5}, "width 96 does not split into 5 heads"), ({"kind": "unet"}, "unknown network kind 'unet'")],
)
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build({"kind": "wan", **SIZES, **change})


def test_inputs_that_do_not_fit_are_named():
    network = build({"kind": "wan", **SIZES})
    text = torch.zeros(1, 2, 40)
    with pytest.raises(ValueError, match="do not divide into patches"):
        network(torch.zeros(1, 16, 1, 5, 4), torch.zeros(1, 1), text)
    with pytest.raises(ValueError, match="time must be"):
        network(torch.zeros(1, 16, 3, 4, 4), torch.zeros(1, 2), text)


def test_the_full_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = build({"kind": "wan", "width": 1536, "mlp_width": 8960, "layers": 30, "heads": 12})
    assert sum(p.numel() for p in network.parameters()) == 1_418_996_800
