"""States of one process: what comes back, what damage does, what a kill leaves, what happens in the background."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from rcm.artefact import UserError, read_json, sha256_json, write_json
from rcm.parallel.mesh import Mesh
from rcm.training.state import KEPT, States, differences, optimizer_state, remove_states

CONFIG = {"seed": 0, "lr": 1e-6, "scm_time": {"name": "lognormal", "std": 1.6}, "rollout_times": [1.2, 0.9]}
ALONE = Mesh(None, torch.device("cpu"))


def tree(value: float) -> dict:
    return {
        "x": {"weight": torch.full((3,), float(value)), "special": torch.tensor([float("nan"), -0.0])},
        "count": int(value),
    }


def save(folder, *steps):
    with States(folder, CONFIG, ALONE) as states:
        for step in steps:
            states.save(step, tree(step))


def load(folder, config=CONFIG, into=None):
    """(step, value of the weights) or None."""
    state = tree(-1) if into is None else into
    weight = state["x"]["weight"]
    with States(folder, config, ALONE) as states:
        step = states.load(state)
    assert (weight == state["count"]).all()  # in place, tensors and numbers of one state
    return None if step is None else (step, state["count"])


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_the_newest_state_comes_back_and_old_ones_go(tmp_path):
    assert load(tmp_path / "run") is None
    save(tmp_path / "run", 5, 10, 15)
    assert load(tmp_path / "run") == (15, 15)
    assert names(tmp_path / "run") == ["000000010", "000000015"]
    assert KEPT == 2
    remove_states(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    wide = torch.randn(6, 8, dtype=torch.float64)
    saved = {
        "a.b": {"view": wide[:, 2:5], "transposed": wide.t(), "half": wide[0].bfloat16(), "empty": torch.empty(0, 3)},
        "scalar": torch.tensor(3),
        "numbers": {"float": 0.1 + 0.2, "tiny": 5e-324, "big": 2**70, "yes": True, "none": None, "text": "é"},
        "list": [1, [2.5]],
    }  # fmt: skip
    with States(tmp_path, CONFIG, ALONE) as states:
        states.save(1, saved, wait=True)
        blank = {
            "a.b": {name: torch.zeros_like(value) for name, value in saved["a.b"].items()},
            "scalar": torch.tensor(0),
            "numbers": dict.fromkeys(saved["numbers"], 0),
            "list": None,
        }
        assert states.load(blank) == 1
    for name, value in saved["a.b"].items():
        assert torch.equal(blank["a.b"][name], value), name
    assert blank["scalar"] == 3
    assert blank["numbers"] == saved["numbers"]
    assert blank["list"] == saved["list"]
    assert type(blank["numbers"]["yes"]) is bool
    special = tree(-1)
    save(tmp_path / "special", 1)
    with States(tmp_path / "special", CONFIG, ALONE) as states:
        states.load(special)
    assert special["x"]["special"].view(torch.int32).tolist() == tree(1)["x"]["special"].view(torch.int32).tolist()


DAMAGE = ["truncate", "flip", "file missing", "manifest", "number in manifest", "manifest missing", "step"]


def damage(folder: Path, how: str) -> None:
    file, manifest = folder / "__0_0.distcp", folder / "manifest.json"
    content = bytearray(file.read_bytes())
    if how == "truncate":
        file.write_bytes(content[:-100])
    elif how == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "file missing":
        file.unlink()
    elif how == "manifest":
        manifest.write_text("{")
    elif how == "number in manifest":
        manifest.write_text(manifest.read_text().replace('"count": 10', '"count": 11'))
    elif how == "manifest missing":
        manifest.unlink()
    else:
        body = read_json(manifest) | {"step": 11}
        del body["sha256"]
        write_json(manifest, {"sha256": sha256_json(body), **body})


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, capsys, how):
    save(tmp_path, 5, 10)
    damage(tmp_path / "000000010", how)
    assert load(tmp_path) == (5, 5)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "damaged" in warning
    assert "000000010" in warning


def test_nothing_whole_is_no_fresh_start(tmp_path):
    """Hours of work that might be mended are not written over."""
    save(tmp_path, 5, 10)
    for name in ("000000005", "000000010"):
        (tmp_path / name / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"all states in \S+ are damaged \(\S+/000000010/__0_0.distcp is damaged"):
        load(tmp_path)


def test_a_run_that_went_back_leaves_the_damaged_state_behind(tmp_path):
    """The damaged one is newer by its number, but it must not take the place of a whole one."""
    save(tmp_path, 5, 10)
    damage(tmp_path / "000000010", "flip")
    save(tmp_path, 7)
    assert names(tmp_path) == ["000000005", "000000007"]
    damage(tmp_path / "000000007", "flip")
    save(tmp_path, 7)  # the same again
    assert load(tmp_path) == (7, 7)


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(UserError) as error:
        load(tmp_path, {**CONFIG, "lr": 1e-5, "scm_time": {"name": "lognormal", "std": 1.0}})
    assert "lr was 1e-06, is 1e-05; scm_time.std was 1.6, is 1.0" in str(error.value)
    assert "seed" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"weight": torch.zeros(4)}, "x.weight is (3,), needs (4,)"),
        ({"weight": torch.zeros(3, dtype=torch.float64)}, "x.weight is torch.float32, needs torch.float64"),
        ({"more": torch.zeros(1)}, "missing x.more"),
        ({"more": 1}, "missing or unexpected x.more"),
    ],
)
def test_other_networks_are_refused_by_name(tmp_path, other, told):
    save(tmp_path, 5)
    state = tree(-1)
    state["x"] |= other
    with States(tmp_path, CONFIG, ALONE) as states, pytest.raises(UserError) as error:
        states.load(state)
    assert told in str(error.value)
    assert state["count"] == -1
    assert (state["x"]["special"].isnan() == torch.tensor([True, False])).all()


def test_differences_name_absent_keys():
    assert differences({"a": 1}, {"b": {"c": 2}}) == ["a was 1, is absent", "b.c was absent, is 2"]


# --- In the background


def test_training_goes_on_while_the_state_of_before_is_written(tmp_path, monkeypatch):
    """The writing is held up: save returns all the same, and what changes then is not in the state."""
    may_write, state, rates = threading.Event(), tree(5), [0.5]
    write = States._write
    monkeypatch.setattr(States, "_write", lambda *arguments: may_write.wait(10) and write(*arguments))
    with States(tmp_path, CONFIG, ALONE) as states:
        states.save(5, state | {"rates": rates})
        state["x"]["weight"].fill_(99)
        rates[0] = 99
        assert not any(name.isdecimal() for name in names(tmp_path))
        may_write.set()
    found = tree(-1) | {"rates": []}
    assert load(tmp_path, into=found) == (5, 5)
    assert found["rates"] == [0.5]


def test_a_state_that_was_waited_for_is_there(tmp_path):
    with States(tmp_path, CONFIG, ALONE) as states:
        states.save(5, tree(5), wait=True)
        assert names(tmp_path) == ["000000005"]
        states.save(6, tree(6))
        states.wait()
        assert names(tmp_path) == ["000000005", "000000006"]


def test_a_write_that_failed_is_told_at_the_next_call(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    states = States(tmp_path, CONFIG, ALONE)
    states.save(5, tree(5), wait=True)
    with monkeypatch.context() as patch:
        patch.setattr("rcm.checkpoints.dcp.sha256_file", full)
        states.save(6, tree(6))
        with pytest.raises(UserError, match=r"state after step 6 .*No space left on device"):
            states.save(7, tree(7))
        patch.setattr("rcm.checkpoints.dcp.sha256_file", lambda path: 1 / 0)
        states.save(8, tree(8))
        with pytest.raises(ZeroDivisionError):
            states.wait()
    states.wait()  # told once
    states.save(9, tree(9), wait=True)
    assert names(tmp_path) == ["000000005", "000000009"]  # and nothing half-written
    with monkeypatch.context() as patch, pytest.raises(UserError, match="step 10"), states:
        patch.setattr("rcm.checkpoints.dcp.sha256_file", full)
        states.save(10, tree(10))


def test_nothing_is_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, 5, 6)
        load(tmp_path)


@pytest.mark.parametrize("call", range(13))
def test_a_death_at_any_moment_leaves_whole_states(tmp_path, monkeypatch, call):
    """The process dies at the n-th call that changes names in the file system; the next run takes what is there."""
    folder = tmp_path / "run"
    save(folder, 1, 2)
    count = 0

    def dying(action):
        def act(*arguments, **options):
            nonlocal count
            count += 1
            if count > call:
                raise InterruptedError("killed")
            return action(*arguments, **options)

        return act

    with monkeypatch.context() as patch, States(folder, CONFIG, ALONE) as states:
        for target in ("pathlib.Path.rename", "pathlib.Path.replace", "pathlib.Path.mkdir", "os.rmdir", "os.unlink"):
            owner, name = target.rsplit(".", 1)
            patch.setattr(target, dying(getattr(Path if "Path" in owner else os, name)))
        states.save(3, tree(3))
        try:
            states.wait()
        except UserError as error:
            assert "killed" in str(error)
    died = count > call
    assert died or call > 8  # there are about eleven such calls
    assert load(folder) in (((2, 2), (3, 3)) if died else ((3, 3),))
    assert all(name.isdecimal() for name in names(folder))
    assert 2 <= len(names(folder)) <= 3
    for name in names(folder):
        shutil.copytree(folder / name, tmp_path / name / name)
        assert load(tmp_path / name) == (int(name), int(name))
    save(folder, 4)
    assert load(folder) == (4, 4)
    assert len(names(folder)) == KEPT


def test_a_death_while_states_are_removed_leaves_none_that_looks_damaged(tmp_path, monkeypatch):
    def dying(action, left):
        def act(*arguments, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return action(*arguments, **options)

        return act

    for call in range(9):
        save(tmp_path / "run", 1, 2)
        left = iter(range(call))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name in ("rename", "unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name), left))
            remove_states(tmp_path / "run")
        assert load(tmp_path / "run") in ((2, 2), None)
    remove_states(tmp_path / "run")


KILLED = """
import os, signal, sys
from pathlib import Path
import rcm.training.state
from tests.training.test_state import ALONE, CONFIG, States, tree

states = States(Path(sys.argv[1]), CONFIG, ALONE)
states.save(1, tree(1), wait=True)
rcm.training.state.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
states.save(2, tree(2), wait=True)
"""


def test_a_folder_is_for_one_process_at_a_time(tmp_path):
    save(tmp_path, 1)
    with States(tmp_path, CONFIG, ALONE), pytest.raises(UserError, match="another process works in"):
        (tmp_path / ".000000002.partial").mkdir()  # it is being written
        load(tmp_path)
    assert names(tmp_path) == [".000000002.partial", "000000001"]
    assert load(tmp_path) == (1, 1)


def test_kill(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", "src", "kernels"])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".000000002.partial", "000000001"]
    assert load(tmp_path) == (1, 1)
    assert names(tmp_path) == ["000000001"]


# --- Optimisers


def train(network, optimizer, updates, *, look=False):
    for update in range(updates):
        if look:
            optimizer_state(network, optimizer)
        torch.manual_seed(update)
        network(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def learner(seed=0):
    torch.manual_seed(seed)
    network = nn.Linear(3, 2)
    network.unused = nn.Parameter(torch.ones(2))  # without gradient: torch makes no state for it
    network.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    return network, torch.optim.AdamW(network.parameters(), lr=0.1, betas=(0.0, 0.9), fused=True)


def test_looking_at_an_optimiser_does_not_disturb_it():
    """Its state is there before the first update, and the run is the same as without, bit for bit."""
    (plain, one), (seen, two) = learner(), learner()
    state = optimizer_state(seen, two)
    assert state.keys() == {"weight", "bias", "unused"}
    assert {key: value.abs().sum() for key, value in state["weight"].items()} == dict.fromkeys(state["weight"], 0)
    assert state["weight"].keys() == {"exp_avg", "exp_avg_sq", "step"}
    seen.bias.grad = torch.ones(2)
    optimizer_state(seen, two)
    assert torch.equal(seen.bias.grad, torch.ones(2))
    assert seen.weight.grad is None
    assert two.param_groups[0]["lr"] == 0.1
    seen.zero_grad()
    train(plain, one, 3)
    train(seen, two, 3, look=True)
    assert torch.equal(plain.weight, seen.weight)
    assert torch.equal(one.state[plain.weight]["exp_avg_sq"], two.state[seen.weight]["exp_avg_sq"])
    assert two.state[seen.weight]["step"] == 3


@pytest.mark.parametrize("before", [0, 3])
def test_a_run_continues_bit_for_bit(tmp_path, before):
    (network, optimizer), (straight, alone) = learner(), learner()
    train(network, optimizer, before)
    with States(tmp_path, CONFIG, ALONE) as states:
        states.save(1, {"network": network.state_dict(), "optimizer": optimizer_state(network, optimizer)})
    other, fresh = learner(seed=1)
    with States(tmp_path, CONFIG, ALONE) as states:
        states.load({"network": other.state_dict(), "optimizer": optimizer_state(other, fresh)})
    train(other, fresh, 2)
    train(straight, alone, before)
    train(straight, alone, 2)
    assert torch.equal(other.weight, straight.weight)
    assert torch.equal(other.bias, straight.bias)
