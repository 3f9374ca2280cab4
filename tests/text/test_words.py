"""The word encoder: context, order, and whatever people type."""

import pytest
import torch

from rcm.text import build

CONFIG = {"kind": "words", "tokens": 12, "width": 256, "window": 3, "decay": 0.7}


@pytest.fixture(scope="module")
def encoder():
    return build(CONFIG)


def test_roles_can_be_read_off_a_token(encoder):
    """A least-squares probe tells from the token of a shape which side of the relation it is on; so order matters."""
    shapes = ["circle", "square", "triangle", "star", "cross"]
    pairs = [(a, b) for a in shapes for b in shapes if a != b]
    tokens = encoder.encode([f"a photo of a {a} left of a {b}" for a, b in pairs])
    features = torch.cat([tokens[:, 0], tokens[:, 2]])  # "circle left square"
    roles = torch.cat([torch.ones(len(pairs)), -torch.ones(len(pairs))])
    train = torch.arange(len(features)) % 2 == 0
    weights = torch.linalg.lstsq(features[train], roles[train, None]).solution
    assert ((features[~train] @ weights)[:, 0] * roles[~train] > 0).all()


def test_the_same_words_give_the_same_tokens_whatever_the_batch(encoder):
    alone = encoder.encode(["a photo of a red circle"])
    assert torch.equal(alone[0], encoder.encode(["something else", "A photo of a RED  circle"])[1])
    assert not alone[0, 2:].any()
    assert alone[0, :2].square().mean().item() == pytest.approx(1 + 0.7**2, rel=0.3)


def test_prompts_that_people_type(encoder):
    hostile = ["", "🟥" * 3, "a/b\\c", "line\nbreak", "-rf --help", "x" * 10_000, "كلب أحمر", "red " * 5_000]
    tokens = encoder.encode(hostile)
    assert tokens.shape == (len(hostile), 12, 256)
    assert tokens.isfinite().all()
    assert not tokens[0].any()
    assert all(row.any() for row in tokens[1:])
    assert encoder.cut([*hostile, "red " * 12]) == [7]


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="unknown text encoder kind 'bert': expected one of words, umt5, t5"):
        build({"kind": "bert"})
