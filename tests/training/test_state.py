import pytest
import torch

from rcm.artefact import UserError
from rcm.training.state import KEPT, differences, load_state, remove_states, save_state

CONFIG = {"seed": 0, "lr": 1e-6, "scm_time": {"name": "lognormal", "std": 1.6}, "rollout_times": [1.2, 0.9]}


def save(folder, *steps):
    for step in steps:
        save_state(folder, step, {"x": {"weight": torch.full((3,), float(step))}, "count": step}, CONFIG)


def test_the_newest_state_comes_back_and_old_ones_go(tmp_path):
    assert load_state(tmp_path / "run", CONFIG) is None
    save(tmp_path / "run", 5, 10, 15)
    step, state = load_state(tmp_path / "run", CONFIG)
    assert (step, state["count"]) == (15, 15)
    assert torch.equal(state["x"]["weight"], torch.full((3,), 15.0))
    assert len(list((tmp_path / "run").iterdir())) == KEPT == 2
    remove_states(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "header", "missing"])
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, capsys, damage):
    save(tmp_path, 5, 10)
    file = sorted(tmp_path.glob("*/state.pt"))[-1]
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-100])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "header":
        file.with_name("state.json").write_text("{")
    else:
        file.unlink()
    step, state = load_state(tmp_path, CONFIG)
    assert (step, state["count"]) == (5, 5)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "damaged" in warning
    assert file.parent.name in warning


def test_nothing_whole_means_a_fresh_start(tmp_path, capsys):
    save(tmp_path, 5)
    (tmp_path / "000000005" / "state.pt").write_bytes(b"")
    assert load_state(tmp_path, CONFIG) is None
    assert "damaged" in capsys.readouterr().err


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    save(tmp_path, 5)
    other = {**CONFIG, "lr": 1e-5, "scm_time": {"name": "lognormal", "std": 1.0}}
    with pytest.raises(UserError) as error:
        load_state(tmp_path, other)
    assert "lr was 1e-06, is 1e-05; scm_time.std was 1.6, is 1.0" in str(error.value)
    assert "seed" not in str(error.value)
    assert "\n" not in str(error.value)


def test_differences_name_absent_keys():
    assert differences({"a": 1}, {"b": {"c": 2}}) == ["a was 1, is absent", "b.c was absent, is 2"]
