import pytest
import torch

from rcm.artefact import UserError
from rcm.parallel.mesh import Layout, fit, start


def describe(replicate, shard, context):
    mesh = start(replicate=replicate, shard=shard, context=context, device="cpu")
    value = torch.tensor(float(10**mesh.rank))
    return mesh.data_rank, mesh.context_rank, mesh.total(value).item(), mesh.broadcast_object(mesh.rank + 7)


def test_context_counts_fastest_and_totals_count_every_sample_once(ranks):
    assert ranks(4, describe, 1, None, 2) == [(0, 0, 101.0, 7), (0, 1, 1010.0, 7), (1, 0, 101.0, 7), (1, 1, 1010.0, 7)]
    assert ranks(4, describe, 2, None, 1) == [(rank, 0, 1111.0, 7) for rank in range(4)]


def test_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    mesh = start(device="cpu")
    assert (mesh.group, mesh.world, mesh.is_main, mesh.data_size) == (None, 1, True, 1)
    assert mesh.total(torch.tensor(3.0)) == 3


def test_sizes_that_do_not_fit_are_named():
    assert fit(8, 2, None, 2) == Layout(2, 2, 2)
    with pytest.raises(UserError, match=r"1 process does not fit .* 1 x parallel.shard 1 x parallel.context 2 = 2"):
        fit(1, 1, None, 2)
    with pytest.raises(UserError, match=r"6 processes do not fit .* = 4: start 4 processes"):
        fit(6, 2, None, 2)
