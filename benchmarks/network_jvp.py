"""What a tangent costs: a dual pass of the network, and whole sCM steps, as multiples of one forward pass.

    OMP_NUM_THREADS=1 python benchmarks/network_jvp.py

The tangent is checked in the run against a central difference. Ratios within one run; the median of repeats.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from rcm import dual
from rcm.flow import Wrapped
from rcm.networks import build
from rcm.objectives.scm import scm_loss

CASES = (  # name, width, tokens (T, H, W), batch
    ("tiny images", 128, (1, 3, 3), 48),
    ("tiny clips", 128, (3, 3, 3), 48),
    ("1,000 tokens", 256, (10, 10, 10), 1),
)


def interleaved(runs: Sequence[Callable[[], object]], repeats: int = 15) -> list[float]:
    """Seconds of the first, and the others as multiples of it: medians over rounds in which each has its turn, for
    the speed of a machine drifts."""
    rounds = []
    for _ in range(repeats + 1):  # the first to warm up
        times = []
        for run in runs:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        rounds.append([times[0], *(t / times[0] for t in times[1:])])
    return [median(column) for column in zip(*rounds[1:], strict=True)]


def measure(width: int, grid: tuple[int, int, int], batch: int) -> list[float]:
    """Seconds of a forward pass; multiples: a dual pass, sCM steps with separate passes and with a shared one."""
    sizes = {"width": width, "mlp_width": 4 * width, "layers": 4, "heads": 4, "in_channels": 24}
    sizes |= {"out_channels": 24, "text_width": 256, "time_width": 64, "patch": (1, 1, 1), "time_scale": 10.0}
    network = build({"kind": "wan", **sizes})
    torch.nn.init.normal_(network.head.head.weight, std=0.1)
    x, direction = torch.randn(batch, 24, *grid), torch.randn(batch, 24, *grid)
    text, time_B1 = torch.randn(batch, 12, 256), torch.rand(batch, 1) * 10
    student = Wrapped(network)

    @torch.no_grad()
    def forward(step: float = 0.0) -> torch.Tensor:
        return network(x + step * direction, time_B1 + step, text)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return dual.jvp(lambda z, t: network(z, t, text), (x, time_B1), (direction, torch.ones_like(time_B1)))

    def step(tangent_pass: str) -> None:
        times, null = time_B1[:, 0].double() / 10 + 0.2, text[:1] * 0
        options = {"batch": batch, "guidance": 2.0, "tangent_pass": tangent_pass}
        loss, _ = scm_loss(student, student, x, direction, times, text, null, **options)
        loss.backward()
        network.zero_grad()

    difference = (forward(1e-3) - forward(-1e-3)) / 2e-3
    if not (both()[1] - difference).norm() < 1e-2 * difference.norm():
        raise SystemExit("the tangent is wrong")
    steps = (partial(step, tangent_pass) for tangent_pass in ("separate", "shared"))
    return interleaved([forward, both, *steps])


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), float32, median of 15")
    print(f"{'case':14} {'forward':>10} {'dual pass':>10} {'separate':>10} {'shared':>10}   (ms, then multiples of it)")
    for name, width, grid, batch in CASES:
        forward, *others = measure(width, grid, batch)
        print(f"{name:14} {1e3 * forward:10.1f}", *(f"{multiple:10.2f}" for multiple in others), flush=True)


if __name__ == "__main__":
    main()
