"""Which network learns at which iteration, and at which rate."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Alternation of student and critic over iterations 1, 2, ...

    The first `sole` student updates (H) follow one another, by the consistency loss alone; then come `critic_warmup`
    updates of the critic, which count for nothing else; then the student learns at every `every`-th (F-th) iteration
    and the critic at the others. Which ones are the student's says `phase`, with i counted without critic warm-up:

        after_warmup   (i - H) mod F = 0: F - 1 updates of the critic before each of the student's with DMD
        paper          i mod F = 0 (arXiv 2510.08431, algorithm 1); the same where F divides H, as in its table 4
        reference      (i - H - 1) mod F = 0: the public code, which counts from 0. Where there is an H, the first
                       update behind it comes before any of the critic and is without DMD too
    """

    student_updates: int
    sole: int = 0
    critic_warmup: int = 0
    every: int = 1
    phase: str = "after_warmup"

    @property
    def alone(self) -> int:
        """Updates of the student without DMD."""
        return self.sole + (self.phase == "reference" and self.sole > 0)

    @property
    def iterations(self) -> int:
        """The last iteration, which is the last update of the student."""
        joint = self.student_updates - self.sole
        if joint <= 0:
            return self.student_updates
        return self.sole + self.critic_warmup + joint * self.every - self._early

    @property
    def critic_updates(self) -> int:
        return self.iterations - self.student_updates

    def is_student(self, iteration: int) -> bool:
        if iteration <= self.sole:
            return True
        since = iteration - self.sole - self.critic_warmup
        return since > 0 and (since + self._early) % self.every == 0

    @property
    def _early(self) -> int:
        """By how many iterations the student's turns come earlier than after_warmup's."""
        return {"after_warmup": 0, "paper": self.sole % self.every, "reference": self.every - 1}[self.phase]


def learning_rate(peak: float, update: int, updates: int, warmup: int, decay: str) -> float:
    """The rate of update 1, 2, ... `updates`: a linear rise over `warmup` updates to `peak`, then the decay.

    `decay` is constant, or cosine: half a wave from `peak` to zero just behind the last update.
    """
    if update <= warmup:
        return peak * update / (warmup + 1)
    if decay == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (update - warmup - 1) / max(1, updates - warmup))) / 2
