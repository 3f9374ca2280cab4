"""Synthetic scores, samples and metrics of the pipeline's schema; made here, never shipped as results."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcm.data import world
from rcm.data.prompts import TASKS, TINY, evaluation_suite
from rcm.evaluation.scores import VERSION

PER_TASK = 10
QUALITY = {  # probability of a correct sample by model and steps
    ("teacher", 20): 0.92,
    ("scm-0", 1): 0.45,
    ("scm-0", 2): 0.66,
    ("scm-0", 4): 0.74,
    ("dmd-0", 1): 0.70,
    ("dmd-0", 2): 0.80,
    ("dmd-0", 4): 0.86,
    ("dmd2-0", 1): 0.71,
    ("dmd2-0", 2): 0.82,
    ("dmd2-0", 4): 0.87,
    ("rcm-0", 1): 0.66,
    ("rcm-0", 2): 0.84,
    ("rcm-0", 4): 0.88,
    ("oracle", 0): 0.995,
    ("codec", 0): 0.99,
    ("shuffled", 0): 0.05,
}
DIVERSITY = {"teacher": 0.92, "scm": 0.9, "dmd": 0.6, "dmd2": 0.62, "rcm": 0.85}
DIVERSITY |= {"oracle": 0.97, "codec": 0.97, "shuffled": 0.97}
DETAIL = {"teacher": 30.0, "scm": 24.0, "dmd": 28.0, "dmd2": 28.2, "rcm": 28.5}
DETAIL |= {"oracle": 33.0, "codec": 31.0, "shuffled": 33.0}


def _metric(values: np.ndarray, kind: str, value: float | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    means = [np.mean(rng.choice(values, len(values))) for _ in range(200)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": float(np.mean(values) if value is None else value), "low": low, "high": high, "kind": kind}


def score(model: str, steps: int, media: str, quality: float, *, seed: int = 0) -> dict[str, Any]:
    """A score JSON as rcm.evaluation writes it, of a model that is right with probability `quality`."""
    method = model.partition("-")[0]
    rng = np.random.default_rng([seed, len(model), steps, int(1000 * quality)])
    tags = [task for task in TASKS for _ in range(PER_TASK)]
    hardness = np.random.default_rng(7).normal(0, 0.1, len(tags))
    correct = rng.binomial(4, np.clip(quality + hardness * (quality < 0.95), 0, 1)) / 4
    by_task = {task: correct[[tag == task for tag in tags]] for task in TASKS}
    metrics = {"shapeeval.overall": _metric(correct, "substituted_model")}
    metrics |= {f"shapeeval.{task}": _metric(values, "substituted_model") for task, values in by_task.items()}
    diverse = np.clip(DIVERSITY[method] + rng.normal(0, 0.05, 12), 0, 1)
    psnr = DETAIL[method] + steps / 4 + rng.normal(0, 1, len(tags))
    metrics |= {
        **{f"diversity.{name}_entropy": _metric(2.5 * diverse, "analogue") for name in ("cell", "color", "fill")},
        "diversity.vendi": _metric(1 + 7 * diverse, "analogue"),
        "pixels.distance": _metric(diverse / 8, "analogue"),
        "prior.cell_distance": _metric(1 - diverse, "analogue"),
        "prior.color_distance": {"value": None, "low": None, "high": None, "kind": "analogue"},
        "fidelity.psnr": _metric(psnr, "analogue"),
        "fidelity.sharpness": _metric(psnr / 35, "analogue"),
    }
    values: dict[str, Any] = {"tag": tags, "shapeeval.overall": correct.tolist(), "fidelity.psnr": psnr.tolist()}
    values |= {"diversity.vendi": (1 + 7 * diverse).tolist(), "diversity.cell_entropy": (2.5 * diverse).tolist()}
    if media == "clips":
        dimensions = {
            "dynamic_degree": "substituted_model",
            "temporal_flickering": "same_formula",
            "motion": "analogue",
        }
        metrics |= {f"shapeeval_frames.{key}": metrics[f"shapeeval.{key}"] for key in ("overall", *TASKS)}
        metrics |= {f"shapebench.{name}": _metric(np.sqrt(correct), kind) for name, kind in dimensions.items()}
    return {
        "model": model,
        "steps": steps,
        "media": media,
        "n_prompts": len(tags),
        "n_samples": 4 * len(tags),
        "metrics": metrics,
        "evaluator": {"name": "ShapeEval", "version": VERSION, "prompts_sha256": "ab" * 32},
        "per_prompt": values,
    }


def real(model: str, steps: int, media: str, metrics: dict[str, tuple[float, str]], **evaluator: Any) -> dict[str, Any]:
    """A score JSON of real images or clips: values with their kinds, each ± 0.02; what `evaluator` says is added."""
    sigma_max = {"images": {"teacher": 80}, "clips": {"teacher": 5000}}[media].get(model.partition("-")[0], 1600)
    checkpoint = hashlib.sha256(model.encode()).hexdigest()
    sampling: dict[str, Any] = {"checkpoint_sha256": checkpoint, "sigma_max": sigma_max, "steps": steps, "seed": 43}
    sampling |= {"precision": "bfloat16", "device": CARD}
    sampling |= {"sampler": {"sigma_max": sigma_max}, "times": [1.558, 1.3, 1.0, 0.6][:steps]}
    sampling |= {"width": 1360, "height": 768, "frames": {"images": 1, "clips": 81}[media]}
    if model == "teacher":
        section = {"sampler": "cosmos", "guidance": 4.5, "guidance_form": "conditional", "shift": 1.0, "steps": steps}
        sampling |= {"sampler": section, "times": None}
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    said: dict[str, Any] = {
        "version": VERSION,
        "device": CARD,
        "versions": versions,
        "known": None,
        "sampling": sampling,
        "missing": [],
    }
    said |= {"bootstrap": {"resamples": 1000, "seed": 0}}
    count = {"images": 553, "clips": 944}[media]
    bounds = {"n_prompts": count}
    return {
        "model": model,
        "steps": steps,
        "media": media,
        "n_prompts": count,
        "n_samples": {"images": 2212, "clips": 6220}[media],
        "metrics": {
            key: {"value": value, "low": value - 0.02, "high": value + 0.02, "kind": kind, **bounds}
            for key, (value, kind) in metrics.items()
        },
        "evaluator": said | evaluator,
        "per_prompt": {"tag": []},
        "file": f"results/{media}/scores/{model}-{steps}.json",
    }


CARD = "NVIDIA H100 80GB HBM3"
MASK2FORMER = {
    "name": "GenEval (HF Mask2Former)",
    "models": {"mask2former-swin-small-coco-instance": "ab" * 32, "clip-vit-large-patch14": "cd" * 32},
    "known": {"score": 0.95, "facts": 20, "failed": ["two dogs"], "images": ["a", "b", "c", "d"]},
    "prompts_file": "evaluation_metadata.jsonl",
    "prompts_sha256": "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    "paper": "2B",
    "diversity": {
        "prompts_sha256": "ee" * 32,
        "samples": 480,
        "by": {
            "name": "Diversity",
            "models": {"clip-vit-large-patch14": "cd" * 32, "dinov2-large": "ef" * 32, "vgg19": "dc" * 32},
        },
    },
}
VBENCH = {
    "name": "VBench (official code)",
    "models": {"vbench": "0.1.5"},
    "gpus": 1,
    "prompts_file": "all_dimension_longer.txt",
    "prompts_file_sha256": "58ed0665de52c1bd",
    "prompts_sha256": "7701cd2e9cffb66b" * 4,
    "paper": "1.3B",
}


def geneval(model: str, steps: int, overall: float, **evaluator: Any) -> dict[str, Any]:
    """A score JSON of GenEval whose tasks lie around `overall`, with diversity."""
    tasks = zip(TASKS, (0.18, 0.16, -0.08, 0.04, -0.2, -0.1), strict=True)
    metrics = {"geneval.overall": (overall, "substituted_model")}
    metrics |= {f"geneval.{task}": (overall + gap, "substituted_model") for task, gap in tasks}
    metrics |= {f"diversity.{name}": (0.2, "official") for name in ("clip_distance", "dino_distance", "vbench2")}
    return real(model, steps, "images", metrics, **MASK2FORMER | evaluator)


def vbench(model: str, steps: int, total: float, **evaluator: Any) -> dict[str, Any]:
    """A score JSON of VBench with three official dimensions and two native ones."""
    metrics = {"vbench.total": (total, "official"), "vbench.quality": (total + 0.01, "official")}
    metrics |= {"vbench.semantic": (total - 0.04, "official")}
    metrics |= {"vbench.subject_consistency": (0.96, "official"), "vbench.human_action": (0.94, "official")}
    metrics |= {"vbench.temporal_flickering": (0.9905, "official")}
    metrics |= {"vbench_native.subject_consistency": (0.9588, "same_formula")}
    metrics |= {"vbench_native.temporal_flickering": (0.9906, "same_formula")}
    native = {"name": "VBench (native part)", "models": {"dino-vitb16": "0d" * 32, "clip-vit-base-patch32": "0c" * 32}}
    gaps = {"subject_consistency": -0.0012, "temporal_flickering": 3e-8}
    return real(
        model, steps, "clips", metrics, **VBENCH | {"native": native, "native_minus_official": gaps} | evaluator
    )


@pytest.fixture(scope="session")
def genevals() -> list[dict[str, Any]]:
    """Scores of GenEval with transformers' detector."""
    runs = {("teacher", 35): 0.826, ("dmd2-0", 4): 0.79, ("rcm-0", 4): 0.812, ("rcm-0", 1): 0.777}
    return [geneval(model, steps, overall) for (model, steps), overall in runs.items()]


@pytest.fixture(scope="session")
def vbenches() -> list[dict[str, Any]]:
    """Scores of VBench by the official code and by what is implemented here."""
    runs = {("teacher", 50): 0.8270, ("dmd2-0", 4): 0.842, ("rcm-0", 4): 0.8421, ("rcm-0", 2): 0.81}
    return [vbench(model, steps, total) for (model, steps), total in runs.items()]


@pytest.fixture(scope="session")
def speeds() -> list[dict[str, Any]]:
    """Frames per second of the models of `vbenches`."""
    found = {("teacher", 50): 0.7161, ("dmd2-0", 4): 14.02, ("rcm-0", 4): 14.04, ("rcm-0", 2): 22.6}
    about = {"media": "clips", "frames": 81, "batch": 1, "device": CARD, "precision": "bfloat16", "samples": 8}
    return [{"model": model, "steps": steps, "fps": fps, **about} for (model, steps), fps in found.items()]


@pytest.fixture(scope="session")
def scored() -> Callable[..., dict[str, Any]]:
    """`score`, for tests that need scores of their own."""
    return score


@pytest.fixture(scope="session")
def scores() -> dict[str, list[dict[str, Any]]]:
    """Scores of all models, controls included, by medium."""
    clips = [key for key in QUALITY if not key[0].startswith(("scm", "dmd"))]
    return {
        "images": [score(model, steps, "images", quality) for (model, steps), quality in QUALITY.items()],
        "clips": [score(model, steps, "clips", QUALITY[model, steps]) for model, steps in clips],
    }


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published table of the shape of config/published/table1.csv."""
    path = tmp_path_factory.mktemp("published") / "table1.csv"
    path.write_text(
        "group,model,params,resolution,steps,guided,overall,counting\n"
        "pretrained,SD_X & L,2.6B,1024x1024,50,1,0.55,0.39\n"
        "teacher,Cosmos-Predict2,0.6B,1360x768,35,1,0.81,0.74\n"
        "rcm,Cosmos-Predict2,0.6B,1360x768,4,0,0.79,1.00\n"
    )
    return path


def write_samples(folder: Path, media: str, quality: float, *, per_task: int = 2) -> Path:
    """A sample folder in GenEval's layout: ground truth, or with probability 1 - quality another prompt's."""
    rng = np.random.default_rng(int(100 * quality))
    prompts = evaluation_suite(TINY, seed=3, per_task=per_task, media=media)
    for index, prompt in enumerate(prompts):
        shown = prompt if rng.random() < quality else prompts[index - 1]
        frames = world.render(world.sample_scene(shown, rng), 9 if media == "clips" else 1)
        target = folder / f"{index:05d}" / "samples"
        target.mkdir(parents=True)
        (target.parent / "metadata.jsonl").write_text(json.dumps(prompt) + "\n")
        first, *rest = [Image.fromarray(frame) for frame in frames]
        first.save(target / "0000.png", **({"save_all": True, "append_images": rest, "loop": 0} if rest else {}))
    return folder


def write_metrics(path: Path, method: str, updates: int = 120) -> Path:
    """Metrics of a distillation as `rcm.training` writes them."""
    rng = np.random.default_rng(len(method))
    rows: list[dict[str, Any]] = []
    for update in range(1, updates + 1):
        row: dict[str, Any] = {"role": "student", "update": update, "gradient_norm": 2 + rng.gamma(2.0, 0.4)}
        if method in ("scm", "rcm"):
            row |= {"scm_loss": 1 + rng.normal(0, 0.02), "scm_tangent_norm": 30 / update**0.3 * rng.gamma(9, 1 / 9)}
        if method != "scm":
            row |= {"dmd_loss": 60 / update**0.2 * rng.gamma(9, 1 / 9)}
            critic = {"role": "critic", "update": update, "critic_loss": 90 / update**0.1 * rng.gamma(9, 1 / 9)}
            if method == "dmd2":
                row |= {"gan_loss": 0.7 + rng.normal(0, 0.05)}
                critic |= {"critic_gan": 1.4 + rng.normal(0, 0.05)}
            rows.append(critic | {"gradient_norm": 5 * rng.gamma(4, 0.25)})
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"iteration": i + 1, **row}) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.fixture(scope="session")
def image_samples(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sample folders of images, in no particular order."""
    root = tmp_path_factory.mktemp("images") / "samples"
    runs = [("rcm-0-4", 0.9), ("teacher-20", 1.0), ("rcm-0-1", 0.5), ("dmd-0-4", 0.8)]
    return [write_samples(root / name / "report" / "1-of-1", "images", quality) for name, quality in runs]


@pytest.fixture(scope="session")
def clip_samples(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sample folders of clips."""
    root = tmp_path_factory.mktemp("data") / "clips" / "samples"
    runs = [("rcm-0-4", 0.9), ("teacher-20", 1.0)]
    return [write_samples(root / name / "report" / "1-of-1", "clips", quality, per_task=1) for name, quality in runs]


@pytest.fixture(scope="session")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Metrics of the four methods."""
    root = tmp_path_factory.mktemp("training")
    return [write_metrics(root / f"{method}-0" / "metrics.jsonl", method) for method in ("rcm", "scm", "dmd2", "dmd")]


@pytest.fixture(scope="session")
def rounding() -> list[dict[str, Any]]:
    """Rounding errors of two networks, as rcm.evaluation.precision measures them."""
    times = [0.2, 0.7, 1.3]
    levels = {"float32": 1e-7, "bfloat16, time in float32": 1e-2, "bfloat16": 3e-2}
    errors = {
        name: {
            key: {bound: [level * k for _ in times] for bound, k in (("low", 0.5), ("median", 1.0), ("high", 2.0))}
            for key in ("output", "tangent")
        }
        for name, level in levels.items()
    }
    return [{"model": model, "samples": 8, "times": times, "errors": errors} for model in ("rcm-0", "teacher")]


@pytest.fixture(scope="session")
def sampled() -> Callable[..., Path]:
    """`write_samples`, for tests that need samples of their own."""
    return write_samples
