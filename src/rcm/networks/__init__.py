"""Transformers: plain modules with one `forward(latents_BCTHW, time_BP, text_BLD) -> velocity_BCTHW`."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from rcm.tree import settings_of

from .conditioned import Conditioned
from .cosmos import CosmosTransformer
from .wan import WanTransformer

__all__ = ["Conditioned", "build"]

_CLASSES = {"wan": WanTransformer, "cosmos": CosmosTransformer}


def build(config: Mapping[str, Any] | str) -> nn.Module:
    """Build a network with random weights from `{"kind": "wan", ...its sizes}` or its name in config/network/.

    It works under `torch.device("meta")`. Raises ValueError for an unknown name or kind, or sizes that do not fit.
    """
    sizes = settings_of("network", config)
    kind = sizes.pop("kind")
    if kind not in _CLASSES:
        raise ValueError(f"unknown network kind {kind!r}: expected one of {', '.join(_CLASSES)}")
    return _CLASSES[kind](**sizes)
