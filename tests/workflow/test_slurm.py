"""`snakemake --profile slurm` on a real Slurm of two emulated nodes: what goes well, and what does not."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from rcm.checkpoints import load_dcp
from rcm.launch import Place

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "workflow/profiles/slurm"
LIMIT = 400  # seconds that one wait may take
BIN = str(Path(sys.executable).parent)

LACKING = [name for name in ("slurmctld", "slurmd", "munged", "unshare", "nsenter") if not shutil.which(name)]
if os.geteuid() != 0:
    LACKING = ["root"]
elif not LACKING and subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
    LACKING = ["the right to make namespaces"]
needs_slurm = pytest.mark.skipif(bool(LACKING), reason=f"a Slurm for tests needs {', '.join(LACKING)}")


def until(true: Callable[[], object], what: str, limit: float = LIMIT) -> None:
    """Wait for what the cluster does."""
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end, f"{what}: not within {limit} s"
        time.sleep(0.2)


class Cluster:
    """Two emulated nodes in namespaces of their own, which take all their processes along when they end."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1] % 20000 + 30000
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.unshare = subprocess.Popen(
            [*command, "bash", str(ROOT / "tests/slurm/start.sh"), str(folder), str(port)],
            stdout=(folder / "start.log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        until(lambda: (folder / "ready").exists() or self.unshare.poll() is not None, "start", 30)
        assert self.unshare.poll() is None, (folder / "start.log").read_text()
        (first,) = Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").read_text().split()
        self.inside = ["nsenter", "--target", first, "--mount", "--pid"]

    def __call__(self, *words: object, **options: object) -> str:
        """What a command on the cluster says."""
        command = [*self.inside, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, (words, done.stdout + done.stderr)
        return str(done.stdout)

    def jobs(self, states: str = "PENDING,RUNNING,COMPLETING") -> dict[str, str]:
        """Jobs and their states."""
        return dict(line.split() for line in self("squeue", "-h", "-t", states, "-o", "%A %T").splitlines())

    def processes(self, pattern: str) -> list[int]:
        """Processes on the cluster whose command line has this in it, as it numbers them."""
        lines = self("ps", "-eo", "pid,args", "--no-headers").splitlines()
        return [int(line.split()[0]) for line in lines if re.search(pattern, line)]

    def stop(self) -> None:
        self.unshare.kill()
        self.unshare.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


TINY = {
    **{f"suites.{suite}.per_task": 1 for suite in ("report", "diversity", "dev")},
    **{f"suites.{suite}.samples": 2 for suite in ("report", "diversity")},
    "suites.train.prompts": 24,
    "teacher.steps": 2,
    "evaluation.oracle_at_least": 0,
    "evaluation.bootstrap": 10,
    "distillation.student_updates": 240,
    "distillation.scm_only": 5,
    "distillation.critic_warmup": 2,
    "distillation.batch": 8,
    "distillation.preview_every": 0,
    "distillation.state_every": 1000,  # a state is there only if a signal had it saved
}
CONFIG = [
    *("methods=[scm]", "steps=[1]", "clips=all", "controls=[oracle, shuffled]", "scatter={synthesize: 1, report: 1}"),
    f"overrides=[{','.join(f'{key}={value}' for key, value in TINY.items())}]",
]


class Run:
    """A Snakemake with the profile that runs in the background."""

    def __init__(self, cluster: Cluster, project: Path, *words: str, config: tuple[str, ...] = ()):
        self.cluster, self.log = cluster, project / f"run{len(list(project.glob('run*')))}.log"
        pid = project / "pid"
        pid.unlink(missing_ok=True)
        path = os.pathsep.join([str(project / "src"), str(project / "kernels")])
        quick = ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "10"]
        command = [sys.executable, str(ROOT / "tests/slurm/promptly.py"), "--profile", "slurm", *quick, *words]
        there = ["sh", "-c", 'cd "$0" && echo $$ > pid && exec "$@"', str(project)]
        self.process = subprocess.Popen(
            [*cluster.inside, *there, *command, "--config", *CONFIG, *config],
            stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"},
        )  # fmt: skip
        until(lambda: pid.exists() and pid.read_text(), "start", 20)
        self.pid = pid.read_text().strip()

    def signal(self, name: str) -> None:
        self.cluster("kill", f"-{name}", self.pid)

    def end(self, limit: float = LIMIT) -> tuple[int, str]:
        """Exit status, and what it said."""
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.signal("KILL")
            raise AssertionError(self.log.read_text()) from None
        return status, self.log.read_text()


DCP = "data/tiny/images/scm-{}/dcp"


@pytest.fixture(scope="module")
def project(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which the whole chain to table 1 has run on the cluster."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("Snakefile", "workflow", "config", "src", "kernels", "assets", "slurm"):
        source = ROOT / name
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, folder / name, follow_symlinks=False)
    status, said = Run(cluster, folder, "table1").end()
    assert status == 0, said
    shutil.copytree(folder / DCP.format(0), folder / "undisturbed")
    return folder


def distil(cluster: Cluster, project: Path, *words: str) -> Run:
    """Distil once more, until it is under way."""
    for folder in ("data", "resume"):
        shutil.rmtree(project / folder / "tiny/images/scm-0", ignore_errors=True)
    run = Run(cluster, project, DCP.format(0), *words)
    under_way(project)
    return run


def under_way(project: Path, beyond: int = 0) -> int:
    """Wait for an iteration; returns how many there are."""
    metrics = project / "resume/tiny/images/scm-0/metrics.jsonl"

    def count() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    until(lambda: count() > beyond + 20, "a distillation")
    return count()


def states(project: Path) -> list[Path]:
    """Saved states of a distillation that has not ended."""
    return list((project / "resume/tiny/images/scm-0").glob("0*"))


def assert_undisturbed(project: Path) -> None:
    """The same tensors, bit for bit, and every iteration once."""
    expected, found = load_dcp(project / "undisturbed"), load_dcp(project / DCP.format(0))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_every_key_of_the_profile_is_explained() -> None:
    profile = yaml.safe_load((PROFILE / "profile.v9+.yaml").read_text())
    keys = [*profile, *profile["default-resources"]]
    explained = (PROFILE / "README.md").read_text()
    assert [key for key in keys if f"`{key}`" not in explained] == []
    assert (ROOT / "slurm").resolve() == PROFILE


@needs_slurm
def test_launchers_of_two_machines_learn_their_place_from_slurm(cluster: Cluster) -> None:
    program = "import os; from rcm.launch import Place; print(*Place.of_slurm(os.environ))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"}
    said = cluster("srun", "-N2", "--ntasks-per-node=1", sys.executable, "-c", program, env=environment)
    places = sorted(Place(int(m), int(n), a, int(p)) for m, n, a, p in map(str.split, said.splitlines()))
    assert [(place.machine, place.machines, place.address) for place in places] == [
        (0, 2, "127.0.0.1"),
        (1, 2, "127.0.0.1"),
    ]
    assert places[0].port == places[1].port
    assert Place.of_slurm({}) is None


@needs_slurm
@pytest.mark.slow
def test_the_whole_chain(project: Path) -> None:
    assert (project / "results/tiny/tables/table1.md").read_text().startswith("# Table 1")
    again = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "-c1", "table1", "--config", *CONFIG], cwd=project,
        env={**os.environ, "PYTHONPATH": f"{project / 'src'}:{project / 'kernels'}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert "Nothing to be done" in again.stdout + again.stderr


@needs_slurm
@pytest.mark.slow
def test_a_warning_a_requeue_and_a_lost_node(cluster: Cluster, project: Path) -> None:
    run = distil(cluster, project)
    (job,) = cluster.jobs("RUNNING")
    cluster("scancel", "--signal=USR1", job)  # to whom Slurm sends its own warning
    until(lambda: job in cluster.jobs("FAILED"), "the job's own end")
    assert states(project)
    (log,) = project.glob(f".snakemake/slurm_logs/rule_distill/*/{job}.log")
    assert "User defined signal" not in log.read_text()  # the warning ends none of the processes around it
    until(lambda: {*cluster.jobs("RUNNING")} - {job}, "the next attempt")
    (job,) = cluster.jobs("RUNNING")

    done = under_way(project, under_way(project))
    cluster("scontrol", "requeue", job)
    until(lambda: job not in cluster.jobs("RUNNING"), "a requeue")
    under_way(project, done)

    node = cluster("squeue", "-h", "-j", job, "-o", "%N").strip()
    inside = f"grep -lzx SLURM_JOB_ID={job} /proc/[0-9]*/environ | cut -d/ -f3"
    daemons = [*cluster.processes(rf"slurmd -c -N {node}"), *cluster.processes(rf"slurmstepd: \[{job}\.")]
    cluster("kill", "-KILL", *daemons, *cluster("sh", "-c", inside).split())  # as when the power fails
    try:
        status, said = run.end()
    finally:
        cluster("slurmd", "-c", "-N", node)
    assert status == 0, said
    assert said.count("Trying to restart job") == 1  # the rest was Slurm's to repeat
    assert_undisturbed(project)


@needs_slurm
@pytest.mark.slow
def test_failures_are_named_and_the_rest_goes_on(cluster: Cluster, project: Path) -> None:
    shipped = project / "assets/tiny/clips.pth"
    whole = shipped.read_bytes()
    shipped.write_bytes(b"other bytes")
    good, bad = "data/tiny/clips/prompts/report.jsonl", "data/tiny/clips/teacher"
    wishes = ("table3:mem_mb=99999999", "figure_training:slurm_partition=nowhere")
    refused = ("results/tiny/tables/table3.csv", "results/tiny/figures/figure_training.png")
    try:
        run = Run(
            cluster,
            project,
            good,
            bad,
            *refused,
            "--retries",
            "0",
            "--groups",
            "prompts=prompts",
            "--set-resources",
            *wishes,
        )
        status, said = run.end()
    finally:
        shipped.write_bytes(whole)
    assert status == 1
    assert (project / good).exists()
    assert not any((project / name).exists() for name in (bad, *refused))
    log = "logs/tiny/download/clips-transformer.log"
    assert log in said and "SHA-256" in (project / log).read_text()
    assert re.search(r"sbatch failed.*(Memory specification|node configuration)", said), said
    assert re.search(r"sbatch failed.*invalid partition", said), said
    assert cluster.jobs() == {}


@needs_slurm
@pytest.mark.slow
def test_ctrl_c_cancels_and_after_kill_9_the_orphan_does(cluster: Cluster, project: Path) -> None:
    run = distil(cluster, project)
    run.signal("INT")
    assert run.end()[0] != 0
    until(lambda: not cluster.jobs(), "scancel", 40)
    until(lambda: not cluster.processes("rcm distill"), "the end of the processes", 40)
    assert states(project)

    run = Run(cluster, project, DCP.format(0))
    under_way(project, under_way(project))
    run.signal("KILL")
    run.process.wait()
    (job,) = cluster.jobs("RUNNING")
    status, said = Run(cluster, project, DCP.format(0)).end()
    assert status != 0 and "--unlock" in said
    cluster("scancel", job)
    until(lambda: not cluster.jobs(), "scancel", 40)
    assert Run(cluster, project, "--unlock").end()[0] == 0
    status, said = Run(cluster, project, DCP.format(0)).end()
    assert status == 0, said
    assert_undisturbed(project)


@needs_slurm
@pytest.mark.slow
def test_a_time_limit_on_two_machines(cluster: Cluster, project: Path) -> None:
    site = ("--default-resources", "slurm_partition=cpu", "gpus_per_node=2")
    for folder in ("data", "resume"):
        shutil.rmtree(project / folder / "tiny/images/scm-0", ignore_errors=True)
    run = Run(cluster, project, DCP.format(0), *site, config=("nproc=4",))
    under_way(project)
    (job,) = cluster.jobs("RUNNING")
    assert cluster("squeue", "-h", "-j", job, "-o", "%D").strip() == "2"
    cluster("scontrol", "update", f"JobId={job}", "TimeLimit=5")  # no more left than the profile wants announced
    until(lambda: job in cluster.jobs("FAILED"), "the job's own end")
    saved = states(project)
    status, said = run.end()
    assert status == 0, said
    assert saved and said.count("Trying to restart job") == 1
    two = load_dcp(project / DCP.format(0))
    facts = json.loads((project / f"{DCP.format(0)}.run.json").read_text())["facts"]
    assert facts["parallel"]["shard"] == 4

    shutil.rmtree(project / "data/tiny/images/scm-0")
    local = subprocess.run(
        [sys.executable, "-m", "snakemake", "-c4", DCP.format(0), "--config", *CONFIG, "nproc=4"], cwd=project,
        env={**os.environ, "PYTHONPATH": f"{project / 'src'}:{project / 'kernels'}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert local.returncode == 0, local.stdout + local.stderr
    one = load_dcp(project / DCP.format(0))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@needs_slurm
@pytest.mark.slow
def test_machines_end_together_with_the_first_cause(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        "if dist.get_rank() == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "dist.barrier()\n"
    )
    step = ("srun", "-N2", "--ntasks-per-node=1", "--kill-on-bad-exit=0")
    launch = (sys.executable, "-m", "rcm.launch", "--nproc-per-node", "2", program)
    done = subprocess.run(
        [*cluster.inside, *step, *map(str, launch)], capture_output=True, text=True, timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGKILL
    assert re.findall(r"rank \d failed first: it was killed by \w+", done.stderr) == [
        "rank 2 failed first: it was killed by SIGKILL"
    ]
    assert done.stderr.count("Exited with exit code 137") == 2
