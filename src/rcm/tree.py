"""Where the Hydra tree lies, and what one of its files says: sizes of networks, codecs and text encoders by name."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rcm.artefact import UserError


def config_dir() -> Path:
    """The folder of the Hydra tree: RCM_CONFIG_DIR, or `config` of the working copy, or of the current folder."""
    given = os.environ.get("RCM_CONFIG_DIR")
    candidates = [Path(given)] if given else [Path(__file__).parents[2] / "config", Path("config")]
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    where = f"RCM_CONFIG_DIR is {given!r}" if given else "run from the root of the repository or set RCM_CONFIG_DIR"
    raise UserError(f"no config.yaml in {' or '.join(map(str, candidates))}: {where}")


def options(group: str) -> list[str]:
    """Names of the configurations in a group, such as the experiments."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def settings_of(group: str, config: Mapping[str, Any] | str) -> dict[str, Any]:
    """A copy of `config`, or what `config/GROUP/NAME.yaml` says for a name.

    ValueError where there is none, or one that takes sizes from other sections of an experiment.
    """
    if not isinstance(config, str):
        return dict(config)
    texts = {name: (config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8") for name in options(group)}
    whole = [name for name, text in texts.items() if "${" not in text]
    if config not in whole:
        what = f"{group} {config!r} is part of an experiment" if config in texts else f"unknown {group} {config!r}"
        raise ValueError(f"{what}: expected one of {', '.join(whole)}")
    return yaml.safe_load(texts[config])
