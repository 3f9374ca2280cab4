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
    """A copy of `config`, or what `config/GROUP/NAME.yaml` says for a name; ValueError where there is none."""
    if not isinstance(config, str):
        return dict(config)
    if config not in options(group):
        raise ValueError(f"unknown {group} {config!r}: expected one of {', '.join(options(group))}")
    return yaml.safe_load((config_dir() / group / f"{config}.yaml").read_text(encoding="utf-8"))
