"""A miniature project: a random network of a few thousand weights, a codec fitted to a few scenes, and a runner."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import rcm.codecs
import rcm.networks
from rcm.checkpoints import export_safetensors, save_pth
from rcm.cli import main
from rcm.cli.config import compose
from rcm.cli.models import EXPORTED
from rcm.codecs import from_pixels
from rcm.data import world
from rcm.data.prompts import colors

SMALL = ["network.width=16", "network.mlp_width=16", "network.layers=1", "network.heads=2"]


@dataclass(frozen=True)
class Mini:
    """Checkpoints with random weights; `student` makes images, `clips` clips."""

    folder: Path
    transformer: Path
    codec: Path
    student: Path
    clips: Path


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Mini:
    folder = tmp_path_factory.mktemp("mini")
    made = Mini(
        folder,
        *(folder / name for name in ("transformer.pth", "codec.pth", "images.safetensors", "clips.safetensors")),
    )
    config = compose(SMALL)
    torch.manual_seed(0)
    network = rcm.networks.build(config["network"])
    torch.nn.init.normal_(network.head.head.weight, std=0.1)  # it starts at zero
    save_pth(made.transformer, network.state_dict())

    captions = [colors(shape, color) for shape in world.SHAPES for color in world.COLORS]
    scenes = [world.sample_scene(caption, np.random.default_rng(k)) for k, caption in enumerate(captions)]
    codec = rcm.codecs.build(config["codec"])
    codec.fit(from_pixels(np.stack([world.render(scene) for scene in scenes]))[:, :, 0])
    save_pth(made.codec, codec.state_dict())

    for path, experiment in ((made.student, "tiny-images"), (made.clips, "tiny-clips")):
        config = compose([f"experiment={experiment}", *SMALL])
        export_safetensors(path, network.state_dict(), {key: config[key] for key in EXPORTED})
    return made


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a stage that must succeed; returns what it printed on stderr."""

    def call(*arguments: object) -> str:
        status = main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert status == 0, error
        return error

    return call


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a stage that must fail; returns its one sentence on stderr."""

    def call(stage: str, *arguments: object) -> str:
        status = main([stage, *(str(argument) for argument in arguments)])
        error = capsys.readouterr().err
        assert status == 2, error
        assert error.startswith(f"rcm {stage}: error: "), error
        assert error.count("\n") == 1 and error.endswith("\n"), error
        return error

    return call
