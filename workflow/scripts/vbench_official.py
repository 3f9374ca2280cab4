"""Runs VBench's own code on sampled clips, in its own environment (workflow/envs/vbench.yaml) and in one process.

    python vbench_official.py --samples FOLDER --info VBench_full_info.json --out OUT.json

FOLDER holds `PROMPT-NUMBER.mp4`. Several processes would give other scores: some dimensions are then weighted by
videos, and appearance style takes the last frame of each. What the code does not say is written beside its results:

    {"official": "vbench", "version": "1", "versions": {...}, "device": "...", "gpus": 1, "info_sha256": "...",
     "missing": [videos], "failed": {dimension: why}, "static": {prompt: [samples that pass the filter of flicker]},
     "results": {dimension: [score, [videos]]}}

A dimension that fails does not stop the others; what they found stays in the folder --kept, and is taken from there
when it is run again on the same videos. It imports nothing of this project.
"""

import argparse
import fcntl
import glob
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = "1"
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
JUDGED = 5  # videos of a prompt that the code looks at
PACKAGES = ("vbench", "torch", "torchvision", "numpy", "transformers", "timm", "pyiqa", "decord", "detectron2")


class Refused(Exception):
    """What cannot be evaluated, and why."""


def wanted_videos(info: list[dict[str, Any]], dimensions: list[str], still_samples: int) -> list[str]:
    """File names of the videos that the dimensions look at, each once."""
    names: dict[str, None] = {}
    for entry in info:
        asked = set(dimensions) & set(entry["dimension"])
        if asked:
            count = max(JUDGED, still_samples if "temporal_flickering" in asked else 0)
            names |= {f"{entry['prompt_en']}-{number}.mp4": None for number in range(count)}
    return list(names)


def linked(samples: Path, names: list[str], folder: Path, allow_missing: bool) -> list[str]:
    """Link the videos into a folder of their own, which the code may write to; returns those that are missing.

    The code takes its file extension from whatever file it finds first, so nothing else may lie beside them.
    """
    if not samples.is_dir():
        raise Refused(f"no folder of samples {samples}; make it with `rcm arrange`")
    there = {path.name: path for path in samples.iterdir() if path.is_file()}
    missing = [name for name in names if name not in there]
    if missing and (not allow_missing or len(missing) == len(names)):
        raise Refused(
            f"{len(missing)} of {len(names)} videos are missing in {samples}, the first {missing[0]}; sample them, or "
            "allow missing ones with --allow-missing"
        )
    empty = [name for name in names if name in there and there[name].stat().st_size == 0]
    if empty:
        raise Refused(f"{len(empty)} videos in {samples} are empty, the first {empty[0]}; sample them again")
    folder.mkdir()
    for name in names:
        if name in there:
            (folder / name).symlink_to(there[name].resolve())
    return missing


@contextmanager
def alone() -> Iterator[Any]:
    """VBench's utilities, while no other process of this machine or file system fetches weights: they come in place."""
    utils = importlib.import_module("vbench.utils")
    cache = Path(utils.CACHE_DIR).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".fetching").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield utils


def keep_static(videos: Path, work: Path, device: str) -> tuple[Path, dict[str, list[int]]]:
    """The official filter of flicker: of each prompt the first five videos that stand still, numbered anew.

    Returns their folder and the numbers that they had.
    """
    code = importlib.import_module("vbench.cli.static_filter")
    with alone() as utils:
        utils.init_submodules(["dynamic_degree"])  # fetches RAFT
    code.DEVICE = device
    code.static_filter(
        argparse.Namespace(
            model=f"{utils.CACHE_DIR}/raft_model/models/raft-things.pth",
            videos_path=glob.escape(str(videos)),
            result_path=str(work),
            store_name="static.json",
            filter_scope="temporal_flickering",
            small=False,
            mixed_precision=False,
            alternate_corr=False,
        )
    )
    found = json.loads((work / "static.json").read_text(encoding="utf-8"))
    kept = {
        prompt: [int(Path(path).stem.rpartition("-")[2]) for path in entry["static_path"]]
        for prompt, entry in found.items()
    }
    if not any(kept.values()):
        raise Refused("every video of its prompts moves")
    return work / "filtered_videos", kept


class FilesFirst:
    """`os` for VBench-Long, which takes the extension of the first name in a folder, be it the folder of its clips."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @staticmethod
    def listdir(path: Any) -> list[str]:
        return [entry.name for entry in sorted(Path(path).iterdir(), key=lambda entry: (entry.is_dir(), entry.name))]


def long_options() -> dict[str, Any]:
    """What VBench-Long's eval_long.py sets by default, with the filter of flicker, which its shell script sets."""
    code = importlib.import_module("vbench2_beta_long")
    configs = Path(str(code.__file__)).parent / "configs"
    if not configs.is_dir():
        raise Refused(f"{configs} is missing: VBench-Long needs an editable installation (vbench.post-deploy.sh)")
    code.os = FilesFirst()
    return {
        "sb_clip2clip_feat_extractor": "dino",
        "bg_clip2clip_feat_extractor": "clip",
        "imaging_quality_preprocessing_mode": "longer",
        "clip_length_config": "clip_length_mix.yaml",
        "w_inclip": 1.0,
        "w_clip2clip": 0.0,
        "use_semantic_splitting": False,
        "slow_fast_eval_config": str(configs / "slow_fast_params.yaml"),
        "dev_flag": False,
        "sb_mapping_file_path": str(configs / "subject_mapping_table.yaml"),
        "bg_mapping_file_path": str(configs / "background_mapping_table.yaml"),
        "num_of_samples_per_prompt": JUDGED,
        "static_filter_flag": True,
    }


def evaluated(dimension: str, videos: Path, info: Path, work: Path, protocol: str, device: str) -> list[Any]:
    """One dimension's [score, [videos]] by the official class; VBench-Long's may have a third part."""
    if protocol == "vbench":
        kind, mode, options = importlib.import_module("vbench").VBench, "vbench_standard", {}
    else:
        options = long_options()
        kind, mode = importlib.import_module("vbench2_beta_long").VBenchLong, "long_vbench_standard"
    import torch

    with alone() as utils:
        utils.init_submodules([dimension])
    bench = kind(torch.device(device), str(info), str(work / "results"))
    bench.evaluate(videos_path=str(videos), name=dimension, dimension_list=[dimension], mode=mode, **options)
    path = work / "results" / f"{dimension}_eval_results.json"
    result: list[Any] = json.loads(path.read_text(encoding="utf-8"))[dimension]
    if result[0] is None or not math.isfinite(result[0]):
        raise Refused(f"its score is {result[0]}: no video was judged")
    return result


def versions() -> dict[str, str]:
    """Versions of what moves the scores, and the commit of VBench's code where it is a clone."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    folder = Path(str(importlib.import_module("vbench").__file__)).parent
    commit = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found | ({"vbench_commit": commit.stdout.strip()} if commit.returncode == 0 else {})


def device_name(device: str) -> str:
    """The card's name, or CPU."""
    import torch

    if not device.startswith("cuda"):
        return "CPU"
    if not torch.cuda.is_available():
        raise Refused("no GPU is visible; run on a machine with one, or give --device cpu")
    return str(torch.cuda.get_device_name(torch.device(device)))


def nothing_to_judge(dimension: str, error: Exception) -> bool:
    """Whether a dimension failed for what the videos show, and would again."""
    return isinstance(error, Refused) or (dimension == "color" and isinstance(error, ZeroDivisionError))


def identity_of(header: dict[str, Any], videos: Path) -> str:
    """What results that are kept belong to."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(videos.iterdir())]
    return hashlib.sha256(json.dumps([header, files]).encode()).hexdigest()


def remembered(kept: Path | None, dimension: str, identity: str) -> list[Any] | None:
    """Result and filter of a dimension as an earlier run kept them."""
    try:
        found = json.loads((kept / f"{dimension}.json").read_text(encoding="utf-8")) if kept else None
    except (OSError, ValueError):
        return None
    return [found["result"], found["static"]] if found and found.get("identity") == identity else None


def remember(kept: Path | None, dimension: str, **found: Any) -> None:
    """Keep them."""
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        half = kept / f".{dimension}.half"
        half.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
        half.replace(kept / f"{dimension}.json")


def reason_of(dimension: str, error: Exception) -> str:
    """Why a dimension failed, for a reader; colour divides by the number of videos that show the object at all."""
    if dimension == "color" and isinstance(error, ZeroDivisionError):
        return "no video shows any of its objects"
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and write the results."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Refused(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but scores of several processes differ; run one")
    dimensions = arguments.dimensions or list(DIMENSIONS)
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown:
        raise Refused(f"VBench has no dimension {unknown[0]}; it has {', '.join(DIMENSIONS)}")
    try:
        text = arguments.info.read_bytes()
        names = wanted_videos(json.loads(text), dimensions, arguments.still_samples)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"cannot read {arguments.info}: {error!r}; expected VBench_full_info.json") from None
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{arguments.out.stem[:40]}-", dir=arguments.out.parent) as folder:
        work = Path(folder).resolve()
        videos = work / "videos"
        missing = linked(arguments.samples, names, videos, arguments.allow_missing)
        header = {
            "official": arguments.protocol,
            "version": FORMAT,
            "versions": versions(),
            "device": device_name(arguments.device),
            "gpus": 1,
            "info_sha256": hashlib.sha256(text).hexdigest(),
            "missing": missing,
        }
        results: dict[str, list[Any]] = {}
        failed: dict[str, str] = {}
        static: dict[str, list[int]] = {}
        again: list[str] = []
        identity = identity_of(header, videos)
        for dimension in dimensions:
            if (before := remembered(arguments.kept, dimension, identity)) is not None:
                results[dimension], passed = before
                static |= passed
                continue
            try:
                looked_at = videos
                if dimension == "temporal_flickering" and arguments.protocol == "vbench":
                    looked_at, static = keep_static(videos, work, arguments.device)
                results[dimension] = evaluated(
                    dimension, looked_at, arguments.info.resolve(), work, arguments.protocol, arguments.device
                )
                passed = static if dimension == "temporal_flickering" else {}
                remember(arguments.kept, dimension, identity=identity, result=results[dimension], static=passed)
            except Exception as error:  # of any kind, by the model; what the others found is kept
                traceback.print_exc()
                failed[dimension] = reason_of(dimension, error)
                again += [] if nothing_to_judge(dimension, error) else [dimension]
        found = {**header, "failed": failed, "static": static, "results": results}
        (work / "out.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (work / "out.json").replace(arguments.out)
    for dimension, reason in failed.items():
        print(f"{dimension} failed: {reason}", file=sys.stderr)
    if not results:
        arguments.out.unlink()
        raise Refused("every dimension failed")
    if again and not arguments.allow_missing:
        raise Refused(f"{', '.join(again)} failed, see above; what the other dimensions gave is kept, run it again")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where every dimension that has something to judge has a score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="folder of PROMPT-NUMBER.mp4")
    parser.add_argument("--info", type=Path, required=True, help="VBench_full_info.json")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dimensions", nargs="+", help="default: all 16")
    parser.add_argument("--protocol", choices=("vbench", "vbench-long"), default="vbench")
    parser.add_argument("--still-samples", type=int, default=25, help="videos of a prompt of temporal flickering")
    parser.add_argument("--allow-missing", action="store_true", help="evaluate what is there, and name what is not")
    parser.add_argument("--kept", type=Path, help="folder of finished dimensions, for another run")
    parser.add_argument("--device", default="cuda")
    try:
        run(parser.parse_args(argv))
    except Refused as error:
        print(f"vbench_official.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
