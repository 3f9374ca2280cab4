"""The workflow as a user calls it: which jobs there are, what runs again after which change, and how it complains."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.mini_scale import write as write_mini_scale
from tests.cli.mini_scale import write_evaluators

ROOT = Path(__file__).parents[2]
RULES = {
    *("download_transformer", "download_codec", "convert", "prompts", "synthesize", "distill", "export"),
    *("sample_student", "sample_teacher", "sample_control", "evaluate", "table1", "table2"),
    *("figure_samples", "figure_clips", "figure_quality_diversity", "figure_training", "report", "all"),
    *("precision", "figure_precision", "figure_steps", "throughput"),
}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a workflow needs, without results."""
    folder = tmp_path_factory.mktemp("workflow")
    for name in ("Snakefile", "workflow", "config", "src", "kernels", "assets"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def snakemake(copy: Path) -> Run:
    """Call Snakemake in the copy, with the copy's own library."""
    path = os.pathsep.join([str(copy / "src"), str(copy / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snakemake", *words]
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)

    return call


def jobs(run: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """Number of jobs by rule, from the last table of a dry run."""
    assert run.returncode == 0, run.stdout + run.stderr
    tables = re.findall(r"^job +count\n-[- ]+\n((?:\w+ +\d+\n)+)", run.stdout + run.stderr, re.MULTILINE)
    return {name: int(count) for name, count in re.findall(r"(\w+) +(\d+)", tables[-1])} if tables else {}


def test_default_target_lists_every_rule(snakemake: Run) -> None:
    found = jobs(snakemake("-n"))
    assert set(found) - {"total"} == RULES
    # four methods for images, rCM for clips; at three steps each, report in two parts and diversity in one
    assert (found["distill"], found["export"], found["sample_student"]) == (5, 5, 5 * 3 * 3)
    # teacher and three controls beside the students, for two media
    assert found["evaluate"] == 5 * 3 + 2 * 4
    assert found["synthesize"] == 4
    assert found["precision"] == 2  # of the teacher and of rCM, images
    assert found["throughput"] == 1 + 3  # of clips: teacher and rCM


def test_one_target_needs_its_own_jobs_only(snakemake: Run) -> None:
    found = jobs(snakemake("-n", "table2", "pretrain", "--config", "clips=all", "seeds=[0, 1]"))
    assert found["distill"] == 4 * 2
    assert found["pretrain_teacher"] == 2
    assert not {"table1", "report", "figure_samples"} & set(found)


REAL = {"transformer", "codec", "text", "tokenizer", "prompts_train"}  # downloads of every real scale
LOOKING = {"clip_large", "dinov2", "vgg"}  # of every scorer, for diversity
IMAGES = {"detector"}
CLIPS = {"prompts_report", "prompts_names", "prompts_info", "dino", "clip_base", "aesthetic"}
SCALES = {  # scale: students, further downloads
    "wan2.1-1.3b": (2, {"synthesizer", *CLIPS}),
    "wan2.1-14b": (1, CLIPS),
    "wan2.1-1.3b-reference": (1, {"synthesizer", *CLIPS}),
    "wan2.1-14b-reference": (1, CLIPS),
    "cosmos-predict2-0.6b": (2, IMAGES),
    "cosmos-predict2-2b": (2, IMAGES),
    "cosmos-predict2-14b": (1, IMAGES),
}


QUICK = ("wan2.1-1.3b",)


@pytest.mark.parametrize("scale", [pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in SCALES])
def test_the_scales_of_the_paper(snakemake: Run, scale: str) -> None:
    students, downloads = SCALES[scale]
    found = jobs(snakemake("-n", "--config", f"scale={scale}"))
    downloads = REAL | LOOKING | downloads
    assert {name for name in found if name.startswith("download_")} == {f"download_{name}" for name in downloads}
    assert found.get("convert_synthesizer", 0) == ("synthesizer" in downloads)
    assert (found["distill"], found["export"], found["synthesize"]) == (students, students, 4000)
    assert found["sample_student"] == students * 3 * found["sample_teacher"]  # one, two and four steps
    assert found["embed"] == 100 + 3  # of training, of the two suites that are sampled, and of the previews
    scored, clips = 1 + 3 * students, scale.startswith("wan")
    assert found["evaluate"] == scored
    assert found["measure"] == found["sample_student"] + found["sample_teacher"]
    if clips:
        assert (found["arrange_official"], found["vbench_official"], found["throughput"]) == (scored,) * 3
    assert {"table2" if clips else "table1", "figure_steps"} <= set(found) and "table_text" not in found


TARGETS: dict[str, tuple[str, dict[str, int]]] = {  # scale, number of jobs of some rules
    "table1": ("cosmos-predict2-2b", {"measure": 7 * (8 + 2), "evaluate": 7, "distill": 2}),
    "table2": ("wan2.1-1.3b", {"vbench_official": 7, "evaluate": 7, "throughput": 7, "distill": 2}),
    "table_text": ("cosmos-predict2-2b", {"measure": 7, "evaluate_text": 7, "sample_student": 6}),
    # five weights of DMD at four steps, then four ways of rollouts at three numbers of steps; and the teacher
    "figure_lambda": ("cosmos-predict2-2b", {"distill": 5, "export": 5, "evaluate": 5 + 1}),
    "figure_rollout": ("cosmos-predict2-2b", {"distill": 4, "evaluate": 4 * 3 + 1}),
}
FEW = "scatter={synthesize: 2, embed: 2}"


@pytest.mark.parametrize("target", [pytest.param(t, marks=[] if t == "table1" else pytest.mark.slow) for t in TARGETS])
def test_each_table_is_one_target(snakemake: Run, target: str) -> None:
    scale, wanted = TARGETS[target]
    found = jobs(snakemake("-n", target, "--config", f"scale={scale}", FEW))
    assert {rule: found.get(rule) for rule in wanted} == wanted
    assert found[target] == 1 and "report" not in found


@pytest.mark.slow
def test_the_official_evaluator_of_images(snakemake: Run) -> None:
    run = snakemake(
        *("-n", "-p", "table1", "--config", "scale=cosmos-predict2-2b", FEW),
        "overrides=[evaluation.scorer=geneval-mmdet]",
    )
    found = jobs(run)
    assert (found["arrange_official"], found["geneval_official"], found["known_photographs"]) == (7, 7, 1)
    assert found["measure"] == 7 * 2  # diversity alone
    assert "download_detector" not in found
    said = run.stdout + run.stderr
    assert '"$CONDA_PREFIX/bin/python" workflow/scripts/geneval_official.py' in said
    assert "call snakemake with --sdm conda" in said


def test_ablations_of_the_tiny_world(snakemake: Run) -> None:
    found = jobs(snakemake("-n", "figure_lambda", "figure_rollout", "table3"))
    # rCM and sCM, four other weights, fixed rollouts, DMD with fixed and with random ones
    assert (found["distill"], found["table3"]) == (1 + 1 + 3 + 1 + 2, 1)
    assert found["evaluate"] == 1 + 5 + 4 * 3 - 1  # rCM at four steps is in both


def test_a_scale_for_less(snakemake: Run) -> None:
    """Keys of the command line go before those of the scale, and those before the common ones."""
    found = jobs(
        snakemake("-n", "--config", "scale=cosmos-predict2-2b", "methods=[rcm]", "scatter={synthesize: 4, embed: 2}")
    )
    assert (found["distill"], found["synthesize"], found["embed"]) == (1, 4, 5)


def test_lint(snakemake: Run) -> None:
    run = snakemake("--lint")
    assert run.returncode == 0, run.stdout + run.stderr


MISTAKES: list[tuple[tuple[str, ...], str]] = [  # --config, and what is said
    (("foo=1",), r"configuration key 'foo' \(given: 1\) is unknown; allowed: scale, methods"),
    (
        ("scale=cosmos",),
        r"configuration key 'scale' is \"cosmos\"; allowed: the scales .*cosmos-predict2-0.6b, .*tiny",
    ),
    (("overrides=[teacher.step=3]",), r"'teacher.step' .* did you mean 'teacher.steps'"),
    (("steps=[5, 8]",), r"configuration key 'steps' contains 5; .*up to 4 steps for images, .*mid_times .*and 8"),
    (
        ("scale=cosmos-predict2-2b", "tables=[table2]"),
        r"'tables' contains \"table2\", which is made of clips; .*images only",
    ),
    (
        ("scale=cosmos-predict2-2b", "controls=[oracle, shuffled]"),
        r"'controls' is \[\"oracle\", \"shuffled\"\]; .*cosmos-predict2-2b: \[\], for its prompts have no ground",
    ),
    (("tables=[table1, table_text]",), r"'tables' contains \"table_text\"; .*the tiny world has no letters"),
    (
        ("scale=wan2.1-1.3b", "overrides=[evaluation.scorer=geneval-mmdet]"),
        r"'evaluation.scorer' is \"geneval-mmdet\"; allowed: vbench or vbench-long or vbench-native, for",
    ),
    (
        ("scale=wan2.1-1.3b", "overrides=[evaluation.scorer=vbench-native]"),
        r"'figures' contains \"figure_steps\"; allowed with evaluation.scorer vbench-native, which has no total",
    ),
    (("scale=wan2.1-14b", "overrides=[frames=80]"), r"'frames' is 80; allowed: .*1 \+ a multiple of codec.stride"),
    (("overrides=[distillation.student_updates=50]",), r"'distillation.scm_only' is 200; .*student_updates \(50\)"),
    (('overrides=["sampler.mid_times=[1.3]"]', "steps=[1]"), r"'objective.rollout_times' is \[1.3\]"),
    (("nproc=0",), r"'nproc' is 0; allowed: an integer of at least 1"),
    (("nproc=3", "overrides=[parallel.context=2]"), r"'nproc' is 3; .*parallel, 1 x whatever remains x 2"),
    (("nproc=2", "overrides=[parallel.shard=1]"), r"'nproc' is 2; .*parallel, 1 x 1 x 1"),
    (
        ("methods=[dmd2]", 'overrides=["distillation.discriminator.layers=[9]"]', "clips=all"),
        r"discriminator.layers'",
    ),
    (("controls=[oracle]",), r"'controls' is \[\"oracle\"\]; .*missing: shuffled"),
]


@pytest.mark.parametrize(
    ("words", "message"),
    [pytest.param(*case, marks=[] if number < 7 else pytest.mark.slow) for number, case in enumerate(MISTAKES)],
)
def test_a_mistake_is_one_sentence(snakemake: Run, words: tuple[str, ...], message: str) -> None:
    run = snakemake("-n", "--config", *words)
    output = run.stdout + run.stderr
    assert run.returncode == 1
    assert re.search(message, output), output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "scale", "message"),
    [
        ("table1", "wan2.1-1.3b", "the target table1 is made of images; the scale wan2.1-1.3b has clips only"),
        ("table_text", "tiny", "there is no target table_text at the scale tiny"),
    ],
)
def test_a_target_that_a_scale_lacks(snakemake: Run, target: str, scale: str, message: str) -> None:
    run = snakemake("-n", target, "--config", f"scale={scale}")
    output = run.stdout + run.stderr
    assert run.returncode == 1 and message in output, output
    assert "Traceback" not in output


@pytest.fixture(scope="module")
def trained(snakemake: Run, copy: Path) -> str:
    """One file of a student that Snakemake takes for trained."""
    clips, student = copy / "data/tiny/clips", copy / "data/tiny/clips/rcm-0"
    for folder in (clips / "teacher", student / "dcp", student / "raw", student / "previews"):
        folder.mkdir(parents=True)
        (folder / "content").touch()
    shards = [f"shards/{k}-of-2.tar{suffix}" for k in (1, 2) for suffix in ("", ".json")]
    for name in ("checkpoints/transformer.pth", "../checkpoints/codec.pth", "prompts/train.jsonl", *shards):
        (clips / name).parent.mkdir(parents=True, exist_ok=True)
        (clips / name).touch()
    target = student / "metrics.jsonl"
    target.touch()
    name = target.relative_to(copy).as_posix()
    run = snakemake("--touch", "-c1", name)
    assert run.returncode == 0, run.stdout + run.stderr
    return name


def test_more_processes_train_nothing_again(snakemake: Run, trained: str) -> None:
    free = 'overrides=[parallel.recompute=blocks, parallel.micro_batch=8, "distillation.profile=[1, 2]"]'
    run = snakemake("-n", "-c2", trained, "--config", "nproc=2", free)
    assert "Nothing to be done" in run.stdout + run.stderr, run.stdout + run.stderr
    found = jobs(snakemake("-n", "-c2", trained, "--config", "nproc=2", "overrides=[parallel.precision=bfloat16]"))
    assert found["distill"] == 1


def test_processes_are_started_by_the_launcher(snakemake: Run, trained: str) -> None:
    def command(*words: str) -> str:
        run = snakemake("-n", "-p", trained, "-R", "distill", *words)
        return next(
            line for line in (run.stdout + run.stderr).splitlines() if " distill " in line and "--teacher" in line
        )

    assert "python -m rcm distill experiment=tiny-clips objective=rcm seed=0" in command("-c2")
    several = "OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python -m rcm.launch --standalone --nproc-per-node 2 -m rcm distill "
    assert several in command("-c2", "--config", "nproc=2")
    single = command("-c1", "--config", "overrides=[parallel.precision=bfloat16]")
    assert "python -m rcm.launch --standalone --nproc-per-node 1 -m rcm distill " in single
    assert "python -m rcm distill " in command("-c1", "--config", "nproc=2")  # never more than cores are given


def test_a_job_runs_again_when_its_numbers_or_its_code_change(snakemake: Run, copy: Path) -> None:
    made = ["data/tiny/images/prompts/report.jsonl", "data/tiny/images/prompts/train.jsonl"]
    run = snakemake("-c1", *made)
    assert run.returncode == 0, run.stdout + run.stderr

    def again(*words: str) -> str:
        run = snakemake("-n", *made, *words)
        assert run.returncode == 0, run.stdout + run.stderr
        output = run.stdout + run.stderr
        return " ".join(sorted(set(re.findall(r"Prepare the prompts `(\w+)`", output)))) or (
            "nothing" if "Nothing to be done" in output else output
        )

    # only what a stage reads counts, and only for the job that reads it
    assert again("--config", "overrides=[teacher.steps=3, suites.report.samples=2]") == "report"
    assert again("--config", "overrides=[distillation.batch=8, text.width=32]") == "nothing"

    used, unused = copy / "src/rcm/data/prompts.py", copy / "src/rcm/codecs/cells.py"
    text = used.read_text(encoding="utf-8")
    used.write_text(text.replace('"""Captions', '"""Other words\n\nCaptions', 1) + "\n# a comment\n", encoding="utf-8")
    unused.write_text(unused.read_text(encoding="utf-8") + "\nEXTRA = 1\n", encoding="utf-8")
    assert again() == "nothing"
    used.write_text(text.replace('"zero", "one"', '"none", "one"', 1), encoding="utf-8")
    assert again() == "report train"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("scale", "media"), [("mini-wan", "clips"), ("mini-cosmos", "images")])
def test_a_scale_of_real_models_in_miniature(
    snakemake: Run, copy: Path, tmp_path: Path, scale: str, media: str
) -> None:
    """Downloads, conversions, encoded prompts, shards, a student, its samples, their scores: all jobs, run for real."""
    config = write_mini_scale(tmp_path)
    write_evaluators(config.parent / "published")
    shutil.copytree(config, copy / "config", dirs_exist_ok=True)
    run = snakemake("-c2", "--config", f"scale={scale}")
    assert run.returncode == 0, run.stdout + run.stderr
    made, results = copy / "data" / scale / media, copy / "results" / scale
    assert {path.name for path in (made / "rcm-0").iterdir()} >= {"dcp", "raw", "student.safetensors", "student.pth"}
    family = "vbench_native" if media == "clips" else "geneval"
    for model in ("teacher-2", "rcm-0-1"):
        assert len(list((made / "samples" / model / "report").glob("*/*/samples/*"))) == (3 if media == "clips" else 6)
        score = json.loads((results / media / "scores" / f"{model}.json").read_text())
        assert {key.partition(".")[0] for key in score["metrics"]} == {family, "diversity"}
        assert score["evaluator"]["sampling"]["sigma_max"] > 0
        letters = json.loads((results / media / "text" / f"{model}.json").read_text())
        assert letters["metrics"]["text.cer"]["value"] >= 0
    tables = {path.stem for path in (results / "tables").glob("*.md")}
    assert tables == ({"table2", "table_text"} if media == "clips" else {"table1", "table3", "table_text"})
    assert (results / "report.html").stat().st_size > 10_000
    again = snakemake("-n", "--config", f"scale={scale}")
    assert "Nothing to be done" in again.stdout + again.stderr
