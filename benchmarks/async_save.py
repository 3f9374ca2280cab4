"""How long saving the state of a run holds up training, written behind it or waited for, in training steps.

    OMP_NUM_THREADS=1 python benchmarks/async_save.py [FOLDER]

A Wan network with AdamW and an averaged copy; everything is saved that a run saves of one network. In one run, by
turns: training steps without saving, with a save behind them, with a save that is waited for. What a save costs is the
time of the call and, for it takes computing time from the steps that follow until it is written, by how much those take
longer together; the least of all rounds, for what else the machine does only adds. It takes a core that is free to
write behind the training. FOLDER is where the states go: by default a temporary one, removed afterwards.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from rcm.networks import build
from rcm.parallel.mesh import Mesh
from rcm.training.ema import PowerEMA
from rcm.training.state import States, optimizer_state

STEPS = 5  # training steps between saves
SAVES = 6


def main(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"width": 256, "mlp_width": 1024, "layers": 6, "heads": 4, "in_channels": 24, "out_channels": 24}
    sizes |= {"text_width": 256, "time_width": 64, "patch": (1, 1, 1), "time_scale": 10.0}
    network = build({"kind": "wan", **sizes})
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    ema = PowerEMA(network, 0.1)
    x, time_B1, text = torch.randn(16, 24, 3, 3, 3), torch.rand(16, 1) * 10, torch.randn(16, 12, 256)
    done = 0

    def step() -> float:
        nonlocal done
        began = time.perf_counter()
        network(x, time_B1, text).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        ema.step(done)
        return time.perf_counter() - began

    def tree() -> dict:
        return {
            "network": network.state_dict(),
            "optimizer": optimizer_state(network, optimizer),
            "ema": ema.average,
            "updates": done,
        }

    def save(states: States, wait: bool) -> tuple[float, float]:
        """Seconds of the call, and of a stretch of training that begins with it."""
        began = time.perf_counter()
        states.save(done, tree(), wait=wait)
        call = time.perf_counter() - began
        return call, call + sum(step() for _ in range(STEPS))

    step()
    plain, behind, waited = [], [], []
    with States(folder, {}, Mesh(None, torch.device("cpu"))) as states:
        for _ in range(SAVES):
            plain.append(sum(step() for _ in range(STEPS)))
            behind.append(save(states, wait=False))
            states.wait()
            waited.append(save(states, wait=True))
    mebibytes = sum(file.stat().st_size for file in folder.glob("*/*.distcp")) / 2**20 / len(list(folder.glob("0*")))
    unit = min(plain) / STEPS
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), state of {mebibytes:.0f} MiB, {SAVES} saves"
    )
    print(f"a training step takes {unit:.3f} s, all else is in steps (least of all rounds)")
    print(f"{'':22} {'the call':>9} {f'cost over {STEPS} steps':>20}")
    for name, times in (("written behind", behind), ("waited for", waited)):
        call, stretch = (min(column) for column in zip(*times, strict=True))
        print(f"{name:22} {call / unit:9.2f} {stretch / unit - STEPS:20.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
