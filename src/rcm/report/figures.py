"""The figures, as PNG bytes: the same inputs give the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def figure_samples(samples: Sequence[Path], *, prompts: int = 8) -> bytes:
    """Same seeds for all: a row a prompt; columns teacher, then sCM, DMD and rCM at 1, 2 and 4 steps.

    `samples` are folders in GenEval's layout as the sample stage writes them, `.../{model}-{steps}/{suite}/{part}`, in any
    order and number of parts; model and steps are read from the path.
    """
    raise NotImplementedError


def figure_clips(samples: Sequence[Path], *, prompts: int = 4) -> bytes:
    """Clips as film strips: a block a prompt, a row a model, frames side by side. Input as `figure_samples`."""
    raise NotImplementedError


def figure_quality_diversity(scores: Sequence[Mapping[str, Any]]) -> bytes:
    """ShapeEval overall against diversity, a point a model and number of steps, with 95 % intervals."""
    raise NotImplementedError


def figure_training(metrics: Sequence[Path]) -> bytes:
    """Losses, tangent norm and gradient norms against the step; `metrics` are `.../{method}-{seed}/metrics.jsonl`."""
    raise NotImplementedError
