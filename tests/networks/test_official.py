"""The configurations of the big networks against the names and shapes of the official checkpoints.

official/*.json: the public model definitions, built on the meta device; `blocks.*` stands for every block.
"""

import json
from pathlib import Path

import pytest
import torch

from rcm.networks import build

PARAMETERS = {
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.1-i2v-14b": 16_394_878_784,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "cosmos-predict2-t2i-0.6b": 597_536_000,
    "cosmos-predict2-t2i-2b": 1_956_405_248,
    "cosmos-predict2-t2i-14b": 14_265_265_152,
}


def official(name: str) -> dict[str, list[int]]:
    facts = json.loads((Path(__file__).parent / "official" / f"{name}.json").read_text())
    assert facts["parameters"] == PARAMETERS[name]
    return {
        tensor.replace("*", str(block)): shape
        for tensor, shape in facts["tensors"].items()
        for block in range(facts["blocks"] if "*" in tensor else 1)
    }


@pytest.mark.parametrize("name", PARAMETERS)
def test_names_shapes_and_count_are_those_of_the_official_checkpoint(name: str) -> None:
    with torch.device("meta"):
        network = build(name)
    ours = {tensor: list(value.shape) for tensor, value in network.state_dict().items()}
    theirs = official(name)
    assert {t: (ours.get(t), theirs.get(t)) for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)} == {}
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]
