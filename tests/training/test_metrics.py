import json
import sys
from types import SimpleNamespace

import pytest
import torch

from rcm.artefact import UserError
from rcm.parallel import start
from rcm.training.metrics import MetricsLog, means, totals


def write(path, rows, **options):
    log = MetricsLog(path, **options)
    for i in rows:
        log.write(i, {"loss": 1 / i})
    log.close()


def test_rows_behind_the_resumed_step_are_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"iteration": 8, "lo')  # killed while writing
    write(path, range(6, 8), step=5)
    assert path.read_bytes() == whole


def test_a_fresh_start_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(1, 3))
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2]


def test_figures_that_are_not_finite_are_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": float("nan"), "wall": {"seconds": float("inf")}, "role": "student"})
    log.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"iteration": 1, "loss": None, "wall": {"seconds": None}, "role": "student"}


def test_wandb_online_without_a_key_is_an_error_and_no_question(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="no key for wandb"):
        MetricsLog(tmp_path / "metrics.jsonl", wandb="online")


def test_a_resumed_run_is_the_same_one_in_wandb(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: begun.append(options)))
    for folder, seed in (("a", 0), ("a", 0), ("a", 1), ("b", 0)):
        MetricsLog(tmp_path / folder / "metrics.jsonl", wandb="offline", config={"seed": seed})
    assert {options["resume"] for options in begun} == {"allow"}
    first, resumed, *others = (options["id"] for options in begun)
    assert first == resumed
    assert len({first, *others}) == 3


def test_means_are_over_the_samples_that_count(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    sums = {"scm_loss": 0.5, "scm_tangent_norm_sum": 9.0, "scm_nan": 2.0, "gan_logit_sum": 10.0}
    figures, signals = totals({key: torch.tensor(value) for key, value in sums.items()}, 2, start(device="cpu"))
    assert (figures, signals) == (sums, 2)
    assert means(figures, 5) == {"scm_loss": 0.5, "scm_tangent_norm": 3.0, "scm_nan": 2.0, "gan_logit": 2.0}


def test_rows_are_read_back(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": float("nan")})
    assert log.rows() == [{"iteration": 1, "loss": None}]
    log.close()
