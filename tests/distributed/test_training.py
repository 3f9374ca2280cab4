"""Three updates of a distillation (student by sCM, critic, student by sCM and DMD) on ranks against the plain run.

Float64 throughout: losses, gradients and updated weights must agree to 1e-12 whatever is sharded, sliced or recomputed.
"""

import functools

import pytest
import torch
from tests.training.test_distill import configuration
from torch import nn

from rcm import networks
from rcm.data.shards import LatentDataset, Sample
from rcm.data.stream import stream
from rcm.networks.discriminator import FakeScore
from rcm.parallel import COUNTER, parallelize, start
from rcm.training.batches import Draws, shares
from rcm.training.metrics import means, totals
from rcm.training.settings import Settings
from rcm.training.sharded import local
from rcm.training.updates import Distillation

SIZES = {"kind": "wan", "width": 16, "mlp_width": 32, "layers": 2, "heads": 2, "in_channels": 4, "out_channels": 4,
         "text_width": 8, "time_width": 16, "patch": [1, 1, 1], "time_scale": 10.0}  # fmt: skip
SHORT = {
    "student_updates": 2, "tangent_warmup": 0, "scm_only": 1, "critic_warmup": 0, "student_every": 2,
    "batch": 5, "max_rollout": 2, "eps": 1e-3, "lr_decay": "constant", "lr_warmup": 0,
}  # fmt: skip
SEPARATE = {"tangent_pass": "separate"}


def network(seed, **sizes):
    torch.manual_seed(seed)
    built = networks.build({**SIZES, **sizes}).double()
    nn.init.normal_(built.head.head.weight, std=0.3)
    return built


def fake_score(method):
    score = network(2)
    if method != "dmd2":
        return score
    built = FakeScore(score, width=16, layers=[0, 1], heads=2).double()
    nn.init.normal_(built.branch.logit.weight, std=0.3)
    return built


def data():
    """Samples of nine tokens, which two ranks of a context group cannot share evenly."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return LatentDataset([Sample(i, "", i, draw(4, 1, 3, 3), draw(i % 3 + 1, 8)) for i in range(11)], {})


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def spy(learner, seen):
    """Note the gradients that each update is made along."""
    update = learner.update

    def noted():
        seen.append({name: whole(p.grad) for name, p in learner.parameters.items() if p.grad is not None})
        return update()

    learner.update = noted


def three_updates(layout=None, options=None, parallel=None, method="rcm", changes=None):
    """Figures and gradients of each update, weights and averages behind the last; `layout` None: the plain run."""
    torch.set_num_threads(1)
    settings, parallel = Settings.of(configuration(method, **SHORT, **(changes or {}))), parallel or {}
    mesh = start(**(layout or {}), device="cpu")
    student, teacher, fake = network(1, second_time=method == "meanflow"), network(0), fake_score(method)
    if layout is not None:
        offload = (options or {}).pop("offload", False) if options else False
        parallelize(teacher, mesh, trainable=False, offload=offload)
        for learns in (student, fake):
            parallelize(learns, mesh, **(options or {}))
    mine = shares(settings.batch, mesh.data_size, parallel.get("micro_batch"))[mesh.data_rank]
    null_text = torch.zeros(1, 3, 8)
    draws = [Draws(null_text, settings, part, mesh.device) for part in mine]
    run = Distillation(
        settings,
        student,
        fake if settings.dmd_weight > 0 else None,
        teacher,
        draws,
        tangent_pass=parallel.get("tangent_pass", "shared"),
    )
    gradients, rows = [], []
    positions = [position for part in mine for position in part]
    for role, learner in run.learners.items():
        spy(learner, gradients)
        with stream(data(), batch=settings.batch, positions=positions, seed=5, start=0, words=3) as batches:
            run.feeds[role] = batches
    COUNTER.equivalents()
    for iteration in range(1, settings.schedule.iterations + 1):
        row, sums = run.step(iteration)
        rows.append({**row, **means(totals(sums, 0, mesh)[0], settings.batch)})
    weights = {f"{role}.{n}": whole(p) for role, le in run.learners.items() for n, p in le.network.named_parameters()}
    averages = {f"ema.{name}": whole(value) for name, value in run.ema.average.items()}
    return rows, gradients, weights | averages, COUNTER.equivalents()


@functools.cache
def plain(method="rcm"):
    return three_updates(parallel=SEPARATE, method=method)


def assert_close(results, expected):
    """What every rank has against the plain run."""
    for rows, gradients, weights, _ in results:
        for row, other in zip(rows, expected[0], strict=True):
            assert row.pop("role") == other["role"]
            assert row == pytest.approx({k: v for k, v in other.items() if k != "role"}, rel=1e-12, abs=1e-12)
        for one, other in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights, expected[2], rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_the_plain_run_learns():
    rows, gradients, weights, _ = plain()
    assert [row["role"] for row in rows] == ["student", "critic", "student"]
    assert [len(found) for found in gradients] == [len(list(network(1).parameters()))] * 3
    assert {"scm_loss", "dmd_loss"} <= rows[2].keys() and "dmd_loss" not in rows[0]
    before = dict(network(1).named_parameters())
    moved = [(weights[f"student.{name}"] - p).abs().max().item() for name, p in before.items()]
    assert min(moved) > 1e-6


@pytest.mark.parametrize("options", [{"recompute": "none"}, {"recompute": "blocks"}, {"recompute": "matmuls"}])
@pytest.mark.parametrize("tangent_pass", ["shared", "separate"])
def test_recomputation_and_passes_on_one_process(options, tangent_pass):
    found = three_updates({}, options, {"tangent_pass": tangent_pass})
    assert_close([found], plain())


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_on_one_process(micro_batch):
    assert_close([three_updates({}, parallel={"micro_batch": micro_batch})], plain())


@pytest.mark.parametrize(
    ("world", "layout", "options", "parallel"),
    [
        pytest.param(2, {}, {"recompute": "blocks"}, {}, id="fsdp"),
        pytest.param(2, {}, {"recompute": "matmuls"}, SEPARATE, id="fsdp-separate"),
        pytest.param(2, {}, {"offload": True}, {"micro_batch": 2}, id="fsdp-offload-micro-batches"),
        pytest.param(4, {"replicate": 2}, {"recompute": "blocks"}, {}, id="hsdp"),
        pytest.param(2, {"context": 2}, {}, {}, id="context"),
        pytest.param(4, {"context": 2}, {"recompute": "blocks"}, {"micro_batch": 2}, id="fsdp-context"),
    ],
)
def test_ranks_give_the_plain_run(ranks, world, layout, options, parallel):
    assert_close(ranks(world, three_updates, layout, options, parallel), plain())


@pytest.mark.parametrize("method", ["dcm", "meanflow", "dmd", "dmd2"])
def test_other_methods_on_ranks(ranks, method):
    layout, options = ({"context": 2}, {}) if method == "dmd2" else ({}, {"recompute": "blocks"})
    assert_close(ranks(2, three_updates, layout, options, {}, method), plain(method))


def test_a_step_costs_what_is_claimed():
    """Of sCM: teacher 2 (guided), student 3 with tangent, 1 again and 2 backwards; in two passes one more."""
    scm = {way: three_updates({}, {"recompute": "blocks"}, {"tangent_pass": way})[3] for way in ("shared", "separate")}
    assert scm["shared"]["scm"] == pytest.approx(8)
    assert scm["separate"]["scm"] == pytest.approx(9)
    # the critic's rollout has two steps in update 1 of a cycle of one and two: one step here, then 1 + 2 + 1
    assert scm["shared"]["critic"] == pytest.approx(1 + 1 + 2 + 1)


def faulty_update(layout):
    """An update along gradients of which some are not finite, on one rank alone; figures, and what was zeroed."""
    run, mesh = None, start(**layout, device="cpu")
    from rcm.training.learner import Learner

    built = network(1)
    parallelize(built, mesh)
    run = Learner(built, 0.1, 10, Settings.of(configuration()))
    for parameter in run.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    bias = run.parameters["head.head.bias"]  # four elements, two on each rank
    if mesh.rank == 1:
        local(bias.grad)[0] = float("nan")
    count = sum(p.numel() for p in run.parameters.values())
    figures = run.update()
    return figures["nonfinite_gradients"], figures["gradient_norm"] ** 2, count, whole(run.state()["optimizer"][
        "head.head.bias"]["exp_avg"])  # fmt: skip


def test_faulty_gradients_are_counted_over_ranks(ranks):
    for faulty, squares, count, moment in ranks(2, faulty_update, {}):
        assert faulty == 1
        assert squares == pytest.approx(count - 1)  # as many ones are left
        assert moment.tolist() == [1, 1, 0, 1]
