"""What checkpoints take of the memory: loading into a network, conversion and export, against the size of the file.

    OMP_NUM_THREADS=1 python benchmarks/loading_memory.py --network wan2.1-t2v-1.3b --layers 4 8 16

Random weights of a network with the layers given. Each action has a process of its own; what counts is how far the peak
of its memory rises above where it stood with everything imported: resident, as the system accounts for it, and
anonymous, without the pages of files that the system can drop. A network is built on the meta device and loaded in the
data type of the file, so the least is the file itself; conversion and export hold no network, their least is a tensor.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import rcm.networks
from rcm.checkpoints import (
    LazyState,
    export_diffusers,
    export_safetensors,
    load_weights,
    open_state,
    save_dcp,
    save_pth,
)
from rcm.tree import settings_of

FILES = ("x.pth", "x.safetensors", "dcp")
ACTIONS = [
    *(f"load {name}" for name in FILES),
    *(f"convert {name}" for name in FILES[:2]),
    *(f"export {form}" for form in ("pth", "safetensors", "diffusers")),
]


def network(name: str, layers: int, dtype: torch.dtype) -> nn.Module:
    """On the meta device."""
    with torch.device("meta"):
        return rcm.networks.build(settings_of("network", name) | {"layers": layers}).to(dtype)


def random_state(built: nn.Module) -> LazyState:
    """Random weights, each made when it is written."""

    def fill(name: str, out: Tensor) -> None:
        out.view(-1)[: 2**20].normal_()  # the rest is whatever was there: its values cost time and prove nothing

    return LazyState(dict(built.state_dict()), fill)


def write(folder: Path, state: LazyState) -> None:
    save_pth(folder / "x.pth", state)
    export_safetensors(folder / "x.safetensors", open_state(folder / "x.pth"), {})
    save_dcp(folder / "dcp", open_state(folder / "x.pth"))


def act(action: str, folder: Path, name: str, layers: int, dtype: torch.dtype) -> Callable[[], object]:
    verb, _, what = action.partition(" ")
    if verb == "load":
        built = network(name, layers, dtype)
        return lambda: load_weights(built, folder / what)
    if verb == "convert":
        return lambda: save_dcp(folder / "converted", open_state(folder / what))
    settings = settings_of("network", name) | {"layers": layers}
    return {
        "pth": lambda: save_pth(folder / "exported.pth", open_state(folder / "dcp")),
        "safetensors": lambda: export_safetensors(folder / "exported.safetensors", open_state(folder / "dcp"), {}),
        "diffusers": lambda: export_diffusers(folder / "exported", open_state(folder / "dcp"), settings),
    }[what]


def status(key: str) -> int:
    """An entry of this process's memory, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def measured(action: Callable[[], object]) -> tuple[int, int, float]:
    """Rise of the peak of resident and of anonymous memory, bytes, and seconds."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    resident, anonymous, start = status("VmRSS"), status("RssAnon"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins here
    watcher.start()
    action()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return status("VmHWM") - resident, peak - anonymous, seconds


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="wan2.1-t2v-1.3b", help="a name in config/network")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8], help="how many layers of it")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    parser.add_argument("--folder", type=Path, help="where the files may lie (default: a temporary folder)")
    parser.add_argument("--action", help=argparse.SUPPRESS)  # of the process that is measured
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    if given.action:
        print(*measured(act(given.action, given.folder, given.network, given.layers[0], dtype)))
        return
    print(f"layers  {'action':20} {'file, MB':>9} {'resident, MB':>12} {'anonymous, MB':>13} {'/ file':>6} {'s':>6}")
    for layers in given.layers:
        with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
            folder = Path(temporary)
            write(folder, random_state(network(given.network, layers, dtype)))
            file = size(folder / "x.pth")
            for action in ACTIONS:
                words = ["--network", given.network, "--layers", str(layers), "--dtype", given.dtype]
                command = [sys.executable, __file__, *words, "--folder", temporary, "--action", action]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                resident, anonymous, seconds = (float(word) for word in said)
                print(
                    f"{layers:6}  {action:20} {file / 1e6:9.0f} {resident / 1e6:12.0f} {anonymous / 1e6:13.0f} "
                    f"{resident / file:6.2f} {seconds:6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
