"""Runs GenEval's own evaluator on sampled images, in its own environment (workflow/envs/geneval.yaml), on one GPU.

    python geneval_official.py --samples FOLDER --known FOLDER --out OUT.jsonl

FOLDER has GenEval's layout: `00012/metadata.jsonl` and `00012/samples/0003.png`. The evaluator is fetched at a fixed
commit, the detector's weights from OpenMMLab, CLIP's by open_clip; without a network, --evaluator and --checkpoint
name files. Before the results, which are the evaluator's in the order of the images, a first line says how they were
reached:

    {"official": "geneval-mmdet", "version": "1", "models": {name: SHA-256}, "device": "...", "versions": {...},
     "known": {"score": 1.0, "facts": 15, "failed": [prompts], "images": [files]} | null}

`known` is how the evaluator does on known images (`python -m rcm.evaluation.known --out FOLDER`): broken operators of
mmcv, weights of another version of mmdet and, as users report, some GPUs give low scores without any error.

This file was tested with stand-ins for the evaluator. mmcv-full and the weights could not be had where it was written,
so nothing here has run with mmdet itself. It imports nothing of this project and runs on Python 3.9.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

FORMAT = "1"
CODE = "https://raw.githubusercontent.com/djghosh13/geneval/16f1681160a110fd077309eb04c1e004f951e06d/evaluation/"
EVALUATOR_SHA256 = "c0fdeb8315f7d3ed72b56f466652afba5216f854109c6eeea339f9982474ea46"
NAMES_SHA256 = "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd"
DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
CHECKPOINT_SHA256 = "743b7d99"  # its first digits, which OpenMMLab writes into the name
CHECKPOINT = (
    f"https://download.openmmlab.com/mmdetection/v2.0/mask2former/{DETECTOR}/"
    f"{DETECTOR}_20220504_001756-{CHECKPOINT_SHA256}.pth"
)
CLIP = Path("~/.cache/clip/ViT-L-14.pt")  # where open_clip puts it
PACKAGES = ("mmdet", "mmcv-full", "torch", "torchvision", "numpy", "pillow", "open-clip-torch", "clip-benchmark")


class Refused(Exception):
    """What cannot be evaluated, and why."""


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def checked(path: Path, sha256: str) -> Path:
    """The file, if its SHA-256 begins with these digits."""
    if not path.is_file():
        raise Refused(f"{path} does not exist")
    found = sha256_of(path)
    if not found.startswith(sha256.lower()):
        raise Refused(f"{path} has the SHA-256 {found}; expected {sha256}: it is another version, or damaged")
    return path


def fetched(url: str, sha256: str, cache: Path, instead: str) -> Path:
    """A file from the network, kept in `cache`; `instead` is the option by which it can be given."""
    final = cache / url.rpartition("/")[2]
    if not final.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            part = Path(folder) / final.name
            try:
                with urllib.request.urlopen(url, timeout=60) as response, part.open("wb") as file:
                    shutil.copyfileobj(response, file)
            except OSError as error:
                raise Refused(f"cannot fetch {url} ({error}); fetch it elsewhere and name it by {instead}") from None
            checked(part, sha256).replace(final)
    return checked(final, sha256)


def device_name() -> str:
    """The GPU that the evaluator will use; Refused if there is none, or PyTorch was not built for it."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise Refused("GenEval's evaluator needs a GPU and PyTorch with CUDA; it finds none")
    name = str(torch.cuda.get_device_name())
    major, minor = torch.cuda.get_device_capability()
    built = [int(digits) for digits in re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))]
    if not any(arch // 10 == major and arch % 10 <= minor for arch in built):
        raise Refused(
            f"PyTorch {torch.__version__} has no code for the {name} (sm_{major}{minor}): use a GPU from before "
            "Hopper, such as V100 or A100"
        )
    return name


def config_of_mmdet() -> Path:
    """The detector's configuration in the installed mmdet; the evaluator looks where only a checkout of it has one."""
    spec = importlib.util.find_spec("mmdet")
    if spec is None or spec.origin is None:
        raise Refused("there is no mmdet here: run this in the environment of workflow/envs/geneval.yaml")
    package = Path(spec.origin).parent
    for root in (package / ".mim", package.parent):
        path = root / "configs" / "mask2former" / f"{DETECTOR}.py"
        if path.is_file():
            return path
    raise Refused(f"mmdet in {package} has no {DETECTOR}.py; name it by --config")


def images_of(folder: Path) -> list[str]:
    """The images in GenEval's layout, by their names relative to the folder."""
    if not folder.is_dir():
        raise Refused(f"no folder of samples {folder}")
    found = []
    for prompt in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()):
        if not (prompt / "metadata.jsonl").is_file():
            raise Refused(f"{prompt / 'metadata.jsonl'} is missing")
        images = sorted(path for path in (prompt / "samples").glob("*.png") if re.fullmatch(r"\d+\.png", path.name))
        if not images:
            raise Refused(f"no samples such as 0000.png in {prompt / 'samples'}")
        for path in images:
            if not path.stat().st_size:
                raise Refused(f"{path} is empty; sample it again")
            found.append(path.relative_to(folder).as_posix())
    if not found:
        raise Refused(f"no samples in {folder}; expected folders such as 00000/samples")
    return found


def evaluated(folder: Path, work: Path, config: Path) -> list[dict[str, Any]]:
    """The evaluator's results on a folder, a line for each image, by name of image."""
    images = images_of(folder)
    out = work / "results.jsonl"
    if out.exists():
        out.unlink()
    command = [sys.executable, str(work / "evaluate_images.py"), str(folder.resolve()), "--outfile", str(out)]
    ended = subprocess.run([*command, "--model-config", str(config), "--model-path", str(work)])
    if ended.returncode or not out.is_file():
        raise Refused(f"the evaluator failed on {folder} with status {ended.returncode}; what it says stands above")
    root = folder.resolve()
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines() if line.strip()]
    for line in lines:
        line["filename"] = Path(os.path.relpath(line["filename"], root)).as_posix()
    lines.sort(key=lambda line: str(line["filename"]))
    names = [line["filename"] for line in lines]
    if names != sorted(images):
        odd = sorted(set(names) ^ set(images))
        raise Refused(
            f"the evaluator gave {len(lines)} results for {len(images)} images in {folder}"
            + (f"; {odd[0]} is in one of both alone" if odd else "")
        )
    return lines


def known_of(results: list[dict[str, Any]], at_least: float) -> dict[str, Any]:
    """How the evaluator does on known images; Refused if the share of correct ones is too small."""
    failed = [line["prompt"] for line in results if not line["correct"]]
    score = 1 - len(failed) / len(results)
    if score < at_least:
        raise Refused(
            f"the evaluator fails {len(failed)} of {len(results)} known images, such as {failed[0]!r}: {score:.2f} are "
            f"correct, at least {at_least:g} are needed; check mmcv-full, the weights, and with another GPU"
        )
    names = [line["filename"] for line in results]
    return {"score": score, "facts": len(results), "failed": failed, "images": names}


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run(arguments: argparse.Namespace) -> None:
    images_of(arguments.samples)
    device = device_name()
    config = arguments.config or config_of_mmdet()
    if arguments.evaluator is None:
        evaluator = fetched(CODE + "evaluate_images.py", arguments.evaluator_sha256, arguments.cache, "--evaluator")
        names = fetched(CODE + "object_names.txt", NAMES_SHA256, arguments.cache, "--evaluator, which it lies beside")
    else:
        evaluator = checked(arguments.evaluator, arguments.evaluator_sha256)
        names = checked(arguments.evaluator.parent / "object_names.txt", NAMES_SHA256)
    if arguments.checkpoint is None:
        checkpoint = fetched(CHECKPOINT, arguments.checkpoint_sha256, arguments.cache, "--checkpoint")
    else:
        checkpoint = checked(arguments.checkpoint, arguments.checkpoint_sha256)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as folder:
        work = Path(folder)
        shutil.copyfile(evaluator, work / "evaluate_images.py")
        shutil.copyfile(names, work / "object_names.txt")
        (work / f"{DETECTOR}.pth").symlink_to(checkpoint.resolve())
        known = None
        if arguments.known is not None:
            known = known_of(evaluated(arguments.known, work, config), arguments.known_at_least)
        results = evaluated(arguments.samples, work, config)
        models = {"evaluator": sha256_of(evaluator), "detector": sha256_of(checkpoint)}
        if CLIP.expanduser().is_file():
            models["clip_large"] = sha256_of(CLIP.expanduser())
        header = {
            "official": "geneval-mmdet",
            "version": FORMAT,
            "models": models,
            "device": device,
            "versions": versions(),
            "known": known,
        }
        text = "".join(json.dumps(line) + "\n" for line in [header, *results])
        (work / "out.jsonl").write_text(text, encoding="utf-8")
        (work / "out.jsonl").replace(arguments.out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="folder in GenEval's layout")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--known", type=Path, help="folder of known images, to be judged first")
    parser.add_argument("--known-at-least", type=float, default=0.8, help="share of them that must be correct")
    parser.add_argument("--evaluator", type=Path, help="evaluate_images.py, with object_names.txt beside it")
    parser.add_argument("--evaluator-sha256", default=EVALUATOR_SHA256)
    parser.add_argument("--checkpoint", type=Path, help="the detector's weights")
    parser.add_argument("--checkpoint-sha256", default=CHECKPOINT_SHA256, help="or its first digits")
    parser.add_argument("--config", type=Path, help="the detector's configuration; default: mmdet's")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/geneval").expanduser(), help="of what is fetched")
    try:
        run(parser.parse_args(argv))
    except Refused as error:
        print(f"geneval_official.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
