"""Which code a stage rests on: what is behind the names that it imports, and nothing that a package has beside them."""

import importlib.metadata

from rcm.cli.parser import STAGES
from rcm.cli.sources import NUMBERLESS, _version, code_digest, reached, stage_code


def test_a_stage_rests_on_what_it_uses() -> None:
    modules = {stage: set(reached(stage)[1]) for stage in STAGES}
    assert {"rcm.networks.wan", "rcm.sampling.teacher", "rcm.data.samples", "flash_jvp.plain"} <= modules["synthesize"]
    assert {"rcm.training.updates", "rcm.parallel.unit", "rcm.objectives.scm"} <= modules["distill"]
    for stage in ("synthesize", "distill", "sample", "convert", "download"):
        assert not {"rcm.checkpoints.transfer", "rcm.checkpoints.origins", "flash_jvp.tuning"} & modules[stage], stage
    assert not {name for name in modules["synthesize"] if name.startswith(("rcm.training", "rcm.evaluation"))}
    assert not {name for name in modules["prompts"] if name.startswith(("rcm.networks", "rcm.checkpoints"))}
    assert len({code_digest(stage) for stage in ("prompts", "synthesize", "distill", "sample")}) == 4


def test_packages_count_by_their_installed_version() -> None:
    providers = importlib.metadata.packages_distributions()
    for package in set().union(*(reached(stage)[2] for stage in STAGES)) - NUMBERLESS:
        installed = {importlib.metadata.version(name).partition("+")[0] for name in providers[package]}
        assert _version(package) in installed, package
    words = stage_code("evaluate").split()
    assert {"numpy", "torch", "cv2", "scipy", "PIL"} <= set(words) and not any("+" in word for word in words)
    assert "PIL" not in stage_code("distill")  # it draws what is looked at meanwhile
