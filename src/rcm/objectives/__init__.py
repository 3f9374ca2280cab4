"""Distillation objectives: pure functions of networks, batch, times and noise.

rCM is the sum L_sCM + λ L_DMD; the training step takes it as two backward passes into the same gradients, one graph
in memory at a time. Each returns a loss (squared errors summed over the elements of a sample, averaged over the
samples) and metrics. A sample with a value that is not finite adds nothing to the loss and is counted in `…_nan`.
"""

from rcm.objectives.dmd import Rollout, balance, critic_loss, dmd_loss, rollout_times
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
