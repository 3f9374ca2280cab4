"""`rcm why` on made-up projects with real records, and on stages that ran: what is said, and what is found broken."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcm.artefact import beside, read_json, recording, sha256_file, write_json, write_text
from rcm.cli import main
from rcm.cli import why as module
from rcm.cli.why import told_run

ROOT = Path(__file__).parents[2]
MODELS = ("rcm-0-4", "dmd-0-4", "scm-0-4", "dcm-0-4", "teacher-20", "oracle-0")
TABLE = "results/tables/table1.csv"


def make(out: str, stage: str, *inputs: str, text: str | None = None, **config: Any) -> None:
    """A stage that writes its name."""
    with recording(out, stage=stage, inputs=inputs, config=config, seed=3):
        write_text(out, text or f"{out} of {', '.join(inputs)}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From a checkpoint to a table, in miniature."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("rcm.usage.git_version", lambda: {"commit": "c0ffee" * 6, "dirty": False})
        patch.setattr("rcm.artefact.sync", lambda path: None)
        make_all()
    return root


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, as working directory."""
    root = shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(root)
    return root


def make_all() -> None:
    make("data/checkpoints/net.pth", "download", name="transformer", source="https://host/net.pth")
    source = {"source": "https://host/net.pth", "revision": "r1", "sha256": sha256_file("data/checkpoints/net.pth")}
    write_json("data/checkpoints/net.pth.download.json", source)
    make("data/prompts/report.jsonl", "prompts", suite="report")
    for part in ("1-of-3", "2-of-3", "3-of-3"):
        make(f"data/shards/{part}.tar", "synthesize", "data/checkpoints/net.pth", shard=part)
    shards = [f"data/shards/{k}-of-3.tar" for k in (1, 2, 3)]
    for model in MODELS[:4]:
        distillation: dict[str, Any] = {"distillation": {"batch": 48}, "objective": {"name": model[:3]}}
        make(f"data/{model[:-2]}/student.pth", "distill", "data/checkpoints/net.pth", *shards, **distillation)
    for model in MODELS:
        student = f"data/{model[:-2]}/student.pth" if model in MODELS[:4] else "data/checkpoints/net.pth"
        for part in ("1-of-2", "2-of-2"):
            make(f"data/samples/{model}/report/{part}", "sample", student, "data/prompts/report.jsonl", part=part)
        samples = [f"data/samples/{model}/report/{part}" for part in ("1-of-2", "2-of-2")]
        make(f"results/scores/{model}.json", "evaluate", *samples, "data/prompts/report.jsonl", scorer="shapes")
    write_text("config/published.csv", "of the paper")
    rows = "block,model,seed,steps,metric,value\nmodels,rcm,0,4,overall,0.857986\nmodels,dmd,0,4,overall,0.8\n"
    rows += "published,rcm,,4,overall,0.83\n"
    make(TABLE, "table", *(f"results/scores/{model}.json" for model in MODELS), "config/published.csv", text=rows)


@pytest.fixture
def why(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        status = main(["why", *words])
        return (status, *capsys.readouterr())

    return call


Why = Callable[..., tuple[int, str, str]]


def test_a_number_leads_to_its_checkpoint(project: Path, why: Why) -> None:
    status, out, error = why(TABLE, "--model", "rcm-0-4")
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "rcm-0-4 in table1.csv: overall 0.857986"  # not the paper's
    heads = [line.lstrip(" │├└─") for line in lines if "[" in line]
    assert heads == [
        f"{TABLE}  [table]",
        "results/scores/rcm-0-4.json  [evaluate]",
        "data/samples/rcm-0-4/report/*-of-2  [sample]",
        "data/rcm-0/student.pth  [distill]",
        "data/checkpoints/net.pth  [download]",
        "data/shards/*-of-3.tar  [synthesize]",
        "data/checkpoints/net.pth  [download]  (as above)",
        "data/prompts/report.jsonl  [prompts]",
        "data/prompts/report.jsonl  [prompts]  (as above)",
    ]
    digest = sha256_file("data/checkpoints/net.pth")
    assert "from https://host/net.pth, revision r1, SHA-256" in out and digest in out
    assert f"content {sha256_file('results/scores/rcm-0-4.json')[:8]}" in out
    assert "name rcm, batch 48" in out and "seed 3" in out and "GPU-hours" in out and "commit " in out
    assert "In all: 10 artefacts by" in out and "as it is here" in out
    assert max(map(len, lines)) <= 120


def test_a_whole_table_names_its_rows(project: Path, why: Why, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # the project is found from the file
    status, out, _ = why(str(project / TABLE))
    assert status == 0 and all(f"results/scores/{model}.json" in out for model in MODELS)
    assert "config/published.csv" in out and "--model" in out and "[distill]" not in out
    # one download, one suite, three shards, four students, two parts and a score of each of six, a table
    assert "In all: 28 artefacts by" in out


def test_a_model_that_is_not_there(project: Path, why: Why) -> None:
    status, _, error = why(TABLE, "--model", "rcm-1-4")
    assert status == 2 and "expected one of dcm-0-4, dmd-0-4" in error
    assert why("results/none.csv")[0] == 2 and "does not exist" in why("results/none.csv")[2]
    assert "no record of how it was made" in why("config/published.csv")[2]


@pytest.mark.parametrize("model", ["rcm-0-4", None])
def test_what_changed_is_named(project: Path, why: Why, model: str | None) -> None:
    words = (TABLE, "--model", model) if model else (TABLE,)
    shard = Path("data/shards/2-of-3.tar")
    before = shard.read_text()
    shard.write_text("other")
    status, out, error = why(*words)
    assert status == 2 and "data/shards/2-of-3.tar has changed since" in error and error.count("\n") == 1
    assert "Every input" not in out
    make(str(shard), "synthesize", "data/checkpoints/net.pth", text="again")  # the student is of the old one
    assert "data/shards/2-of-3.tar was made again since" in why(*words)[2]
    make(str(shard), "synthesize", "data/checkpoints/net.pth", text=before)
    assert why(*words)[0] == 0
    write_text("config/published.csv", "of another paper")
    assert why(*words)[0] == (0 if model else 2)


def test_what_is_gone_is_said(project: Path, why: Why) -> None:
    Path("data/shards/2-of-3.tar").unlink()
    status, out, _ = why(TABLE, "--model", "rcm-0-4")
    assert status == 0 and "data/shards/2-of-3.tar: is gone; its record is there" in out
    assert why(TABLE, "--model", "rcm-0-4", "--check")[0] == 2
    Path("data/shards/2-of-3.tar.prov.json").unlink()
    assert "data/shards/2-of-3.tar is gone, and so is its record" in why(TABLE)[2]


def test_big_files_are_hashed_when_asked(project: Path, why: Why, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 5)
    Path("data/shards/2-of-3.tar").write_text("other text")
    status, out, _ = why("data/rcm-0/student.pth")
    assert status == 0 and "is big: --check reads it" in out
    assert "has changed since" in why("data/rcm-0/student.pth", "--check")[2]


def test_after_a_pull_there_are_no_run_records(project: Path, why: Why) -> None:
    for path in project.rglob("*.run.json"):
        path.unlink()
    status, out, _ = why(TABLE, "--model", "rcm-0-4")
    assert status == 0 and "no .run.json: when and where it ran is not known here" in out
    assert "of 10 of them no .run.json tells the cost" in out


def test_records_that_lie(project: Path, why: Why, tmp_path: Path) -> None:
    """Damaged, of wrong types, too deep, in a circle, with paths elsewhere or codes for the terminal: a sentence."""
    record = Path("data/rcm-0/student.pth.prov.json")
    honest = record.read_text()
    said = json.loads(honest)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    shard = said["inputs"][1]
    itself = {"path": said["artefact"], "sha256": said["sha256"]}
    wrong = {
        "": "not valid JSON",
        honest[:50]: "not valid JSON",
        "[" * 100_000: "not valid JSON",
        "[]": "is damaged",
        json.dumps({**said, "inputs": 3}): "is damaged",
        json.dumps({**said, "inputs": [{"path": 3}]}): "is damaged",
        json.dumps({**said, "config": {"distillation": {"batch": 49}}}): "is not the one of its hash",
        json.dumps({**said, "inputs": [{**shard, "path": "../secret"}]}): "is no path of a file of this project",
        json.dumps({**said, "inputs": [{**shard, "path": str(secret)}]}): "is no path of a file of this project",
        json.dumps({**said, "inputs": [{**shard, "path": "data/\x1b[2J"}]}): "is no path of a file of this project",
        json.dumps({**said, "inputs": [itself]}): "is said to be made from itself",
        json.dumps({**said, "sha256": "0" * 64}): "was made again since",
    }
    for text, expected in wrong.items():
        record.write_text(text)
        status, out, error = why(TABLE, "--model", "rcm-0-4")
        assert status == 2 and expected in error and error.count("\n") == 1, text[:80]
        assert "\x1b" not in out + error and "Traceback" not in error
    record.write_text(json.dumps({**said, "stage": "\x1b[2Jdistill"}))
    assert "\x1b" not in why(TABLE, "--model", "rcm-0-4")[1]
    record.write_text(honest)
    beside("data/rcm-0/student.pth", ".run.json").write_text("{")
    assert why(TABLE, "--model", "rcm-0-4")[0] == 0


def test_costs_are_told_once_a_job() -> None:
    run = {"stage": "distill", "started": "2025-01-02T03:04:05+00:00", "wall_seconds": 7200.0, "gpu_hours": 16.0}
    run |= {"peak_mib": 900.0, "attempts": 3, "git": {"commit": "c0ffee" * 6, "dirty": True}, "host": {"gpu": "H100"}}
    other = {**run, "wall_seconds": 3600.0, "attempts": 1, "gpu_hours": 8.0, "peak_mib": 1000.0, "slurm_job_id": "7"}
    said = "2025-01-02 03:04, 2.0 h in 3 attempts on H100, 900 MiB, 16 GPU-hours, commit c0ffeec0 + changes"
    assert told_run([run, dict(run)]) == said
    assert "2 jobs, 3.0 h" in told_run([run, other]) and "1,000 MiB, 24 GPU-hours" in told_run([run, other])


STAGES = (  # of the tiny world, small
    "prompts suite=report suites.report.per_task=1 suites.report.samples=1 --out data/prompts/report.jsonl",
    "download --name codec --out data/codec.pth",
    "download --name transformer --out data/transformer.pth",
    "convert --checkpoint data/transformer.pth --out data/teacher",
    "sample suite=report suites.report.samples=1 teacher.steps=2 --checkpoint data/teacher --codec data/codec.pth "
    "--prompts data/prompts/report.jsonl --steps 2 --part 1-of-1 --out data/samples/teacher-2/report/1-of-1",
    "evaluate --samples data/samples/teacher-2/report/1-of-1 --out results/scores/teacher-2.json "
    "--results results/scores/teacher-2.results.jsonl",
)


@pytest.mark.slow
def test_records_are_the_same_elsewhere_and_say_nothing_of_the_run(tmp_path: Path) -> None:
    """Two clones of one code: another folder, time, commit, number of threads, and changes beside the code."""
    for name in ("one", "two"):
        for part in ("src", "kernels", "config", "assets"):
            shutil.copytree(ROOT / part, tmp_path / name / part, ignore=shutil.ignore_patterns("__pycache__"))
        git = ["git", "-C", str(tmp_path / name), "-c", "user.name=A", "-c", "user.email=a@b"]
        (tmp_path / name / "README.md").write_text(name)
        (tmp_path / name / ".gitignore").write_text("__pycache__/\n")
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", name], check=True)
    (tmp_path / "two" / "README.md").write_text("changed")
    script = "\n".join(f"{sys.executable} -m rcm {stage} 2>&1" for stage in STAGES)
    running = []
    for name, threads in (("one", "1"), ("two", "2")):
        place = tmp_path / name
        env = {**os.environ, "PYTHONPATH": f"{place}/src:{place}/kernels", "OMP_NUM_THREADS": threads}
        running.append(subprocess.Popen(["bash", "-ec", script], cwd=place, env=env, stdout=subprocess.PIPE, text=True))
    for process in running:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    records = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.prov.json"))
    assert len(records) == 7
    for path in records:
        one, two = (tmp_path / name / path for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), path
        runs = [read_json(str(place).replace(".prov.json", ".run.json")) for place in (one, two)]
        # these stand in both, so that either can be read alone and one of another artefact is seen
        assert read_json(one).keys() & runs[0].keys() == {"artefact", "sha256", "stage"}
        assert [run["git"]["dirty"] for run in runs] == [False, True]
        assert runs[0]["git"]["commit"] != runs[1]["git"]["commit"]
        assert str(tmp_path) not in one.read_text()
        assert all(run["wall_seconds"] >= 0 and run["core_hours"] >= 0 == run["gpu_hours"] for run in runs)
        assert all("-m rcm" in run["command"] and run["versions"]["torch"] for run in runs)
    score = tmp_path / "one/results/scores/teacher-2.json"
    done = subprocess.run(
        [sys.executable, "-m", "rcm", "why", str(score)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for stage in ("evaluate", "sample", "convert", "download", "prompts"):
        assert f"[{stage}]" in done.stdout
    assert "from assets/tiny/images.pth, SHA-256" in done.stdout
