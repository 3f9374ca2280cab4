"""The teacher's training, and the teachers that are shipped."""

import copy
from pathlib import Path

import pytest
import torch

from rcm import codecs, randomness, text
from rcm.artefact import sha256_file
from rcm.checkpoints import load_pth
from rcm.cli.config import compose
from rcm.data import prompts
from rcm.evaluation.geneval import shapeeval
from rcm.flow import Wrapped, guided
from rcm.networks import build
from rcm.sampling import teacher_sample
from rcm.training import pretrain as module
from rcm.training.pretrain import draw_world, flow_matching_loss, pretrain

ROOT = Path(__file__).parents[2]
SMALL = [
    *("pretrain.scenes=60", "pretrain.iterations=6", "pretrain.batch=8", "pretrain.state_every=2"),
    *("network.width=16", "network.mlp_width=16", "network.layers=1", "network.heads=2"),
]


@pytest.fixture(scope="module")
def setting():
    config = compose(SMALL)
    torch.manual_seed(0)
    scenes = draw_world(config, codecs.build(config["codec"]), text.build(config["text"]))
    return config, build(config["network"]), scenes


def trained(setting, folder: Path) -> torch.nn.Module:
    config, network, scenes = setting
    network = copy.deepcopy(network)
    pretrain(config, network, scenes, resume_dir=folder, metrics_path=folder / "metrics.jsonl")
    return network


def test_a_run_that_was_killed_ends_like_one_that_was_not(setting, tmp_path, monkeypatch):
    whole = trained(setting, tmp_path / "whole")

    class Killed(Exception):
        pass

    def save_and_die(states, step, tree):
        save(states, step, tree)
        if step == 4:
            raise Killed

    save = module.States.save
    monkeypatch.setattr(module.States, "save", save_and_die)
    with pytest.raises(Killed):
        trained(setting, tmp_path / "killed")
    monkeypatch.undo()
    resumed = trained(setting, tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not torch.equal(whole.head.head.weight, setting[1].head.head.weight)


def test_the_loss_is_the_squared_distance_to_noise_minus_data():
    class Knows(torch.nn.Module):
        time_scale = 10.0

        def forward(self, x, time, text):  # the velocity, where the data is 2 and r is the time / 10
            r = time.view(-1, 1, 1, 1, 1) / 10
            return (x - (1 - r) * 2) / r - 2 + offset

    x0, noise, r = torch.full((3, 2, 1, 2, 2), 2.0), torch.randn(3, 2, 1, 2, 2), torch.tensor([0.2, 0.5, 0.9])
    offset = 0.0
    assert flow_matching_loss(Knows(), x0, noise, r, torch.zeros(3, 1, 1)).item() == pytest.approx(0, abs=1e-9)
    offset = 3.0
    assert flow_matching_loss(Knows(), x0, noise, r, torch.zeros(3, 1, 1)).item() == pytest.approx(9, rel=1e-5)


def test_scenes_fit_their_captions(setting):
    config, _, scenes = setting
    assert scenes.latents.shape == (60, 24, 1, 3, 3)
    assert not scenes.texts[-1].any()
    assert scenes.captions.max() < len(scenes.texts) - 1
    assert len(scenes.texts) - 1 == len({m["prompt"] for m in module.captions(config)})


@pytest.mark.parametrize("media", ["images", "clips"])
def test_what_is_shipped_is_what_the_configuration_names(media):
    config = compose([f"experiment=tiny-{media}"])
    for asset in config["checkpoints"].values():
        assert sha256_file(ROOT / asset["source"]) == asset["sha256"]
    weights = load_pth(ROOT / config["checkpoints"]["transformer"]["source"])
    build(config["network"]).load_state_dict(weights)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_the_shipped_files_stay_small():
    assert sum(path.stat().st_size for path in (ROOT / "assets/tiny").iterdir()) < 6 * 2**20


def test_the_shipped_codec_comes_from_its_recipe():
    config = compose()
    codec = codecs.build(config["codec"])
    scenes = module.pictures(module.captions(config)[: module._CHUNK], config["pretrain"]["seed"], 1)
    codec.fit(scenes[:, :, 0])
    for name, value in load_pth(ROOT / "assets/tiny/codec.pth").items():
        assert torch.allclose(getattr(codec, name), value, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(("media", "least"), [("images", 0.85), ("clips", 0.80)])
def test_the_shipped_teachers_show_their_captions(media, least):
    """On development prompts; the frames of clips by their middle one."""
    config = compose([f"experiment=tiny-{media}"])
    network, codec = build(config["network"]), codecs.build(config["codec"])
    network.load_state_dict(load_pth(ROOT / config["checkpoints"]["transformer"]["source"]))
    codec.load_state_dict(load_pth(ROOT / config["checkpoints"]["codec"]["source"]))
    encoder, teacher, prompts_seed = text.build(config["text"]), config["teacher"], config["suites"]["dev"]["seed"]
    suite = prompts.evaluation_suite(prompts.TINY, seed=prompts_seed, per_task=20, media=media)
    words, nothing = encoder.encode([m["prompt"] for m in suite]), encoder.encode([""])
    frames = 1 + (config["frames"] - 1) // config["codec"]["stride"]
    noise = randomness.normal((24, frames, 3, 3), seed=0, purpose="test", indices=range(len(suite)))
    wrapped = Wrapped(network)
    latents = teacher_sample(
        lambda x, r: guided(wrapped.rf_velocity, x, r, words, nothing, teacher["guidance"]),
        noise,
        **{key: teacher[key] for key in ("sampler", "steps", "shift", "sigma_max")},
    )
    pictures = codecs.to_pixels(codec.decode(latents.float()))[:, config["frames"] // 2]
    assert shapeeval(list(pictures), suite)["overall"] > least
