"""Known signs of a training that goes wrong, looked for in the figures of every step.

What an alarm knows it has from the rows of the metrics alone, so a resumed run reads them again and goes on exactly.
"""

import math
import statistics
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

FAULTY_SHARE = 0.1  # of a batch: samples that are not finite
LEAP = 10.0  # times the running median: a tangent that explodes
GROWTH = 3.0  # times the lowest running median so far: a slow drift
WINDOW = 50  # updates of a network that a running median covers

ADVICE = {
    "faulty_samples": "samples that are not finite are left out of the loss: look at the data, lower the learning "
    "rate, or compute in float32 (parallel.precision)",
    "faulty_gradients": "gradients that are not finite were set to zero: lower the learning rate, or compute in "
    "float32 (parallel.precision)",
    "no_gradient": "nothing is learned: all samples are left out, or the student is exact already",
    "tangent_leap": "the derivative in time explodes: a longer distillation.tangent_warmup, a lower student_lr, "
    "parallel.precision=float32, or distillation.derivative=semi_continuous may hold it",
    "dmd_drift": "fake score and teacher drift apart on the student's samples, which then lose detail or turn to one "
    "colour: more critic updates (student_every, critic_warmup), a lower student_lr, or a lower dmd_weight",
    "critic_drift": "the fake score does not follow the student: a higher critic_lr, more critic updates "
    "(student_every), or a lower student_lr",
}


class Alarms:
    """Looks at one row after the other, and says each cause once."""

    def __init__(self, batch: int):
        self.batch = batch
        self.said: set[str] = set()
        self._tangents: deque[float] = deque(maxlen=WINDOW)
        self._drifts = {"dmd_gap": _Drift("dmd_drift"), "critic_loss": _Drift("critic_drift")}

    def look(self, row: Mapping[str, Any], *, speak: bool = True) -> list[str]:
        """The names of the alarms that a row sets off; a line on stderr for each that is new."""
        found = [name for name, sets_off in self._signs(row).items() if sets_off]
        for name in found:
            if speak and name not in self.said:
                where = f"{row['role']} update {row['update']}"
                print(f"alarm: {name.replace('_', ' ')} at {where}: {ADVICE[name]}", file=sys.stderr, flush=True)
            self.said.add(name)
        return found

    def _signs(self, row: Mapping[str, Any]) -> dict[str, bool]:
        faulty = max((value for key, value in row.items() if key.endswith("_nan")), default=0)
        tangent = _number(next((value for key, value in row.items() if key.endswith("_tangent_norm")), None))
        signs = {
            "faulty_samples": faulty > FAULTY_SHARE * self.batch,
            "faulty_gradients": row["nonfinite_gradients"] > 0,
            "no_gradient": row["gradient_norm"] == 0,
            "tangent_leap": math.isfinite(tangent) and self._leaps(tangent),
        }
        for key, drift in self._drifts.items():
            value = _number(row.get(key))
            signs[drift.name] = math.isfinite(value) and drift.takes(value)
        return signs

    def _leaps(self, tangent: float) -> bool:
        known = len(self._tangents) == WINDOW and tangent > LEAP * statistics.median(self._tangents)
        self._tangents.append(tangent)
        return known


class _Drift:
    """A figure whose running median has risen far above the lowest one so far."""

    def __init__(self, name: str):
        self.name, self.lowest = name, math.inf
        self._last: deque[float] = deque(maxlen=WINDOW)

    def takes(self, value: float) -> bool:
        self._last.append(value)
        if len(self._last) < WINDOW:
            return False
        median = statistics.median(self._last)
        self.lowest = min(self.lowest, median)
        return median > GROWTH * self.lowest


def _number(value: float | None) -> float:
    """NaN for what is not there, and for what a file has as null."""
    return math.nan if value is None else value
