import importlib.util

import pytest
import torch
from tests.training.test_distill import configuration
from torch import nn

from rcm.artefact import UserError
from rcm.training.learner import Learner, optimizer_kind
from rcm.training.settings import Settings


@pytest.mark.parametrize(
    ("asked", "device", "installed", "expected"),
    [
        ("auto", "cpu", True, "torch"),
        ("auto", "cuda", False, "torch"),
        ("auto", "cuda", True, "transformer_engine"),
        ("torch", "cuda", True, "torch"),
        ("transformer_engine", "cuda", True, "transformer_engine"),
    ],
)
def test_which_optimizer_runs(monkeypatch, asked, device, installed, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert optimizer_kind(asked, device) == expected


@pytest.mark.parametrize(
    ("device", "installed", "lacking"),
    [("cuda", False, "the package transformer_engine"), ("cpu", True, "a CUDA device")],
)
def test_an_optimizer_that_cannot_run_is_refused(monkeypatch, device, installed, lacking):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(UserError, match=f"needs {lacking}"):
        optimizer_kind("transformer_engine", device)


def test_updates_are_those_of_adam_by_hand():
    """AdamW with beta1 = 0 and two gradients, in float64."""
    settings = Settings.of(configuration(lr_warmup=0, lr_decay="constant", beta2=0.9, weight_decay=0.1, eps=1e-3))
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, 2.0)
    learner, w, v = Learner(layer, 0.05, 10, settings), 2.0, 0.0
    for k, g in enumerate((3.0, -0.5), start=1):
        layer.weight.grad = torch.tensor([[g]], dtype=torch.float64)
        learner.update()
        v = 0.9 * v + 0.1 * g**2
        w = w * (1 - 0.05 * 0.1) - 0.05 * g / ((v / (1 - 0.9**k)) ** 0.5 + 1e-3)
        assert layer.weight.item() == pytest.approx(w, rel=1e-12)


def test_a_state_that_is_filled_continues_the_updates():
    settings = Settings.of(configuration())
    gradients = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))

    def made():
        torch.manual_seed(0)
        return Learner(nn.Linear(3, 2, bias=False), 0.1, 6, settings)

    def advance(learner, some):
        for gradient in some:
            learner.network.weight.grad = gradient.clone()
            learner.update()

    straight, first, second = made(), made(), made()
    advance(straight, gradients)
    advance(first, gradients[:3])
    saved, state = first.state(), second.state()
    second.network.load_state_dict(saved["network"])
    for name, moments in state["optimizer"].items():
        for moment, place in moments.items():
            place.copy_(saved["optimizer"][name][moment])
    second.resume(saved["updates"])
    advance(second, gradients[3:])
    assert torch.equal(second.network.weight, straight.network.weight)
