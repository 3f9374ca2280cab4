import pytest
import torch
import torch.distributed as dist

from rcm.artefact import UserError
from rcm.parallel.mesh import Layout, fit, start


def describe(replicate, shard, context):
    mesh = start(replicate=replicate, shard=shard, context=context, device="cpu", timeout=77)
    groups = [mesh.parameters.get_group(axis) for axis in range(mesh.parameters.ndim)]
    if context < mesh.world:
        groups.append(mesh.context_group)
    limits = {g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups if g.size() < 4}
    total = torch.tensor(float(10**mesh.rank))
    dist.all_reduce(total, group=mesh.context_group)
    return mesh.data_rank, mesh.context_rank, total.item(), mesh.parameters.mesh.tolist(), limits


def test_context_counts_fastest(ranks):
    found = ranks(4, describe, 1, None, 2)
    assert [row[:3] for row in found] == [(0, 0, 11.0), (0, 1, 11.0), (1, 0, 1100.0), (1, 1, 1100.0)]
    assert found[0][3] == [0, 1, 2, 3]


def test_copies_are_neighbours_apart(ranks):
    found = ranks(4, describe, 2, None, 1)
    assert [row[:3] for row in found] == [(rank, 0, 10.0**rank) for rank in range(4)]
    assert found[0][3] == [[0, 1], [2, 3]]


def test_every_group_has_the_stated_time_out(ranks):
    assert ranks(4, describe, 2, None, 2)[0][4] == {77.0}


def test_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    mesh = start(device="cpu")
    assert (mesh.group, mesh.world, mesh.is_main, mesh.data_size) == (None, 1, True, 1)


def test_sizes_that_do_not_fit_are_named():
    assert fit(8, 2, None, 2) == Layout(2, 2, 2)
    with pytest.raises(UserError, match=r"1 process does not fit .* 1 x parallel.shard 1 x parallel.context 2 = 2"):
        fit(1, 1, None, 2)
    with pytest.raises(UserError, match=r"6 processes do not fit .* = 4: start 4 processes"):
        fit(6, 2, None, 2)
