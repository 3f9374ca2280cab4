"""rCM: L_sCM + λ L_DMD, consistency with the distribution of samples as its regulariser (arXiv 2510.08431, alg. 1).

The sum is taken by the training step, as two backward passes into the same gradients: one graph in memory at a time.
"""

import math


def balance(weight: float, elements: int) -> float:
    """λ √D, the weight that tells: the DMD gradient of a sample grows with √D (D elements), that of sCM does not.

    The paper's λ = 0.01 is 14 for Wan2.1 1.3B at 480p (D = 1,996,800).
    """
    return weight * math.sqrt(elements)
