"""Which code a stage rests on: what is behind the names that it imports, and nothing that a package has beside them."""

from rcm.cli.parser import STAGES
from rcm.cli.sources import code_digest, reached


def test_a_stage_rests_on_what_it_uses() -> None:
    modules = {stage: set(reached(stage)[1]) for stage in STAGES}
    assert {"rcm.networks.wan", "rcm.sampling.teacher", "rcm.data.samples", "flash_jvp.plain"} <= modules["synthesize"]
    assert {"rcm.training.updates", "rcm.parallel.unit", "rcm.objectives.scm"} <= modules["distill"]
    for stage in ("synthesize", "distill", "sample", "convert", "download"):
        assert not {"rcm.checkpoints.transfer", "rcm.checkpoints.origins", "flash_jvp.tuning"} & modules[stage], stage
    assert not {name for name in modules["synthesize"] if name.startswith(("rcm.training", "rcm.evaluation"))}
    assert not {name for name in modules["prompts"] if name.startswith(("rcm.networks", "rcm.checkpoints"))}
    assert len({code_digest(stage) for stage in ("prompts", "synthesize", "distill", "sample")}) == 4
