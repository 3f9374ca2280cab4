"""rCM: the sum of sCM and λ · DMD, consistency with the distribution of samples as its regulariser (arXiv 2510.08431, algorithm 1)."""

import math

from rcm.objectives.loss import Loss


def rcm_loss(scm: Loss, dmd: Loss, weight: float) -> Loss:
    """L_sCM + λ L_DMD of what `scm_loss` and `dmd_loss` return, λ the weight, with the metrics of both."""
    return scm[0] + weight * dmd[0], scm[1] | dmd[1]


def balance(weight: float, elements: int) -> float:
    """λ √D, the weight that tells: the DMD gradient of a sample grows with √D (D elements), that of sCM does not.

    The paper's λ = 0.01 is 14 for Wan2.1 1.3B at 480p (D = 1,996,800).
    """
    return weight * math.sqrt(elements)
