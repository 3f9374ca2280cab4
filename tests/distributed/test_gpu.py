"""Processes of one machine and its GPUs, of which there are none here."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from rcm.artefact import UserError
from rcm.parallel.gpu import _HELD, own_gpu


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: SimpleNamespace(uuid=f"gpu-{number}"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def taken() -> int:
    """What another process is given."""
    return own_gpu.__wrapped__()


def test_jobs_of_one_machine_take_different_gpus(two: None) -> None:
    held = len(_HELD)
    assert [taken(), taken(), taken()] == [0, 1, 0]  # the third waits for nobody
    _HELD.pop(held).close()  # the first ends
    assert taken() == 0
    for lock in _HELD[held:]:
        lock.close()
    del _HELD[held:]


def test_ranks_have_the_gpu_of_their_number(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert taken() == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"process 2 of this machine, .* there are 2: start as many .* --nnodes"):
        taken()
