"""Distillation objectives: pure functions of networks, batch, times and noise.

Each returns a loss (squared errors summed over the elements of a sample, averaged over the samples) and metrics.
A sample with a value that is not finite adds nothing to the loss and is counted in the metric `…_nan`.
"""

from rcm.objectives.dmd import Rollout, critic_loss, dmd_loss, rollout_times
from rcm.objectives.rcm import balance
from rcm.objectives.scm import scm_loss, scm_tangent

__all__ = [
    "Rollout",
    "balance",
    "critic_loss",
    "dmd_loss",
    "rollout_times",
    "scm_loss",
    "scm_tangent",
]
