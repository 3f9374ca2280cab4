"""The networks of a distillation, opened from a teacher's checkpoint by one process and by two."""

import pytest
import torch

from rcm import networks
from rcm.checkpoints import dcp, save_dcp
from rcm.cli.config import compose
from rcm.cli.networks import open_networks
from rcm.parallel import start

SMALL = [
    *("network.width=16", "network.mlp_width=16", "network.layers=2", "network.heads=2", "parallel.device=cpu"),
    *("distillation.discriminator.layers=[0,1]", "distillation.discriminator.heads=2"),
]


def teacher():
    torch.manual_seed(0)
    built = networks.build(compose(SMALL)["network"])
    torch.nn.init.normal_(built.head.head.weight, std=0.3)
    return built


def opened(folder, *overrides):
    """The states of student, teacher and fake score as whole tensors."""
    config = compose([*SMALL, *overrides])
    built = open_networks(config, folder, start(device="cpu"))
    states = {role: network.state_dict() for role, network in built._asdict().items() if network is not None}
    whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731
    return {f"{role}.{name}": whole(x).clone() for role, state in states.items() for name, x in state.items()}


@pytest.mark.parametrize("method", ["rcm", "meanflow", "dmd2"])
def test_all_begin_as_the_teacher_on_any_number_of_ranks(ranks, tmp_path, monkeypatch, method):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    weights = teacher().state_dict()
    save_dcp(tmp_path / "teacher", weights)
    found = opened(tmp_path / "teacher", f"objective={method}")
    fake = {"rcm": "fake.", "dmd2": "fake.score."}.get(method)
    for prefix in filter(None, ("student.", "teacher.", fake)):
        assert all(torch.equal(found[prefix + name], value) for name, value in weights.items())
    added = {name for name in found if "second_time" in name or ".branch." in name}
    assert len(found) == len(weights) * (3 if fake else 2) + len(added)
    assert bool(added) == (method != "rcm")
    for result in ranks(2, opened, tmp_path / "teacher", f"objective={method}"):
        assert result.keys() == found.keys()
        assert all(torch.equal(result[name], value) for name, value in found.items())


def test_the_seed_draws_what_a_teacher_does_not_have(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    save_dcp(tmp_path / "teacher", teacher().state_dict())
    one, same, other = (opened(tmp_path / "teacher", "objective=dmd2", f"seed={seed}") for seed in (1, 1, 2))
    assert torch.equal(one["fake.branch.query"], same["fake.branch.query"])
    assert not torch.equal(one["fake.branch.query"], other["fake.branch.query"])
    assert one["fake.branch.query"].std() > 0.1  # drawn, not left empty
    assert not one["fake.branch.logit.weight"].any()  # as the branch is made


def test_the_teacher_is_verified_once(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    save_dcp(tmp_path / "teacher", teacher().state_dict())
    read, plain = [], dcp.sha256_file
    monkeypatch.setattr(dcp, "sha256_file", lambda path: read.append(path.name) or plain(path))
    opened(tmp_path / "teacher", "objective=dmd2")
    assert sorted(read) == [".metadata", "__0_0.distcp"]
