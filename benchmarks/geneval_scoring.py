"""How long GenEval's scores take from stored detections: 553 prompts of 4 images with about 20 objects each.

python benchmarks/geneval_scoring.py    # prints the seconds; below 10 on one core
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcm.data.prompts import COCO, Metadata, geneval
from rcm.evaluation import results_jsonl
from rcm.evaluation.geneval_scores import from_measured
from rcm.evaluation.measured import read_measured, write_measured
from rcm.evaluation.samples import Expected

SIDE = 1024  # pixels of the image
HEADER = {"measured": "geneval", "by": {"name": "random"}, "known": None, "sampling": None}


def rows(prompts: Sequence[Metadata], samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """What a detector stores: what is asked for, with a chance of 0.8, and other objects, most of them unsure."""
    for index, metadata in enumerate(prompts):
        for number in range(samples):
            wanted = [entry for entry in metadata["include"] for _ in range(entry["count"]) if rng.random() < 0.8]
            found = [_object(entry["class"], rng.beta(8, 1), rng) for entry in wanted]
            others = rng.choice(COCO.classes, rng.poisson(18))
            found += [_object(str(name), rng.beta(1, 8), rng) for name in others]
            yield {
                "prompt": index,
                "filename": f"{index:05d}/samples/{number:04d}.png",
                "metadata": metadata,
                "detections": [found[k] for k in rng.permutation(len(found))],
            }


def _object(name: str, score: float, rng: np.random.Generator) -> list[Any]:
    x, y = rng.uniform(0, SIDE / 2, 2)
    width, height = rng.uniform(20, SIDE / 2, 2)
    return [name, x, y, x + width, y + height, score, str(rng.choice(COCO.colors))]


def run(folder: Path, prompts: Sequence[Metadata], samples: int = 4) -> tuple[dict[str, Any], float]:
    """Store detections in `folder`, score them, and give back the scores and the seconds from file to file."""
    stored = folder / "detections.jsonl"
    write_measured(stored, HEADER, rows(prompts, samples, np.random.default_rng(0)))
    started = time.perf_counter()
    measured = read_measured([stored], "geneval")
    made = from_measured(measured, model="random", steps=4, expected=Expected(prompts, samples))
    (folder / "results.jsonl").write_text(results_jsonl(made.results))
    return made.scores, time.perf_counter() - started


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as place:
        scores, seconds = run(Path(place), geneval(COCO))
        size = (Path(place) / "detections.jsonl").stat().st_size / 2**20
    overall = scores["metrics"]["geneval.overall"]
    print(f"{scores['n_samples']} images, {size:.1f} MiB of detections: {seconds:.2f} s")
    print(f"overall {overall['value']:.3f} ({overall['low']:.3f} to {overall['high']:.3f})")
