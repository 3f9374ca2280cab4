"""What is installed, which backends will be used, and what stands in for what is missing."""

import argparse
import configparser
import fcntl
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rcm.artefact import UserError

REQUIRED = (
    *("torch", "numpy", "scipy", "safetensors", "hydra-core", "omegaconf", "pyyaml", "jsonschema", "tqdm"),
    *("pillow", "opencv-python-headless", "matplotlib", "jinja2"),
)
OPTIONAL = {  # distribution: what happens without it
    "snakemake": "stages must be run one by one; pip install snakemake",
    "wandb": "metrics go to JSON lines only",
    "imageio-ffmpeg": "clips are written as .png or .gif; pip install imageio-ffmpeg",
}
EXTRAS = {  # extra of pyproject.toml: distribution: what happens without it
    "models": {
        "transformers": "no text encoders of real models",
        "ftfy": "no text encoder of Wan2.1",
        "sentencepiece": "no text encoder of Cosmos-Predict2",
        "huggingface_hub": "no downloads from the Hub",
        "boto3": "no downloads from S3",
    },
    "scoring": {
        "onnxruntime": "small text is not read back",
        "rapidocr": "small text is not read back",
        "scikit-image": "GenEval's detectors are not tried on known photographs",
    },
    "cluster": {
        "dvc": "results are not versioned, everything else works",
        "ruamel.yaml.clib": "dvc reads its files more slowly",
        "snakemake-executor-plugin-slurm": "no jobs on a Slurm cluster",
    },
    "gpu": {
        "triton": "on a GPU, attention with tangents streams in plain PyTorch, slower",
        "flash-attn": "on a GPU, the gradient of attention takes the kernels that PyTorch carries",
        "transformer-engine": "on a GPU, AdamW is that of PyTorch",
    },
}
FEW_FILES = 4096  # shards, their readers and Snakemake's jobs together
SMALL_SHM = 2**30  # in which processes of a training exchange what NCCL does not take over NVLink
WAIT = 2.0  # s for a program of the system to answer
_FICLONE = 0x40049409  # ioctl of Linux that makes a copy of a file share its blocks


def doctor(arguments: argparse.Namespace) -> None:
    """Print one line a part, in groups; UserError where something is missing without which nothing works."""
    missing = [name for name in REQUIRED if not installed(name)]
    groups = {
        "Machine": machine(),
        "Packages": packages(),
        "GPU": accelerator() if installed("torch") else (),
        "Workflow": workflow(),
        "Files": files(),
    }
    for title, lines in groups.items():
        print(f"{title}:")
        for name, state in lines:
            print(f"  {name:<33}{state}")
    if missing:
        raise UserError(f"missing {', '.join(missing)}: run `make setup`, or `pip install {' '.join(missing)}`")
    print(
        "\nthis machine can run every stage of the scale tiny"
        if installed("snakemake")
        else "\nthis machine can run the stages of the scale tiny one by one; the whole pipeline needs snakemake"
    )


def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def answer(*command: str) -> str:
    """What a program of the system prints; nothing where it is absent, fails or does not answer in time."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=WAIT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def amount(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.0f} GiB" if count >= 10 * 2**30 else f"{count / 2**30:.1f} GiB"


# --- The machine ---------------------------------------------------------------------------------------------------


def machine() -> Iterator[tuple[str, str]]:
    """Python, processors, memory and the limits on them."""
    yield "python", platform.python_version()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield "system", f"{platform.system()} {platform.machine()}, {cores} cores, {amount(memory)}"
    share, limit = cgroup_limits()
    if share is not None and share < cores:
        yield "limit on cores", f"{share:g} of them (cgroup): give snakemake no more than -c{max(1, int(share))}"
    if limit is not None and limit < memory:
        yield "limit on memory", f"{amount(limit)} (cgroup): processes that take more are killed"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = "" if soft == resource.RLIM_INFINITY or soft >= FEW_FILES else ", few for many shards and workers"
    raised = f": ulimit -n {FEW_FILES if hard == resource.RLIM_INFINITY else min(hard, FEW_FILES)}" if few else ""
    yield "open files", f"{'unlimited' if soft == resource.RLIM_INFINITY else soft}{few}{raised}"
    with suppress(OSError):
        size = shutil.disk_usage("/dev/shm").total
        small = ", small for several processes: docker run --shm-size=8g" if size < SMALL_SHM else ""
        yield "/dev/shm", amount(size) + small
    names = {sys.getfilesystemencoding(), sys.stdout.encoding or "ascii"}
    wrong = sorted(name for name in names if name.lower().replace("-", "") != "utf8")
    yield "text", f"{', '.join(wrong)}: prompts may not be printed: export PYTHONUTF8=1" if wrong else "UTF-8"


def cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[float | None, int | None]:
    """Cores and bytes that this process and those above it are limited to, under both versions of control groups."""
    cores: list[float] = []
    memory: list[int] = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, kinds, place = line.split(":", 2)
            for kind in kinds.split(","):
                for folder in [(base := root / kind) / place.lstrip("/"), *(base / place.lstrip("/")).parents]:
                    if not folder.is_relative_to(base):
                        break
                    quota, _, period = number_in(folder / "cpu.max", "max 100000").partition(" ")
                    if quota == "max":
                        quota = number_in(folder / "cpu.cfs_quota_us", "-1")
                        period = number_in(folder / "cpu.cfs_period_us", "100000")
                    if int(quota) > 0:
                        cores.append(int(quota) / int(period))
                    for name in ("memory.max", "memory.limit_in_bytes"):
                        limit = number_in(folder / name, "max")
                        memory += [int(limit)] if limit != "max" else []
    return min(cores, default=None), min(memory, default=None)


def number_in(path: Path, otherwise: str) -> str:
    try:
        return path.read_text().strip() or otherwise
    except OSError:
        return otherwise


# --- Packages ------------------------------------------------------------------------------------------------------


def packages() -> Iterator[tuple[str, str]]:
    """What is installed, and what is used instead of what is not."""
    for name in REQUIRED:
        yield name, installed(name) or "MISSING: make setup"
    for name, instead in OPTIONAL.items():
        yield name, installed(name) or f"absent: {instead}"
    for extra, names in EXTRAS.items():
        compiled = "--no-build-isolation " if extra == "gpu" else ""  # against the torch that is there
        for name, instead in names.items():
            yield (
                name,
                installed(name) or f"absent: {instead}; pip install {compiled}-c constraints.txt -e '.[{extra}]'",
            )
    yield "constraints.txt", pins(Path("constraints.txt"))
    yield "films", films()


def pins(constraints: Path) -> str:
    """Which installed packages have other versions than the project is tested with."""
    if not constraints.is_file():
        return "not here: run in a clone to compare versions with it"
    wanted = re.findall(r"^([\w.-]+)==([^\s;]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    found = {name: (installed(name), pin) for name, pin in wanted}
    others = [f"{name} {has} ({pin})" for name, (has, pin) in found.items() if has and has.partition("+")[0] != pin]
    if not others:
        return "what is installed has the versions that are tested"
    return f"{len(others)} with other versions than tested: {', '.join(others[:5])}{' …' if len(others) > 5 else ''}"


def films() -> str:
    """What clips are written with."""
    if not installed("imageio-ffmpeg"):
        return "absent: .png and .gif"
    import imageio_ffmpeg

    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        return "absent: .png and .gif, for imageio-ffmpeg found no ffmpeg: apt-get install ffmpeg"
    encoder = "libx264" in answer(program, "-hide_banner", "-encoders")
    return f".mp4 (libx264), .png, .gif by {program}" if encoder else f"{program} lacks libx264: .png and .gif"


# --- GPU -----------------------------------------------------------------------------------------------------------


def accelerator() -> Iterator[tuple[str, str]]:
    """Threads, CUDA, what Triton needs, and the attention kernels that would be chosen here."""
    import torch

    from flash_jvp import choose

    yield "threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')})"
    driver = answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    there = torch.cuda.is_available()
    if there:
        names = ", ".join(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))
        yield "CUDA", f"{torch.version.cuda}, {names}; the scale tiny computes on the processor all the same"
    elif driver:
        why = "is for processors" if torch.version.cuda is None else f"wants CUDA {torch.version.cuda}"
        yield "CUDA", f"absent, though there is a GPU: torch {torch.__version__} {why}: install another build of torch"
    else:
        yield "CUDA", "absent: everything runs on the processor"
    if driver:
        yield "driver", driver
    if there and installed("triton"):
        yield "compiler of Triton", compiler()
    for device, dtype in [("cpu", torch.float32), ("cuda", torch.bfloat16)][: 1 + there]:
        q = torch.empty(1, 1, 1024, 128, device=device, dtype=dtype)
        kernels = "{attention}; with tangents {attention_jvp}; gradient {backward}".format_map(choose(q, q, q))
        yield f"attention on {device}", kernels


def compiler() -> str:
    """What Triton builds its launchers with."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        return "absent, so Triton's kernels do not start: apt-get install gcc, or set CC"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return f"{found}, but Python.h is absent, so Triton's kernels do not start: apt-get install python3-dev"
    return found


# --- Workflow ------------------------------------------------------------------------------------------------------


def workflow() -> Iterator[tuple[str, str]]:
    """Git, Slurm and where DVC keeps results."""
    yield "git", git()
    yield "slurm", slurm()
    if installed("dvc"):
        yield "DVC remote", remote(Path(".dvc"))


def git() -> str:
    """The commit that is checked out."""
    if not shutil.which("git"):
        return "absent, so records cannot say by what commit something was made: apt-get install git"
    commit = answer("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "no repository here, so records cannot say by what commit something was made: git clone"
    changed = answer("git", "status", "--porcelain", "--untracked-files=no").splitlines()
    return f"{commit}, {len(changed)} changed files" if changed else f"{commit}, nothing changed"


def slurm() -> str:
    """Whether jobs can be sent to a cluster from here, and how their states are asked for."""
    lacking = [name for name in ("sbatch", "squeue", "scancel") if not shutil.which(name)]
    if lacking:
        return f"absent ({', '.join(lacking)}): jobs run on this machine: snakemake --profile workflow/profiles/local"
    if not (plugin := installed("snakemake-executor-plugin-slurm")):
        return "there, but Snakemake cannot use it: pip install -c constraints.txt -e '.[cluster]'"
    said = answer("scontrol", "show", "config")
    if not said:
        return "there, but its controller does not answer: every start of Snakemake waits for it"
    name = re.search(r"^ClusterName\s*=\s*(\S+)", said, re.MULTILINE)
    kept = re.search(r"^AccountingStorageType\s*=\s*accounting_storage/(?!none)", said, re.MULTILINE)
    how = "accounting" if kept and shutil.which("sacct") else "no accounting: states of jobs are asked of squeue"
    return f"cluster {name[1] if name else 'unknown'}, executor {plugin}, {how}: snakemake --profile slurm"


def remote(folder: Path) -> str:
    """Where `dvc push` sends results, and whether a folder on this machine is there; others are not contacted."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read([folder / "config", folder / "config.local"], encoding="utf-8")
    name = settings.get("core", "remote", fallback="")
    if not name:
        return "none: dvc remote add --default NAME URL"
    url = settings.get(f"'remote \"{name}\"'", "url", fallback="")
    if not url:
        return f"{name} has no address: dvc remote add --force {name} URL"
    if "://" in url:
        return f"{name}, {url} (not contacted; dvc status --cloud does)"
    place = (folder / url).resolve()
    return f"{name}, {place}{'' if place.is_dir() else ' (not there yet: the first dvc push makes it)'}"


# --- Files ---------------------------------------------------------------------------------------------------------


def files() -> Iterator[tuple[str, str]]:
    """Disks under data/ and resume/, and what is kept for the Hub."""
    for name in ("data", "resume"):
        folder = next(place for place in (Path(name).absolute(), *Path(name).absolute().parents) if place.is_dir())
        yield f"{name}/", f"{amount(shutil.disk_usage(folder).free)} free, {file_system(folder)}, {links(folder)}"
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    token = token or Path(os.environ.get("HF_TOKEN_PATH") or hub / "token").expanduser().is_file()
    given = "a token is there" if token else "no token, which gated repositories want: hf auth login"
    yield "Hub", f"{hub}, {given}"


def file_system(folder: Path) -> str:
    """The kind of file system that holds a folder."""
    with suppress(OSError):
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        places = {point.replace("\\040", " "): kind for _, point, kind, *_ in mounts}
        return max((len(at), kind) for at, kind in places.items() if folder.resolve().is_relative_to(at))[1]
    return "file system unknown"


def links(folder: Path) -> str:
    """How DVC can put a file of its cache there without a copy, tried with two small files."""
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as place:
            one, other = Path(place, "one"), Path(place, "other")
            one.write_bytes(b"x" * 4096)
            with one.open("rb") as source, other.open("wb") as target, suppress(OSError):
                fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
                return "copies share blocks (reflink)"
            with suppress(OSError):
                Path(place, "link").hardlink_to(one)
                return "hard links"
            return "neither reflink nor hard links: DVC copies, which takes the space twice"
    except OSError as error:
        return f"cannot be written ({error.strerror})"
