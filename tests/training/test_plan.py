"""The plan's formulas: against live tensors of the trainer's own steps, PyTorch's counter and the paper's numbers."""

from pathlib import Path

import pytest
import torch
import yaml
from benchmarks.plan_peak import compare, foretold, live
from torch.utils.flop_counter import FlopCounterMode

from rcm.artefact import UserError
from rcm.cli.config import config_dir, options
from rcm.cli.plan import read
from rcm.networks import build
from rcm.training.plan import Cluster, fitting, proposals
from rcm.training.plan_cost import forward_operations

TABLE4 = {  # experiment: parameters, iterations, updates of the student
    "wan2.1-1.3b-clips": (1_418_996_800, 10_000, 2_800),
    "wan2.1-14b-clips": (14_288_491_584, 10_000, 1_180),
    "cosmos-predict2-0.6b-images": (597_536_000, 80_000, 16_000),
    "cosmos-predict2-2b-images": (1_956_405_248, 30_000, 6_000),
    "cosmos-predict2-14b-images": (14_265_265_152, 25_000, 5_000),
}
SMALL = (
    *("network.width=128", "network.mlp_width=384", "network.heads=4", "network.layers=4", "synthesizer=${network}"),
    *("media=clips", "frames=13", "height=256", "width=256", "text.tokens=16", "text.width=64"),
    *("network.text_width=64", "distillation.batch=8", "parallel.micro_batch=2", "parallel.context=1"),
    *("distillation.discriminator.heads=4", "distillation.discriminator.layers=[1,3]"),
)
WAN, COSMOS = "experiment=wan2.1-1.3b-clips", "experiment=cosmos-predict2-2b-images"
CLIPS = ("dino", "clip_base", "aesthetic")  # whose weights score clips, which SMALL has of Cosmos too
SMALL_OF = {
    WAN: SMALL,
    COSMOS: (*SMALL, "evaluation.scorer=vbench-native", *(f"+checkpoints.{n}=${{checkpoints.codec}}" for n in CLIPS)),
}


@pytest.mark.parametrize(
    "given",
    [
        [WAN],
        [WAN, "parallel.recompute=none", "objective=dmd2"],
        [WAN, "parallel.recompute=matmuls", "parallel.precision=float32"],
        [WAN, "parallel.context=2", "distillation.batch=4"],
        [COSMOS, "parallel.tangent_pass=separate", "parallel.replicate=2"],
    ],
    ids=lambda given: " ".join(given),
)
def test_the_plan_is_what_a_step_holds(given: list[str]) -> None:
    """One of four ranks, on tensors with memory: the largest part within 5 %, weights and states to the byte."""
    job = read([given[0], *SMALL_OF[given[0]], *given[1:]])
    choice = job.choice(gpus=4)
    found, planned = live(job, choice, fake=False), foretold(job, choice)
    assert max(sum(sizes.values()) for sizes in found.values()) == pytest.approx(job.memory(choice), rel=0.05)
    for part in found.keys() & planned.keys() - {"optimiser"}:
        rows = compare(planned[part], found[part])
        for key in ("student", "fake score", "teacher", "EMA", "moments"):
            assert rows[key][0] == rows[key][1], (part, key)
        if job.settings.gan_weight == 0:  # else the discriminator's own pass, which the plan leaves out
            assert rows["gathered"][0] == pytest.approx(rows["gathered"][1], rel=0.02), part
        small = 0.1 if choice.layout.context > 1 else 0.06  # of 30 MB, where small things count
        assert rows["total"][0] == pytest.approx(rows["total"][1], rel=small), part


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["wan2.1-1.3b-clips", "cosmos-predict2-2b-images"])
def test_the_plan_holds_at_full_size(experiment: str) -> None:
    """32,760 tokens in 30 blocks and 4 x 4,080 in 28, without memory: every part within 1.5 %, activations too."""
    job = read([f"experiment={experiment}", "distillation.batch=32", "parallel.shard=null"])
    choice = job.choice(gpus=32 if experiment.startswith("wan") else 8)
    found = live(job, choice, fake=True)
    for part, planned in foretold(job, choice).items():
        if part != "optimiser":
            rows = compare(planned, found[part])
            for key in ("total", "activations", "gathered", "communication"):
                assert rows[key][0] == pytest.approx(rows[key][1], rel=0.015), (part, key)


@pytest.mark.parametrize("experiment", TABLE4)
def test_the_experiments_have_the_numbers_of_table_4(experiment: str) -> None:
    job = read([f"experiment={experiment}"])
    schedule = job.settings.schedule
    assert (job.sizes.total, schedule.iterations, schedule.student_updates) == TABLE4[experiment]
    assert experiment in options("experiment")


@pytest.mark.parametrize("path", sorted((config_dir() / "scale").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_distillation_has_the_time_that_the_plan_foretells(path: Path) -> None:
    pipeline = yaml.safe_load(path.read_text(encoding="utf-8"))
    (experiment,) = (name for name in options("experiment") if name.rpartition("-")[0] == path.stem)
    job, cluster = read([f"experiment={experiment}"]), Cluster(gpus=pipeline["nproc"])
    hours = job.steps(job.choice(cluster.gpus), cluster).hours(job.settings.schedule)
    assert hours < pipeline["hours"]["distill"] < 1.4 * hours


@pytest.mark.parametrize("kind", [WAN, COSMOS])
def test_products_are_those_that_pytorch_counts(kind: str) -> None:
    """Of one plain pass; attention is an operator of our own, which the counter does not know."""
    job = read([kind, *SMALL_OF[kind]])
    work = job.work(job.choice(gpus=4))
    with torch.device("meta"):
        network = build(job.network)
        inputs = torch.empty(2, *job.latents), torch.empty(2, 1), torch.empty(2, job.words, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    products, attention = forward_operations(work)
    assert products == pytest.approx(counter.get_total_flops(), rel=0.01)  # without the time's
    tokens, width, layers = 4 * 16 * 16, 128, 4
    assert attention == 2 * layers * 4 * width * tokens * (tokens + job.words)


def test_forward_equivalents_of_the_consistency_loss() -> None:
    """Teacher 2, dual 3, computed again 1, backward 2; a pass more where tangent and gradient have their own."""
    for tangent_pass, expected in (("shared", 8), ("separate", 9)):
        job = read(["experiment=wan2.1-1.3b-clips", f"parallel.tangent_pass={tangent_pass}"])
        alone = job.steps(job.choice(gpus=8), Cluster(gpus=8)).alone
        assert alone is not None and alone.equivalents == expected


def test_traffic_by_hand() -> None:
    """Four ranks of 2 x 2: gathers of the three networks and the exchange of two context groups."""
    job = read([WAN, *SMALL, "parallel.context=2", "distillation.batch=4", "objective=scm"])
    step = job.steps(job.choice(gpus=4), Cluster(gpus=4)).alone
    assert step is not None
    sizes = job.sizes
    precise = sum(sizes.numel(unit) for unit in sizes.precise)
    whole = 2 * (sizes.total - precise) + 4 * precise
    assert step.bytes["all-gather"] == pytest.approx(3 / 4 * 3 * whole)  # teacher, dual, backward
    assert step.bytes["reduce-scatter"] == pytest.approx(3 / 4 * 4 * sizes.total)
    tokens = 4 * 16 * 16 // 2 * 2  # of a rank, two samples
    passes = 4 * 2 + 8 + 4 + 4  # the teacher's doubled batch, the dual pass, again, backward
    assert step.bytes["all-to-all"] == pytest.approx(passes / 2 * 4 * tokens * 128 * 2)
    assert step.bytes["all-reduce"] == 0


@pytest.mark.parametrize("gpus", [8, 32, 64])
@pytest.mark.parametrize("experiment", TABLE4)
def test_table_4_fits(experiment: str, gpus: int) -> None:
    cluster = Cluster(gpus=gpus)
    found = fitting(read([f"experiment={experiment}"]), cluster, {})
    assert found[0].bytes <= 0.93 * 80 * 2**30
    assert all(p.choice.layout.world == gpus for p in found)
    assert found[0].hours <= min(p.hours for p in found) * 1.01


def test_what_cannot_be_is_refused_with_what_would_do() -> None:
    job = read(["experiment=wan2.1-14b-clips"])
    with pytest.raises(UserError, match=r"32 GPUs do not divide as stated: parallel\.context=10"):
        proposals(job, Cluster(gpus=32), {"context": 10})
    with pytest.raises(
        UserError, match="context is 16, which does not divide the network's 40 heads; allowed: 1, 2, 4"
    ):
        proposals(job, Cluster(gpus=32), {"context": 16})
    with pytest.raises(UserError, match=r"batch is 64, but 128 groups .* take at least 128, or fewer processes"):
        proposals(job, Cluster(gpus=128), {"context": 1})
    with pytest.raises(UserError, match=r"do not fit 8 GPUs: .* GiB more than .* this fits: parallel.replicate=1"):
        fitting(job, Cluster(gpus=8), {"recompute": "none"})
    with pytest.raises(UserError, match=r"nothing fits 8 GPUs: .* (16|32) GPUs would do: parallel"):
        fitting(job, Cluster(gpus=8, memory=40 * 2**30), {})


def test_shards_are_padded() -> None:
    """An axis of 10 on 4 ranks takes 3 rows on the first."""
    sizes = read([WAN, *SMALL]).sizes
    sizes.shapes = {"block": [torch.Size((10, 7))], "head": [], "root": []}
    assert sizes.shard("block", 4) == 21
