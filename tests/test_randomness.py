"""Noise depends on (seed, purpose, step, index) alone, and follows its distribution."""

import hashlib

import pytest
import torch
from scipy import stats

from rcm.randomness import normal, uniform

MASK = 2**64 - 1


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 after Salmon et al. (2011), section 3.3, written out."""
    key = list(key)
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (product1 >> 64) ^ counter[1] ^ key[0],
            product1 & MASK,
            (product0 >> 64) ^ counter[3] ^ key[1],
            product0 & MASK,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


def test_reference_gives_the_published_vector() -> None:
    """Known-answer test of the Random123 distribution for counter 0 and key 0."""
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64([0, 0, 0, 0], [0, 0]) == expected


@pytest.mark.parametrize(
    ("seed", "purpose", "step", "index"), [(0, "a", 0, 0), (7, "time", 12, 10**12), (-1, "é", 1, 3)]
)
def test_bits_are_philox_of_the_documented_key_and_counter(seed: int, purpose: str, step: int, index: int) -> None:
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=16).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    words = philox4x64([1, 0, index, step], key) + philox4x64([2, 0, index, step], key)
    expected = [((word >> 12) + 0.5) / 2**52 for word in words]
    assert uniform((2, 4), seed=seed, purpose=purpose, step=step, indices=[index]).flatten().tolist() == expected


@pytest.mark.parametrize("draw", [normal, uniform])
def test_rows_do_not_depend_on_the_batch(draw) -> None:  # type: ignore[no-untyped-def]
    whole = draw((3, 5), seed=1, purpose="noise", step=4, indices=range(8))
    assert whole.shape == (8, 3, 5)
    shuffled = [5, 0, 7, 5, 2]
    assert torch.equal(draw((3, 5), seed=1, purpose="noise", step=4, indices=shuffled), whole[shuffled])
    as_tensor = draw((3, 5), seed=1, purpose="noise", step=4, indices=torch.tensor(shuffled))
    assert torch.equal(as_tensor, whole[shuffled])
    ranks = [draw((3, 5), seed=1, purpose="noise", step=4, indices=range(rank, 8, 4)) for rank in range(4)]
    for rank, rows in enumerate(ranks):
        assert torch.equal(rows, whole[rank::4])
    assert draw((3, 5), seed=1, purpose="noise", indices=[]).shape == (0, 3, 5)


@pytest.mark.parametrize("draw", [normal, uniform])
def test_every_argument_gives_another_stream(draw) -> None:  # type: ignore[no-untyped-def]
    settings = [
        {"seed": seed, "purpose": purpose, "step": step, "indices": [index]}
        for seed in (0, 1)
        for purpose in ("a", "b")
        for step in (0, 1)
        for index in (0, 1)
    ]
    rows = torch.cat([draw((64,), **setting) for setting in settings]).double()
    assert len(torch.unique(rows)) == rows.numel()
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.55  # 4.5 / sqrt(64)


def test_distributions() -> None:
    normals = normal((1000,), seed=0, purpose="test", indices=range(100))
    assert normals.dtype == torch.float32
    assert stats.kstest(normals.flatten().double().numpy(), "norm").pvalue > 0.01
    uniforms = uniform((1000,), seed=0, purpose="test", indices=range(100))
    assert uniforms.dtype == torch.float64
    assert stats.kstest(uniforms.flatten().numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(uniform((), seed=0, purpose="t", indices=range(2000)).numpy(), "uniform").pvalue > 0.01


def test_negative_index_is_refused() -> None:
    with pytest.raises(OverflowError):
        normal((2,), seed=0, purpose="test", indices=[-1])
