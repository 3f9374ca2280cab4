"""Stages of checkpoints: download, convert, export."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcm.artefact import UserError, content_sha256, recording, verified_sha256
from rcm.cli.config import compose
from rcm.cli.sources import code_digest

if TYPE_CHECKING:
    from rcm.checkpoints import LazyState


def download(arguments: Namespace) -> None:
    """Fetch and verify one of the checkpoints that the configuration names."""
    from rcm.checkpoints import download as fetch
    from rcm.checkpoints.origins import public

    known = {name: entry for name, entry in compose(arguments.overrides)["checkpoints"].items() if entry}
    if arguments.name not in known:
        raise UserError(f"the configuration has no checkpoint {arguments.name!r}; expected one of {', '.join(known)}")
    wanted = known[arguments.name]
    told = {"name": arguments.name, **wanted, "source": public(wanted["source"])}
    with recording(arguments.out, stage="download", config=told):
        fetch(wanted["source"], arguments.out, wanted["sha256"])


def convert(arguments: Namespace) -> None:
    """Turn a checkpoint that fits the configured network into a DCP folder, in bounded memory."""
    from rcm.checkpoints import open_state, save_dcp, verify
    from rcm.cli.progress import Progress

    settings = compose(arguments.overrides)[arguments.network]
    hashes: dict[Path, str] = {arguments.checkpoint: ""}
    with recording(arguments.out, stage="convert", inputs=hashes, config={**settings, "dtype": arguments.dtype}):
        hashes[arguments.checkpoint] = verified_sha256(arguments.checkpoint, verify(arguments.checkpoint))
        state = open_state(arguments.checkpoint, verified=True)
        state = _cast(_of_network(state, settings, arguments.checkpoint), arguments.dtype)
        with Progress("convert", len(state), "tensors") as progress:
            save_dcp(arguments.out, state.watched(lambda name: progress.advance()))


def export(arguments: Namespace) -> None:
    """Write a student as .safetensors with all that sampling needs, as a plain .pth, and in diffusers' layout."""
    from rcm.checkpoints import export_diffusers, export_safetensors, open_dcp, save_pth
    from rcm.cli.models import EXPORTED
    from rcm.cli.networks import student_settings
    from rcm.cli.progress import Progress

    config = compose(arguments.overrides)
    if arguments.out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, got {str(arguments.out)!r}")
    settings = {key: config[key] for key in EXPORTED} | {"objective": config["objective"], "seed": config["seed"]}
    settings["network"] = student_settings(config)
    settings["guidance"] = config["distillation"]["guidance"]
    settings["parameterisation"] = PARAMETERISATION
    outputs = {
        "safetensors": arguments.out,
        "pth": arguments.out.with_suffix(".pth"),
        "diffusers": arguments.out.with_suffix(".diffusers"),
    }
    outputs = {name: outputs[name] for name in arguments.format or ("safetensors", "pth")}
    seed, student = config["seed"], arguments.student
    config = {**settings, "dtype": arguments.dtype}
    with recording(*outputs.values(), stage="export", inputs=[student], config=config, seed=seed):
        state = _cast(_of_network(open_dcp(student), settings["network"], student), arguments.dtype)
        settings |= {"student_sha256": content_sha256(student), "code_sha256": code_digest("export")}
        passes = len(outputs) + ("safetensors" in outputs)  # its checksum stands before the tensors
        with Progress("export", len(state) * passes, "tensors") as progress:
            state = state.watched(lambda name: progress.advance())
            if "safetensors" in outputs:
                export_safetensors(outputs["safetensors"], state, settings)
            if "pth" in outputs:
                save_pth(outputs["pth"], state)
            if "diffusers" in outputs:
                export_diffusers(outputs["diffusers"], state, settings["network"])


PARAMETERISATION = (  # of the exported weights, in words that outlive this code
    "rectified-flow velocity v(x_r, time_scale * r, text); the student is its TrigFlow wrapping, "
    "r = sin t / (cos t + sin t), x_r = x_t / (cos t + sin t), x0 = x_r - r v; guidance is distilled into the weights"
)


def _of_network(state: "LazyState", settings: Mapping[str, Any], where: Path) -> "LazyState":
    """The tensors of a checkpoint for a configured network, which is built without any memory."""
    import torch

    import rcm.networks
    from rcm.checkpoints import fitted

    try:
        with torch.device("meta"):
            network = rcm.networks.build(settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"the network of {where} cannot be built: {error}") from error
    return fitted(state, network.state_dict(), str(where), type(network).__name__, settings=settings)


def _cast(state: "LazyState", dtype: str) -> "LazyState":
    import torch

    return state if dtype == "keep" else state.cast(getattr(torch, dtype))
