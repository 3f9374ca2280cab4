"""Times of the workflow itself, beside their goals: in a finished tree of the scale tiny that `rcm record` recorded.

    python benchmarks/workflow.py          # with nothing beside it; what is recorded should be committed

Nothing of this folder changes: what runs, runs in a clone, which takes its files from this folder's DVC cache.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

BIG = ("scale=wan2.1-14b", "scatter={synthesize: 1000, embed: 100, report: 64, diversity: 8, text: 4}")
STAGE = "table1"


class Run(NamedTuple):
    """A command that has ended: seconds, peak memory in GiB of its largest process, and what it said."""

    seconds: float
    gib: float
    said: str


def run(folder: Path, environment: Mapping[str, str], *words: str) -> Run:
    """Run a Python module; SystemExit with what it said where it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        said.seek(0)
        text = said.read()
    if process.returncode:
        sys.exit(f"{' '.join(words)} in {folder}:\n{text}")
    return Run(seconds, used.ru_maxrss / 2**20, text)


def tell(what: str, seconds: float, goal: float, more: str = "") -> None:
    """A line: what, its seconds and the goal."""
    print(f"{what:<52}{seconds:6.1f} s (goal {goal:g} s){more}", flush=True)


def of_python(folder: Path) -> dict[str, str]:
    """The environment in which the library of a folder is imported, and this Python's commands are found."""
    path = os.pathsep.join([str(folder / "src"), str(folder / "kernels")])
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": path, "PATH": commands, "VIRTUAL_ENV": sys.prefix}


def main() -> None:
    here = Path(__file__).resolve().parents[1]
    own = of_python(here)
    done = run(here, own, "snakemake", "-n")
    state = "" if "Nothing to be done" in done.said else "; the tree is NOT finished"
    tell("snakemake -n, finished", done.seconds, 10, state)
    status = run(here, own, "dvc", "status")
    state = "" if "up to date" in status.said else "; NOT up to date: rcm record"
    tell("dvc status", status.seconds, 3, state)
    big = run(here, own, "snakemake", "-n", "--config", *BIG)
    jobs = next(line.split()[1] for line in reversed(big.said.splitlines()) if line.startswith("total "))
    tell("snakemake -n, wan2.1-14b with 1,000 shards", big.seconds, 30, f"; {big.gib:.2f} GiB (goal 2); {jobs} jobs")

    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch, "clone")
        subprocess.run(["git", "clone", "--quiet", str(here), str(clone)], check=True)
        inside = of_python(clone)
        run(clone, inside, "dvc", "remote", "add", "--local", "--default", "here", str(here / ".dvc/cache"))
        tell("rcm sync in a fresh clone (dvc pull, verify, adopt)", run(clone, inside, "rcm", "sync").seconds, 60)
        job = run(clone, inside, "dvc", "repro", "--single-item", "--force", STAGE)
        with (clone / f"logs/tiny/benchmarks/table/{STAGE}.tsv").open(encoding="utf-8") as file:
            own_seconds = float(next(csv.DictReader(file, delimiter="\t"))["s"])
        tell(f"dvc repro -s {STAGE}, beyond the job's {own_seconds:.1f} s", job.seconds - own_seconds, 4)


if __name__ == "__main__":
    main()
