"""Which network learns at which iteration, and at which rate."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Alternation of student and critic over iterations 1, 2, ...

    The first `sole` student updates follow one another (sCM alone acts); then come `critic_warmup` updates of the
    critic; then the student learns at every `every`-th iteration and the critic at the others. This is the paper's
    Algorithm 1, `i <= H or i mod F == 0`, with i counted from the end of the warm-up, so that the critic always has
    F - 1 updates before a student's; both agree where F divides H, as it does in the paper's Table 4.
    """

    student_updates: int
    sole: int = 0
    critic_warmup: int = 0
    every: int = 1

    @property
    def iterations(self) -> int:
        """The last iteration, which is the last update of the student."""
        joint = self.student_updates - self.sole
        return self.student_updates if joint <= 0 else self.sole + self.critic_warmup + joint * self.every

    @property
    def critic_updates(self) -> int:
        return self.iterations - self.student_updates

    def is_student(self, iteration: int) -> bool:
        if iteration <= self.sole:
            return True
        since = iteration - self.sole - self.critic_warmup
        return since > 0 and since % self.every == 0


def learning_rate(peak: float, update: int, updates: int, warmup: int, decay: str) -> float:
    """The rate of update 1, 2, ... `updates`: a linear rise over `warmup` updates to `peak`, then the decay.

    `decay` is constant, or cosine: half a wave from `peak` to zero just behind the last update.
    """
    if update <= warmup:
        return peak * update / (warmup + 1)
    if decay == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (update - warmup - 1) / max(1, updates - warmup))) / 2
