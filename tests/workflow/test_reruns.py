"""After a change: exactly the jobs that depend on it run again.

A tree of empty outputs that Snakemake takes for finished; what each change should lead to is written down by hand.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
OFFICIAL = (
    *("scale=cosmos-predict2-2b", "methods=[rcm]", "scatter={synthesize: 1, embed: 1, report: 1}"),
    "overrides=[evaluation.scorer=geneval-mmdet]",
)
JUDGED = "results/cosmos-predict2-2b/images/official/geneval-mmdet/rcm-0-1.jsonl"


def settings(*overrides: str, **others: str) -> list[str]:
    """The command line's configuration of the finished tree, with changes."""
    small = {"methods": "[dmd, rcm]", "steps": "[1]", "controls": "[oracle, shuffled]"}
    words = small | others | {"overrides": f"[{', '.join(overrides)}]"}
    return ["--config", *(f"{key}={value}" for key, value in words.items())]


class Tree:
    """A copy of the workflow, and Snakemake in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Snakefile", "workflow", "config", "src", "kernels", "assets"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(source, folder / name)
        (folder / "profiles").symlink_to("workflow/profiles")
        (folder / "mine").mkdir()
        (folder / "mine/prompts.txt").write_text("a red circle\n", encoding="utf-8")
        images = folder / "config/experiment/tiny-images.yaml"
        text = images.read_text(encoding="utf-8")
        text = re.sub(
            r"(?s)  train: .*?(?=  dev:)", "  train: {file: prompts_train, seed: 1, prompts: 9, samples: 1}\n", text
        )
        mine = "checkpoints:\n  prompts_train: {source: mine/prompts.txt, sha256: null}\n"
        images.write_text(re.sub(r"(?m)^checkpoints:.*\n", mine, text), encoding="utf-8")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder / "src"), str(folder / "kernels")]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, str(Path(__file__).with_name("dry_runs.py"))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def call(self, *words: str, path: str = "", changed: bool = False) -> dict[str, Any]:
        """Call Snakemake; what it said and the necessary jobs."""
        answer = self.folder / "answer.json"
        answer.unlink(missing_ok=True)
        case = {"words": words, "path": [path] * bool(path), "changed": changed, "answer": str(answer)}
        assert self.process.stdin and self.process.stdout
        print(json.dumps(case), file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "0\n"
        return json.loads(answer.read_text(encoding="utf-8"))

    def finish(self, *words: str) -> None:
        """Make all outputs, empty, and let Snakemake take them for its own."""
        for job in self.call("-n", "-F", *words)["jobs"]:
            for output, is_folder in job["outputs"].items():
                place = self.folder / output
                (place if is_folder else place.parent).mkdir(parents=True, exist_ok=True)
                (place / "content" if is_folder else place).touch()
        assert "100%" in (said := self.call("--touch", "-F", "-c1", *words)["said"]), said
        assert self.again(*words) == set()

    def again(self, *words: str, path: str = "", changed: bool = False) -> set[str]:
        """The jobs that would run: rule, medium, who is trained, sampled or scored, and suite."""
        answer = self.call("-n", *words, path=path, changed=changed)
        assert answer["jobs"] or "Nothing to be done" in answer["said"], answer["said"][-2000:]
        return {label(job["rule"], job["wildcards"]) for job in answer["jobs"]}


def label(rule: str, wildcards: dict[str, str]) -> str:
    """Such as "sample images rcm report", whatever the seed, the number of steps and the part."""
    who = next((wildcards[key] for key in ("method", "control", "model", "student") if key in wildcards), "")
    who = "teacher" if rule == "sample_teacher" else who.partition("-")[0]
    words = (rule.partition("_")[0] if "sample" in rule else rule, wildcards.get("media"), who, wildcards.get("suite"))
    return " ".join(filter(None, words if not rule.startswith("figure") else (rule,)))


def of(*lines: str) -> set[str]:
    """Labels, in which {a,b} stands for each."""
    found: set[str] = set()
    for line in lines:
        pieces = [piece.split(",") for piece in re.split(r"[{}]", line)]
        found |= {"".join(chosen) for chosen in product(*(p if k % 2 else [",".join(p)] for k, p in enumerate(pieces)))}
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    tree = Tree(tmp_path_factory.mktemp("reruns"))
    tree.finish(*settings())
    yield tree
    assert tree.process.stdin
    tree.process.stdin.close()
    tree.process.wait(60)


PAGE = of("report", "all")
OF_SCORES = {
    "images": of("table1", "figure_quality_diversity", "figure_steps") | PAGE,
    "clips": of("table2") | PAGE,
}
OF_SAMPLES = {"images": of("figure_samples"), "clips": of("figure_clips")}


def scored(media: str, *who: str) -> set[str]:
    """Scores, and what is made of them."""
    return of(*(f"evaluate {media} {name}" for name in who)) | OF_SCORES[media]


def sampled(media: str, *who: str, suites: str = "{report,diversity}") -> set[str]:
    """Samples of models, and what is made of them."""
    return of(*(f"sample {media} {name} {suites}" for name in who)) | scored(media, *who) | OF_SAMPLES[media]


def exported(media: str, *who: str) -> set[str]:
    """Students, and what is made of them."""
    found = of(*(f"export {media} {name}" for name in who)) | sampled(media, *who)
    if media == "clips":
        return found | of("throughput clips rcm")
    return found | (of("precision images rcm", "figure_precision") if "rcm" in who else set())


def distilled(media: str, *who: str) -> set[str]:
    """Trainings, and what is made of them."""
    curves = of("figure_training") if media == "images" else set()
    return of(*(f"distill {media} {name}" for name in who)) | curves | exported(media, *who)


EVERY = ("teacher", "rcm", "oracle", "shuffled")
TRAINED = distilled("images", "dmd", "rcm") | distilled("clips", "rcm")
CONTROLS = {
    media: of(f"sample {media} oracle {{report,diversity}}", f"sample {media} shuffled report")
    | scored(media, "oracle", "shuffled")
    for media in ("images", "clips")
}
SHARDS = of("synthesize {images,clips}")
TAUGHT = sampled("images", "teacher") | sampled("clips", "teacher")
TIMED = of("throughput clips {teacher,rcm}", "table2") | PAGE
ROUNDED = of("precision images {teacher,rcm}", "figure_precision") | PAGE
SCORED = scored("images", "dmd", *EVERY) | scored("clips", *EVERY)
FIGURES = of("figure_{samples,clips,quality_diversity,steps,training,precision}")
PROMPTS = of("prompts {images,clips} {train,report,diversity}", "prompts images dev")
DECODED = TRAINED | TAUGHT | TIMED | CONTROLS["images"] | CONTROLS["clips"]
MADE = SHARDS | DECODED | ROUNDED  # of prompts and teachers

VALUES: dict[str, tuple[list[str], set[str]]] = {
    "only repeated": (settings("distillation.batch=48"), set()),
    "more processes": (settings(nproc="2"), set()),
    "another method": (settings(methods="[dmd, rcm, scm]"), distilled("images", "scm")),
    "another number of steps": (
        settings(steps="[1, 2]"),
        sampled("images", "dmd", "rcm") | sampled("clips", "rcm") | of("throughput clips rcm"),
    ),
    "checkpoints": (
        settings("checkpoints.transformer.sha256=null"),
        of("download_transformer {images,clips}", "convert {images,clips}")
        | SHARDS
        | TRAINED
        | TAUGHT
        | TIMED
        | ROUNDED,
    ),
    "teacher": (settings("teacher.shift=2.5"), SHARDS | TRAINED | TAUGHT | TIMED | ROUNDED),
    "inference": (
        settings("inference.batch=48"),
        SHARDS | TRAINED | TAUGHT | TIMED,
    ),
    "prompts": (settings("prompts.still=0.5"), PROMPTS | MADE),
    "suites.train": (settings("suites.train.seed=5"), of("prompts {images,clips} train") | SHARDS | TRAINED),
    "suites.dev": (settings("suites.dev.per_task=10"), of("prompts images dev") | ROUNDED),
    "suites.report": (
        settings("suites.report.samples=3"),
        of("prompts {images,clips} report", "sample images {dmd,rcm,teacher,oracle,shuffled} report")
        | of("sample clips {rcm,teacher,oracle,shuffled} report", "figure_{samples,clips}")
        | TIMED
        | SCORED,
    ),
    "suites.diversity": (
        settings("suites.diversity.samples=8"),
        of("prompts {images,clips} diversity", "sample images {dmd,rcm,teacher,oracle} diversity")
        | of("sample clips {rcm,teacher,oracle} diversity")
        | SCORED - of("evaluate {images,clips} shuffled"),
    ),
    "distillation": (settings("distillation.batch=24"), TRAINED),
    "distillation and parallel, what changes no weights": (
        settings("distillation.state_every=7", "distillation.wandb=offline", "parallel.recompute=blocks"),
        PAGE,
    ),
    "parallel": (settings("parallel.precision=bfloat16"), TRAINED),
    "sampler": (settings("sampler.sigma_max=79"), exported("images", "dmd", "rcm") | exported("clips", "rcm")),
    "sampler, of which one method has its times": (
        settings('"sampler.mid_times=[1.3, 1.0, 0.5]"'),
        distilled("images", "dmd") | exported("images", "rcm") | exported("clips", "rcm"),
    ),
    "evaluation": (settings("evaluation.bootstrap=50"), SCORED),
    "evaluation.throughput": (settings("evaluation.throughput=9"), TIMED),
    "evaluation.precision": (settings("evaluation.precision.samples=4"), ROUNDED),
    "evaluation, what tables are refused by": (
        settings("evaluation.oracle_at_least=0.9"),
        of("table{1,2}") | PAGE,
    ),
}


@pytest.mark.parametrize("section", VALUES)
def test_a_value(tree: Tree, section: str) -> None:
    words, expected = VALUES[section]
    assert tree.again(*words) == expected


Change = tuple[str, str, str]  # a file, what stands in it once ("" means its end), and what it is replaced by


def changed(folder: Path, *changes: Change) -> None:
    """Change files."""
    for path, old, new in changes:
        text = (folder / path).read_bytes()
        assert not old or text.count(old.encode()) == 1, (path, old)
        (folder / path).write_bytes(text.replace(old.encode(), new.encode()) if old else text + new.encode())


CODE = "\nEXTRA = 1\n"
OF_IMAGES = of("synthesize images", "sample images teacher {report,diversity}", "figure_samples") | ROUNDED
FILES: dict[str, tuple[tuple[Change, ...], set[str]]] = {
    "no number": (
        (
            ("config/objective/dmd.yaml", "", "# a comment\n"),
            ("src/rcm/objectives/dmd.py", "", "# a comment\n"),
            ("src/rcm/flow.py", '"""TrigFlow times', '"""Other words. TrigFlow times'),
            ("src/rcm/training/signals.py", "", CODE),  # when a training stops
            ("src/rcm/cli/train.py", "def _previewer(", "EXTRA = 1\n\n\ndef _previewer("),
            ("src/rcm/cli/doctor.py", "", CODE),
        ),
        set(),
    ),
    "one objective": (
        (("config/objective/dmd.yaml", "dmd_weight: 1.0", "dmd_weight: 0.9"),),
        distilled("images", "dmd"),
    ),
    "code of objectives": ((("src/rcm/objectives/dmd.py", "", CODE),), TRAINED),
    "code of a score": ((("src/rcm/evaluation/shapes.py", "", CODE),), SCORED | FIGURES),
    "code of figures": ((("src/rcm/report/plots.py", "", CODE),), FIGURES | PAGE),
    "template of the page": ((("src/rcm/report/page.html.j2", "", "<!-- -->"),), PAGE),
    "prompts": (
        (("mine/prompts.txt", "", "a blue square\n"),),
        of("download_prompts_train", "prompts {images,clips} train") | SHARDS | TRAINED,
    ),
    "checkpoint": (
        (("assets/tiny/images.pth", "", "x"),),
        of("download_transformer images", "convert images", "evaluate images teacher")
        | OF_IMAGES
        | distilled("images", "dmd", "rcm"),
    ),
    "codec": ((("assets/tiny/codec.pth", "", "x"),), of("download_codec") | DECODED),
    "published numbers": ((("config/published/table1.csv", "", "\n"),), of("table1") | PAGE),
}


@pytest.fixture
def restored(tree: Tree) -> Iterator[Path]:
    """The folder of the tree, in which inputs may be changed; afterwards they are as before, their times too."""
    kept = tree.folder.with_name("kept")
    names = ("config", "src", "assets", "mine", "workflow", "data")
    for name in names:
        shutil.copytree(tree.folder / name, kept / name)
    yield tree.folder
    for name in names:
        shutil.copytree(kept / name, tree.folder / name, dirs_exist_ok=True)
    shutil.rmtree(kept)


@pytest.mark.parametrize("name", FILES)
def test_a_file(tree: Tree, restored: Path, name: str) -> None:
    changes, expected = FILES[name]
    changed(restored, *changes)
    assert tree.again(*settings(), changed=True) == expected


def test_times_do_not_count(tree: Tree, restored: Path) -> None:
    """Nothing runs again because git has checked out the files that were there."""
    patterns = ("data/**/*.jsonl", "mine/*", "config/**/*.*", "assets/tiny/*.*")  # sources after what is made of them
    found = [path for pattern in patterns for path in restored.glob(pattern)]
    assert len(found) > 40
    for path in found:
        path.touch()
    assert tree.again(*settings()) == set()


VERSIONS = {
    "numpy": PROMPTS | MADE | FIGURES,
    "matplotlib": FIGURES | PAGE,
    "wandb": set(),
}


@pytest.mark.parametrize("package", VERSIONS)
def test_the_version_of_a_package(tree: Tree, tmp_path: Path, package: str) -> None:
    """Another one is found before that which is installed."""
    record = tmp_path / f"{package}-99.0.dist-info" / "METADATA"
    record.parent.mkdir()
    record.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 99.0\n", encoding="utf-8")
    assert tree.again(*settings(), path=str(tmp_path), changed=True) == VERSIONS[package]


def test_the_environment_of_an_evaluator(tree: Tree, restored: Path) -> None:
    words = (JUDGED, "--config", *OFFICIAL)
    tree.finish(*words)
    changed(restored, ("workflow/envs/geneval.yaml", "- libgl ", "- libgl # a comment"))
    assert tree.again(*words) == set()
    changed(restored, ("workflow/envs/geneval.yaml", "mmdet==2.27.0", "mmdet==2.28.0"))
    # the folder that is laid out for it is not kept
    assert tree.again(*words) == of("arrange_official images rcm", "geneval_official images rcm")


def test_scales_write_no_common_file(tree: Tree) -> None:
    """So that they can be made at the same time: Snakemake locks files, not folders."""
    written = []
    for words in (settings(), ["--config", *OFFICIAL]):
        jobs = tree.call("-n", "-F", *words)["jobs"]
        written.append({name for job in jobs for name in (*job["outputs"], *job["notes"]) if name})
    assert min(map(len, written)) > 60
    assert not written[0] & written[1]
