"""What is installed, which backends will be used, and what stands in for what is missing."""

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from rcm.artefact import UserError

REQUIRED = (
    *("torch", "numpy", "scipy", "safetensors", "hydra-core", "omegaconf", "pyyaml", "jsonschema", "tqdm"),
    *("pillow", "opencv-python-headless", "matplotlib", "jinja2"),
)
OPTIONAL = {  # distribution: what happens without it
    "snakemake": "stages must be run one by one: pip install snakemake",
    "wandb": "metrics go to JSON lines only",
    "dvc": "results are not versioned, everything else works",
    "triton": "on a GPU, attention with tangents streams in plain PyTorch, slower",
    "transformer-engine": "on a GPU, AdamW is that of PyTorch",
    "flash-attn": "on a GPU, the gradient of attention takes the kernels that PyTorch carries",
    "transformers": "no text encoders of real models: pip install -e .[models]",
    "ftfy": "no text encoder of Wan2.1: pip install -e .[models]",
    "huggingface_hub": "no downloads from the Hub: pip install -e .[models]",
    "boto3": "no downloads from S3: pip install -e .[models]",
}


def doctor(arguments: argparse.Namespace) -> None:
    """Print one line a part; UserError where something is missing without which nothing works."""
    missing = [name for name in REQUIRED if not installed(name)]
    for line in (*machine(), *packages(), *(accelerator() if installed("torch") else ())):
        print(line)
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


def line(name: str, state: str) -> str:
    return f"{name:<24}{state}"


def machine() -> list[str]:
    """Python, processors and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        line("python", platform.python_version()),
        line("system", f"{platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GiB"),
    ]


def packages() -> list[str]:
    """What is installed, and what is used instead of what is not."""
    lines = [line(name, installed(name) or "MISSING") for name in REQUIRED]
    lines += [line(name, installed(name) or f"absent: {instead}") for name, instead in OPTIONAL.items()]
    return [*lines, line("ffmpeg", ffmpeg())]


def ffmpeg() -> str:
    """Where films would be written with."""
    if installed("imageio-ffmpeg"):
        return f"imageio-ffmpeg {installed('imageio-ffmpeg')}"
    if shutil.which("ffmpeg"):
        return "absent for Python (pip install imageio-ffmpeg): clips are written as .png or .gif"
    return "absent: clips are written as .png or .gif"


def accelerator() -> list[str]:
    """Threads, CUDA and the attention kernels that would be chosen here."""
    import torch

    from flash_jvp import choose

    setting = os.environ.get("OMP_NUM_THREADS", "not set")
    lines = [line("threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS {setting})")]
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))
        lines.append(
            line("CUDA", f"{torch.version.cuda}, {names}; the scale tiny computes on the processor all the same")
        )
    else:
        lines.append(line("CUDA", "absent: everything runs on the processor"))
    for device, dtype in [("cpu", torch.float32), ("cuda", torch.bfloat16)][: 1 + torch.cuda.is_available()]:
        q = torch.empty(1, 1, 1024, 128, device=device, dtype=dtype)
        kernels = "{attention}; with tangents {attention_jvp}; gradient {backward}".format_map(choose(q, q, q))
        lines.append(line(f"attention on {device}", kernels))
    return lines
