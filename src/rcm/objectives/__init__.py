"""Distillation objectives: pure functions of networks, batch, times and noise.

rCM is the sum L_sCM + λ L_DMD, DMD2 is L_DMD + w L_adversarial; each term is a function, the training step weighs them.
Each returns a loss (squared errors summed over the elements of a sample and the samples at hand, over the size of the
global batch, so that parts of a batch add up) and metrics, sums over the samples (`…_sum`) to be divided likewise. A
sample with a value that is not finite adds nothing to either and is counted in `…_nan`.
"""

from rcm.objectives.adversarial import adversarial_critic_loss, adversarial_loss
from rcm.objectives.dcm import dcm_loss, dcm_times
from rcm.objectives.dmd import Rollout, balance, critic_loss, dmd_loss, roll_out, rollout_times
from rcm.objectives.meanflow import meanflow_loss
from rcm.objectives.scm import scm_loss, scm_tangent

__all__ = [
    "Rollout",
    "adversarial_critic_loss",
    "adversarial_loss",
    "balance",
    "critic_loss",
    "dcm_loss",
    "dcm_times",
    "dmd_loss",
    "meanflow_loss",
    "roll_out",
    "rollout_times",
    "scm_loss",
    "scm_tangent",
]
