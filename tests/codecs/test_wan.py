"""The video autoencoder: official names, pieces like the whole, memory, types, and sizes that it cannot take."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.vae_memory import LiveBytes, decoding_peak, whole_peak

from rcm.codecs import WanVAE, build
from rcm.tree import settings_of

OFFICIAL = Path(__file__).parent / "official" / "wan2.1-vae.json"
SETTINGS = settings_of("codec", "wan2.1-vae")


def small(dtype: torch.dtype = torch.float32, **changes: object) -> WanVAE:
    torch.manual_seed(0)
    return build({**SETTINGS, "width": 8, **changes}).to(dtype)


def test_names_shapes_and_count_are_those_of_the_official_checkpoint():
    with torch.device("meta"):
        codec = build("wan2.1-vae")
    facts = json.loads(OFFICIAL.read_text())
    assert {name: list(value.shape) for name, value in codec.state_dict().items()} == facts["tensors"]
    assert sum(parameter.numel() for parameter in codec.parameters()) == facts["parameters"] == 126_892_531
    assert (codec.channels, codec.cell, codec.stride) == (16, 8, 4)


@pytest.mark.parametrize("sizes", [{}, {"stride": 2}, {"stride": 8}, {"multipliers": [1, 2], "cell": 2, "stride": 1}])
def test_pieces_are_those_of_a_whole_pass(sizes):
    codec = small(torch.float64, **sizes)
    video = torch.rand(1, 3, 1 + 3 * codec.stride, 16, 24, dtype=torch.float64) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == (1, 16, 4, 16 // codec.cell, 24 // codec.cell)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(16, 1, 1, 1) for v in (codec.mean, codec.std))
    with torch.no_grad():
        whole = (codec.conv1(codec.encoder(video, {}))[:, :16] - mean) / std
        decoded = codec.decoder(codec.conv2(latents * std + mean), {}).clamp(-1, 1)
    assert (latents - whole).abs().max() < 1e-12
    pieces = list(codec.frames(latents))
    assert [piece.shape[2] for piece in pieces] == [1] + [codec.stride] * 3
    assert (torch.cat(pieces, dim=2) - decoded).abs().max() < 1e-12
    assert torch.equal(codec.decode(latents), torch.cat(pieces, dim=2))


def test_later_frames_do_not_change_earlier_ones():
    codec = small()
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    changed = torch.cat([video[:, :, :5], -video[:, :, 5:]], dim=2)
    first, second = codec.encode(video), codec.encode(changed)
    assert torch.equal(first[:, :, :2], second[:, :, :2]) and not torch.allclose(first[:, :, 2], second[:, :, 2])
    assert torch.equal(codec.decode(first)[:, :, :5], codec.decode(second)[:, :, :5])


def test_memory_does_not_depend_on_the_length():
    codec = small()
    assert decoding_peak(codec, 4, 4, 4) == decoding_peak(codec, 9, 4, 4) > 0
    assert whole_peak(codec, 9, 4, 4) > 2 * whole_peak(codec, 3, 4, 4)  # so the measure sees memory that grows

    def encoding_peak(frames: int) -> int:
        video = torch.rand(1, 3, frames, 32, 32)
        with LiveBytes() as live:
            codec.encode(video)
        return live.peak

    latents = 4 * 16 * 4 * 4  # bytes of a frame of them
    assert encoding_peak(49) - encoding_peak(17) <= 3 * 8 * latents  # the result and its copies


def test_81_frames_at_480p_decode_within_7_gib():
    """Counted on the meta device, whose tensors have a size but no memory."""
    codec = small()
    with torch.device("meta"):
        small_on_meta, full = build({**SETTINGS, "width": 8}), build("wan2.1-vae")
    assert decoding_peak(small_on_meta, 3, 4, 6) == decoding_peak(codec, 3, 4, 6)
    assert decoding_peak(full, 21, 60, 104) == decoding_peak(full, 4, 60, 104) < 7 * 2**30


def test_the_last_piece_leaves_nothing_behind():
    """So a single image takes no memory for frames that never come: 2.1 GiB at 1360 x 768 instead of 5.2."""
    with torch.device("meta"):
        full = build("wan2.1-vae")
    assert decoding_peak(full, 1, 96, 170) < 2.2 * 2**30
    with LiveBytes() as live:
        full.encode(torch.zeros(1, 3, 1, 768, 1360, device="meta"))
    assert live.peak < 2.2 * 2**30


def test_what_was_built_without_memory_keeps_mean_and_deviation():
    codec = small()
    with torch.device("meta"):
        empty = build({**SETTINGS, "width": 8})
    empty.to_empty(device="cpu").load_state_dict(codec.state_dict())
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    assert torch.equal(empty.encode(video), codec.encode(video))
    latents = torch.randn(1, 16, 2, 2, 2)
    assert torch.equal(empty.decode(latents), codec.decode(latents))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float32, 1e-5)])
def test_lower_precision_is_near_float64(dtype, tolerance):
    exact, codec = small(torch.float64), small().to(dtype)
    exact.load_state_dict(codec.state_dict())
    latents = torch.randn(1, 16, 3, 4, 4)
    video, expected = codec.decode(latents), exact.decode(latents.double())
    assert video.dtype == torch.float32 and expected.dtype == torch.float64
    assert (video - expected).norm() / expected.norm() < tolerance
    again, expected = codec.encode(video), exact.encode(video.double())
    assert again.dtype == torch.float32 and expected.dtype == torch.float64
    assert (again - expected).norm() / expected.norm() < tolerance


def test_values_outside_are_clamped():
    codec = small()
    torch.nn.init.constant_(codec.decoder.head["2"].bias, 3.0)
    assert torch.equal(codec.decode(torch.randn(1, 16, 2, 2, 2)), torch.ones(1, 3, 5, 16, 16))


def test_sizes_that_do_not_divide_are_named():
    codec = small()
    with pytest.raises(ValueError, match=r"video of 4 x 16 x 16: need 1 \+ 4k frames, sides of 8k"):
        codec.encode(torch.zeros(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match=r"video of 5 x 20 x 16: need"):
        codec.encode(torch.zeros(1, 3, 5, 20, 16))
    with pytest.raises(ValueError, match=r"latents of \(1, 4, 2, 2, 2\): need \(B, 16, T, H, W\)"):
        codec.decode(torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(ValueError, match=r"4 multipliers make cells of 8 pixels .*: not 16 and 4"):
        small(cell=16)
    with pytest.raises(ValueError, match="not 8 and 3"):
        small(stride=3)
    with pytest.raises(ValueError, match="16 channels need as many means and deviations, not 2 and 16"):
        small(mean=[0.0, 0.0])
    with pytest.raises(ValueError, match=r"unknown codec 'wan-vae': expected one of cells, wan2\.1-vae"):
        build("wan-vae")
