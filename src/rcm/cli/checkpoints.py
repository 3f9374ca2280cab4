"""Stages of checkpoints: download, convert, export."""

from argparse import Namespace

from rcm.artefact import UserError, content_sha256, recording
from rcm.cli.config import compose


def download(arguments: Namespace) -> None:
    """Fetch and verify one of the checkpoints that the configuration names."""
    from rcm.checkpoints import download as fetch

    wanted = compose(arguments.overrides)["checkpoints"][arguments.name]
    with recording(arguments.out, stage="download", config={"name": arguments.name, **wanted}):
        fetch(wanted["source"], wanted["sha256"], arguments.out)


def convert(arguments: Namespace) -> None:
    """Turn a .pth that fits the configured network into a DCP folder."""
    from rcm.checkpoints import load_pth, save_dcp
    from rcm.cli.models import network

    config = compose(arguments.overrides)["network"]
    with recording(arguments.out, stage="convert", inputs=[arguments.checkpoint], config=config):
        state = load_pth(arguments.checkpoint)
        network(config, state, arguments.checkpoint)
        save_dcp(arguments.out, state)


def export(arguments: Namespace) -> None:
    """Write a student as .safetensors with all that sampling needs, and as a plain .pth."""
    from rcm.checkpoints import export_safetensors, load_dcp, save_pth
    from rcm.cli.models import EXPORTED, network
    from rcm.cli.networks import student_settings

    config = compose(arguments.overrides)
    if arguments.out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, got {str(arguments.out)!r}")
    plain = arguments.out.with_suffix(".pth")
    settings = {key: config[key] for key in EXPORTED} | {"objective": config["objective"], "seed": config["seed"]}
    settings["network"] = student_settings(config)
    outputs, seed = (arguments.out, plain), config["seed"]
    with recording(*outputs, stage="export", inputs=[arguments.student], config=settings, seed=seed):
        state = load_dcp(arguments.student)
        network(settings["network"], state, arguments.student)
        settings["student_sha256"] = content_sha256(arguments.student)
        export_safetensors(arguments.out, state, settings)
        save_pth(plain, state)
