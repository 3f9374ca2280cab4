"""What a run takes, and where: time, memory, devices and versions, over all attempts; imports nothing heavy."""

import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EVERY = 30.0  # seconds between the notes of an attempt: what kill -9 can make it forget
_INSTALLED = ("torch", "numpy", "safetensors", "hydra-core", "snakemake")
_USED = {  # package: module; told where the stage has imported it
    "triton": "triton",
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "transformer-engine": "transformer_engine",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "imageio-ffmpeg": "imageio_ffmpeg",
    "matplotlib": "matplotlib",
}
_SUMMED = ("wall_seconds", "gpu_hours", "core_hours")


class Meter:
    """Measures one attempt from its construction on; `earlier` are those before it, as `spent` tells of them.

    They are in the folder `attempts`, each with what it is an attempt `of`, such as a hash; those of other things are
    none of this run.
    """

    def __init__(self, attempts: Path | None = None, ranks: int = 1, of: str = ""):
        self.of, self.ranks, self.started = of, ranks, datetime.now(UTC)
        self._clock, self._cpu = time.perf_counter(), _cpu_seconds()
        name = f"{self.started:%Y%m%dT%H%M%S%f}-{platform.node()}-{os.getpid()}.json"
        self.file = attempts / name if attempts is not None else None
        self.earlier = _read(attempts, of) if attempts is not None else []

    def spent(self, others: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """This attempt so far; `others` are the `usage` of the ranks beside this one, else they count as this one.

        `gpu_hours` is GPUs of all ranks x wall time, `core_hours` the processor time of all processes; `peak_mib` the
        sum over ranks of the largest process of each.
        """
        seconds, here = time.perf_counter() - self._clock, usage()
        others = [here] * (self.ranks - 1) if others is None else others
        mine = _cpu_seconds() - self._cpu
        cpu = mine * self.ranks if others and others[0] is here else mine + sum(rank["cpu_seconds"] for rank in others)
        peaks = [rank["gpu_peak_mib"] for rank in (here, *others) if rank["gpu_peak_mib"] is not None]
        return {
            "started": self.started.isoformat(timespec="seconds"),
            "wall_seconds": round(seconds, 3),
            "gpu_hours": round(len(peaks) * seconds / 3600, 6),
            "core_hours": round(cpu / 3600, 6),
            "peak_mib": round(sum(rank["peak_mib"] for rank in (here, *others)), 1),
            **({"gpu_peak_mib": max(peaks)} if peaks else {}),
            "ranks": self.ranks,
            "nodes": sorted({rank["node"] for rank in (here, *others)}),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }

    def record(self, others: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """What all attempts took together: the sum of times and costs, the largest of the memories."""
        own = self.spent(others)
        all_of_them = [*self.earlier, own]
        summed = {key: round(sum(attempt[key] for attempt in all_of_them), 6) for key in _SUMMED}
        return {
            **own,
            **summed,
            "started": min(attempt["started"] for attempt in all_of_them),
            "peak_mib": max(attempt["peak_mib"] for attempt in all_of_them),
            "attempts": len(all_of_them),
            **({"earlier": self.earlier} if self.earlier else {}),
        }

    def note(self) -> None:
        """Write down what this attempt has taken; a disk that is full is none of its business."""
        if self.file is not None:
            with suppress(OSError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                partial = self.file.with_suffix(".partial")
                partial.write_text(json.dumps({"of": self.of, **self.spent()}) + "\n", encoding="utf-8")
                partial.replace(self.file)


@contextmanager
def metered(attempts: Path | None = None, ranks: int = 1, of: str = "") -> Iterator[Meter]:
    """A meter that remembers in the folder `attempts` what a run took that does not come to its end."""
    meter, over = Meter(attempts, ranks, of), threading.Event()

    def keep() -> None:
        while not over.wait(EVERY):
            meter.note()

    thread = threading.Thread(target=keep, daemon=True, name="meter")
    if attempts is not None:
        thread.start()
    try:
        try:
            yield meter
        finally:
            over.set()
            if attempts is not None:
                thread.join()  # which may be about to write the same note
    except BaseException as error:
        if isinstance(error, SystemExit | KeyboardInterrupt) or time.perf_counter() - meter._clock >= EVERY:
            meter.note()
        raise


def _read(folder: Path, of: str) -> list[dict[str, Any]]:
    """The attempts `of` this that were noted; what is damaged is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            said = json.loads(path.read_text(encoding="utf-8"))
            numbers = {k: float(said[k]) for k in (*_SUMMED, "peak_mib")}
            if said.pop("of") == of:
                found.append({**said, "started": str(said["started"]), **numbers})
    return found


def usage() -> dict[str, Any]:
    """Of this process: its machine, the most memory it or a child of it had (MiB), and its processor time (s)."""
    torch = sys.modules.get("torch")  # looked at only if the stage has used it
    on_gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "node": platform.node(),
        "peak_mib": max(peak_mib(), peak_mib(resource.RUSAGE_CHILDREN)),
        "gpu_peak_mib": torch.cuda.max_memory_allocated() // 2**20 if torch is not None and on_gpu else None,
        "cpu_seconds": _cpu_seconds(),
    }


def peak_mib(who: int = resource.RUSAGE_SELF) -> float:
    """Largest resident memory of this process so far, MiB (getrusage counts in KiB, on macOS in bytes)."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(who).ru_maxrss / unit, 1)


def _cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(times.ru_utime + times.ru_stime for times in found)


def command() -> str:
    """The command line, without what could be a secret in an address."""
    words = shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    return re.sub(r"(?<=://)[^/\s'\"@]*@", "", re.sub(r"(://[^\s'\"?]*)\?[^\s'\"]*", r"\1", words))


def git_version() -> dict[str, Any] | None:
    """Commit of the working copy this library runs from and whether it has changes; None outside of git.

    A file that git does not know is a change where it may be code: in the library and beside the workflow's rules.
    """

    def git(*arguments: str) -> str:
        call = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # not some other repository around a virtual environment
        git("ls-files", "--error-unmatch", Path(__file__).name)
        status = "status", "--porcelain"
        changed = git(*status, "--untracked-files=no") or git(
            *status, "--untracked-files=normal", "--", ":/src", ":/workflow"
        )
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def host() -> dict[str, Any]:
    """The machine, the device, and the attention kernels that were taken."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "cpu": _cpu_model(), "cores": cores}
    said |= {"name": platform.node(), "device": "cpu"}
    torch = sys.modules.get("torch")
    if torch is not None:
        said["threads"] = torch.get_num_threads()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            said |= {"device": "cuda", "gpu": torch.cuda.get_device_name()}
    if "flash_jvp" in sys.modules:
        said["attention"] = sys.modules["flash_jvp"].taken()
    return said


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in (*_INSTALLED, *(name for name, module in _USED.items() if module in sys.modules)):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def total(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What several runs took together, each job counted once however many artefacts tell of it.

    Returns the number of `jobs`, the sums `wall_seconds`, `gpu_hours` and `core_hours`, and the largest `peak_mib`.
    """
    jobs = {(run["stage"], run["started"], run["wall_seconds"], run.get("command")): run for run in runs}
    cost: dict[str, Any] = {"jobs": len(jobs)}
    for key in _SUMMED:
        cost[key] = sum(float(run.get(key) or 0) for run in jobs.values())
    return {**cost, "peak_mib": max((float(run.get("peak_mib") or 0) for run in jobs.values()), default=0.0)}


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
