"""Figures of every training step, as JSON lines and on request in wandb."""

import json
import math
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rcm.artefact import UserError, sha256_json, writing
from rcm.parallel import Mesh


class MetricsLog:
    """Append a row of figures per step to `path`; after a resume the file goes on as if nothing had happened.

    The values of a row depend on configuration and seed alone, except for those under the key `wall`.
    """

    def __init__(self, path: Path, *, step: int = 0, wandb: str = "disabled", config: Mapping[str, Any] | None = None):
        """Rows behind `step` are cut off. `wandb` is disabled, offline or online; `config` is shown there.

        Equal `config` and folder are one run there, which a resumed one goes on with.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        keep = _bytes_up_to(path, step)
        self._file = path.open("ab")
        self._file.truncate(keep)
        self._wandb = None if wandb == "disabled" else _wandb_run(wandb, dict(config or {}), path.parent)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        self._file.flush()
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Append the row of a step; figures that are not finite become null."""
        row = _finite({"iteration": step, **row})
        with writing(self.path):
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        if self._wandb is not None:
            self._wandb.log(row, step=step)

    def flush(self) -> None:
        """Put every row so far on the disk."""
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def totals(sums: Mapping[str, Tensor], signals: int, mesh: Mesh) -> tuple[dict[str, float], int]:
    """The sums over all samples, and the number of signals that all ranks have caught, in one message.

    Ranks of one context group hold the figures of the same samples, which count once.
    """
    values = torch.stack(
        [*(x.double() for x in sums.values()), torch.tensor(float(signals), dtype=torch.float64, device=mesh.device)]
    )
    if mesh.context_rank > 0:
        values[:-1] = 0
    if mesh.group is not None:
        dist.all_reduce(values, group=mesh.group)
    *figures, caught = values.tolist()
    return dict(zip(sums, figures, strict=True)), int(caught)


def means(sums: Mapping[str, float], batch: int) -> dict[str, float]:
    """Figures of a step: `x_y_sum` becomes `x_y`, its mean over those of the batch that `x_nan` does not count."""
    return {
        key.removesuffix("_sum"): value / max(1, batch - sums.get(f"{key.split('_')[0]}_nan", 0))
        if key.endswith("_sum")
        else value
        for key, value in sums.items()
    }


def _bytes_up_to(path: Path, step: int) -> int:
    """The length of the leading part of `path` that holds whole rows up to `step`."""
    size = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                try:
                    row_step = json.loads(line)["iteration"]
                except (ValueError, KeyError, TypeError):
                    break
                if row_step > step or not line.endswith(b"\n"):
                    break
                size += len(line)
    return size


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wandb_run(mode: str, config: dict[str, Any], folder: Path) -> Any:
    """A wandb run, kept in ./wandb or WANDB_DIR, that never asks for a key."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is not installed: `pip install wandb`, or set distillation.wandb=disabled") from None
    if mode == "online" and not _has_wandb_key():
        raise UserError("no key for wandb: run `wandb login`, set WANDB_API_KEY, or set distillation.wandb=offline")
    chosen: Any = mode
    identifier = sha256_json([config, str(folder.resolve())])[:32]
    return wandb.init(project="rcm", mode=chosen, config=config, id=identifier, resume="allow")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].rstrip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
