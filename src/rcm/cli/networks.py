"""The networks of a distillation, built and shared over the ranks: student, teacher and fake score.

They begin as the teacher. Each rank reads its own part of the checkpoint; nothing is built as a whole anywhere, but for
the few weights that a teacher does not have (MeanFlow's second time, DMD2's branch), which follow from the seed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import rcm.networks
from rcm.artefact import UserError
from rcm.checkpoints import load_sharded
from rcm.networks.discriminator import Discriminator, FakeScore
from rcm.parallel import Mesh, parallelize
from rcm.training.settings import Parallel, Settings

SECOND_TIME = "second_time_embedding."


class Networks(NamedTuple):
    student: nn.Module
    teacher: nn.Module
    fake: nn.Module | None  # where there is DMD


def student_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section `network` of a student: MeanFlow's knows a second time."""
    second = {"second_time": True} if config["objective"]["consistency"] == "meanflow" else {}
    return {**config["network"], **second}


def open_networks(config: Mapping[str, Any], folder: Path, mesh: Mesh) -> Networks:
    """Build all on the device of `mesh`, each as `parallel` says, from the teacher in the DCP folder."""
    settings, parallel = Settings.of(config), Parallel.of(config)
    common: dict[str, Any] = {"precision": parallel.precision, "compile": parallel.compile}
    try:
        with torch.device("meta"):
            teacher = rcm.networks.build(config["network"])
            student = rcm.networks.build(student_settings(config))
            fake = _fake_score(config, settings) if settings.dmd_weight > 0 else None
    except (TypeError, ValueError) as error:
        raise UserError(f"the network of {folder} cannot be built: {error}") from error
    parallelize(teacher, mesh, trainable=False, offload=parallel.offload_teacher, **common)
    teacher.eval().to_empty(device="cpu" if parallel.offload_teacher and mesh.group else mesh.device)
    load_sharded(teacher, folder, mesh)
    for network in (student, fake):
        if network is not None:
            parallelize(network, mesh, recompute=parallel.recompute, **common)
            network.to_empty(device=mesh.device)
    load_sharded(student, folder, mesh, without=SECOND_TIME, verified=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.consistency == "meanflow":
            small = rcm.networks.build({**student_settings(config), "layers": 1}).state_dict()
            _fill(student, {name: value for name, value in small.items() if name.startswith(SECOND_TIME)})
        if isinstance(fake, FakeScore):
            shape = settings.discriminator
            _fill(
                fake.branch,
                Discriminator(config["network"]["width"], shape["heads"], len(shape["layers"])).state_dict(),
            )
    if fake is not None:
        load_sharded(fake.score if isinstance(fake, FakeScore) else fake, folder, mesh, verified=True)
    return Networks(student.train(), teacher, fake)


def _fake_score(config: Mapping[str, Any], settings: Settings) -> nn.Module:
    score = rcm.networks.build(config["network"])
    if settings.gan_weight == 0:
        return score
    shape = settings.discriminator
    return FakeScore(score, width=config["network"]["width"], layers=shape["layers"], heads=shape["heads"])


@torch.no_grad()
def _fill(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters, sharded or not, values that every rank has as a whole."""
    state = network.state_dict()
    for name, value in values.items():
        place, value = state[name], value.to(state[name].device, state[name].dtype)
        if isinstance(place, DTensor):
            value = distribute_tensor(value, place.device_mesh, place.placements)
        place.copy_(value)
