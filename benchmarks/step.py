"""Time and memory of one student's and one critic's step, split by part, and the memory beside that of `rcm plan`.

    python benchmarks/step.py experiment=wan2.1-1.3b-clips           # a GPU: the most frames that fit
    python benchmarks/step.py experiment=tiny-images                 # no GPU: this CPU, time alone

One process, random weights, the longest rollout. On a GPU: bfloat16, blocks recomputed, one sample, and of the
configuration's latent frames as many as the plan fits into the card; both steps run once before they are measured.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Mapping

import torch
from plan_peak import foretold, prepared, steps

from rcm.artefact import UserError
from rcm.cli.plan import read
from rcm.parallel import COUNTER, Mesh, start
from rcm.training.plan import Choice, Job


class Clock:
    """Seconds, and peak of the allocator, since the last look."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last = time.perf_counter()

    def __call__(self) -> Mapping[str, float]:
        peak = 0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        before, self.last = self.last, time.perf_counter()
        return {"seconds": self.last - before, "peak": peak}


def longest(job: Job, memory: float) -> tuple[Job, Choice]:
    """The job with as many latent frames as fit into so many bytes, batch 1."""
    channels, frames, height, width = job.latents
    settings = dataclasses.replace(job.settings, batch=1)
    for count in range(frames, 0, -1):
        shorter = dataclasses.replace(job, latents=(channels, count, height, width), settings=settings)
        choice = shorter.choice(gpus=1)
        if max(sum(sizes.values()) for sizes in shorter.phases(choice).values()) <= memory:
            return shorter, choice
    raise UserError(f"not one frame fits into {memory / 1e9:.0f} GB")


def measure(job: Job, choice: Choice, mesh: Mesh) -> dict[str, Mapping[str, float]]:
    """Seconds and peak bytes of each part of the steps; of parts that come twice, the longer one."""
    made, clock = prepared(job, choice, mesh), Clock(mesh.device)
    steps(made, clock)
    COUNTER.equivalents()
    return steps(made, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    if torch.cuda.is_available():
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        mesh, card = start(), torch.cuda.get_device_name()
        overrides = ["parallel.precision=bfloat16", "parallel.recompute=blocks", "parallel.context=1"]
        free, _ = torch.cuda.mem_get_info()
        job, choice = longest(read([*given.overrides, *overrides]), 0.93 * free)
    else:
        torch.set_num_threads(1)
        mesh, card, job = start(device="cpu"), "one core of this CPU", read(given.overrides)
        choice = job.choice(gpus=1)
    print(f"{card}; torch {torch.__version__}; latents {'x'.join(map(str, job.latents))}; {choice}")
    found, planned = measure(job, choice, mesh), foretold(job, choice)
    for role, parts in (("student", ("student", "DMD", "optimiser")), ("critic", ("critic",))):
        rows = {name: row for name, row in found.items() if name.startswith(parts)}
        total = sum(row["seconds"] for row in rows.values())
        print(f"{role}'s step {total:9.3f} s{'peak GB':>14}{'planned':>10}{'ratio':>8}")
        for name, row in rows.items():
            memory = ""
            if row["peak"] and name in planned:
                plan = sum(planned[name].values())
                memory = f"{row['peak'] / 1e9:14.2f}{plan / 1e9:10.2f}{plan / row['peak']:8.3f}"
            print(f"  {name:22} {row['seconds']:9.3f} {row['seconds'] / total:6.1%}{memory}")
    for name, cost in COUNTER.equivalents().items():
        print(f"forward-equivalents, {name}: {cost:.1f}")
    mesh.close()


if __name__ == "__main__":
    sys.exit(main())
