"""`snakemake --profile slurm` on a real Slurm of two emulated nodes: what goes well, and what does not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from rcm.checkpoints import load_dcp
from rcm.launch import Place

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "workflow/profiles/slurm"
LIMIT = 400  # seconds that one wait may take
BIN = str(Path(sys.executable).parent)

NAMESPACES = "unshare", "--mount", "--net", "--pid", "--fork"
LACKING = [name for name in ("slurmctld", "slurmd", "munged", "nsenter", "setpriv", "ip") if not shutil.which(name)]
if os.geteuid() != 0:
    LACKING = ["root"]
elif not LACKING and subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
    LACKING = ["the right to make namespaces"]
pytestmark = pytest.mark.timeout(1200)  # a chain that is set up is the first test's
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
        command = ["setpriv", "--pdeathsig", "KILL", *NAMESPACES, "--kill-child", "--mount-proc"]
        self.unshare = subprocess.Popen(
            [*command, "bash", str(ROOT / "tests/slurm/start.sh"), str(folder)],
            stdout=(folder / "start.log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            until(lambda: (folder / "ready").exists() or self.unshare.poll() is not None, "start", 60)
            assert self.unshare.poll() is None, (folder / "start.log").read_text()
        except AssertionError:
            self.stop()
            raise
        (first,) = Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").read_text().split()
        self.inside = ["nsenter", "--target", first, "--mount", "--net", "--pid"]

    def __call__(self, *words: object, **options: object) -> str:
        """What a command on the cluster says."""
        command = [*self.inside, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, (words, done.stdout + done.stderr)
        return str(done.stdout)

    def jobs(self, states: str = "PENDING,RUNNING,COMPLETING") -> dict[str, str]:
        """Jobs and their states."""
        return dict(line.split() for line in self("squeue", "-h", "-t", states, "-o", "%A %T").splitlines())

    def distillation(self, besides: str = "") -> str:
        """The job of a distillation that runs, another one than `besides`."""
        found: list[str] = []

        def running() -> list[str]:
            lines = map(str.split, self("squeue", "-h", "-t", "RUNNING", "-o", "%A %k").splitlines())
            found[:] = [job for job, rule, *_ in lines if rule.startswith("rule_distill") and job != besides]
            return found

        until(running, "a distillation's job")
        return found[0]

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
    "distillation.student_updates": 40,
    "distillation.scm_only": 5,
    "distillation.critic_warmup": 2,
    "distillation.batch": 8,
    "distillation.preview_every": 0,
    "distillation.state_every": 1000,  # a state is there only if a signal had it saved
}


def configured(**changes: int) -> tuple[str, ...]:
    """The pipeline to run, small enough; `changes` of the distillation."""
    numbers = {**TINY, **{f"distillation.{key}": value for key, value in changes.items()}}
    return (
        *("methods=[rcm]", "steps=[1]", "controls=[oracle, shuffled]", "scatter={synthesize: 1, report: 1}"),
        f"overrides=[{','.join(f'{key}={value}' for key, value in numbers.items())}]",
    )


CONFIG = configured()


class Run:
    """A Snakemake with the profile that runs in the background."""

    def __init__(self, cluster: Cluster, project: Path, *words: str, config: tuple[str, ...] = CONFIG):
        self.cluster, self.log = cluster, project / f"run{len(list(project.glob('run*')))}.log"
        pid = project / "pid"
        pid.unlink(missing_ok=True)
        path = os.pathsep.join([str(project / "src"), str(project / "kernels")])
        quick = ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "10"]
        command = [sys.executable, str(ROOT / "tests/slurm/promptly.py"), "--profile", "slurm", *quick, *words]
        there = ["sh", "-c", 'cd "$0" && echo $$ > pid && exec "$@"', str(project)]
        self.process = subprocess.Popen(
            [*cluster.inside, *there, *command, "--config", *config],
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


# besides those of the profile, so that fewer jobs start
GROUPS = ("sample_control=controls", "sample_teacher=teachers", "sample_student=students")
TARGETS = "table1", "results/tiny/images/throughput/rcm-0-1.json"
DCP = "data/tiny/images/rcm-0/dcp"
LOG = "logs/tiny/images/distill/rcm-0.log"


def alone(project: Path, *words: str) -> str:
    """What Snakemake says that runs here, on one machine without Slurm."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words], cwd=project, capture_output=True, text=True, timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": f"{project / 'src'}:{project / 'kernels'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Chain(NamedTuple):
    """The chain to table 1 as it ran, its distillation warned, requeued and on a node that was lost.

    The student that it made is the folder `cluster` of the project.
    """

    project: Path
    said: str
    warned: str  # the Slurm log of the attempt that was warned
    saved: bool  # a state was there when that attempt had ended
    elsewhere: bool  # after the loss of its node it ran on the other one
    again: str  # what a dry run says of it


@pytest.fixture(scope="module")
def chain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    project = tmp_path_factory.mktemp("project")
    for name in ("Snakefile", "workflow", "config", "src", "kernels", "assets", "slurm"):
        source = ROOT / name
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, project / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, project / name, follow_symlinks=False)
    groups = yaml.safe_load((PROFILE / "profile.v9+.yaml").read_text())["groups"]
    sizes = {f"{group.rpartition('=')[2]}=8" for group in (*groups, *GROUPS)}
    run = Run(cluster, project, *TARGETS, "--groups", *groups, *GROUPS, "--group-components", *sorted(sizes))
    try:
        under_way(project)
        job = cluster.distillation()
        cluster("scancel", "--signal=USR1", job)  # to whom Slurm sends its own warning
        until(lambda: job in cluster.jobs("FAILED"), "the job's own end")
        saved = bool(states(project))
        (log,) = project.glob(f".snakemake/slurm_logs/rule_distill/*/{job}.log")
        job = cluster.distillation(besides=job)

        done = under_way(project, under_way(project))
        cluster("scontrol", "requeue", job)
        until(lambda: job not in cluster.jobs("RUNNING"), "a requeue")
        under_way(project, done)

        node = cluster("squeue", "-h", "-j", job, "-o", "%N").strip()
        inside = f"grep -lzx SLURM_JOB_ID={job} /proc/[0-9]*/environ | cut -d/ -f3"
        daemons = [*cluster.processes(rf"slurmd -c -N {node}"), *cluster.processes(rf"slurmstepd: \[{job}\.")]
        cluster("kill", "-KILL", *daemons, *cluster("sh", "-c", inside).split())  # as when the power fails
        until(lambda: job not in cluster.jobs("RUNNING"), "the loss of a node")
        assert cluster.distillation() == job
        elsewhere = cluster("squeue", "-h", "-j", job, "-o", "%N").strip() != node
        cluster("slurmd", "-c", "-N", node)
        status, said = run.end()
    except AssertionError:
        print(run.log.read_text())
        raise
    assert status == 0, said
    again = alone(project, "-n", "-c1", *TARGETS, "--config", *CONFIG)
    (project / DCP).rename(project / "cluster")
    return Chain(project, said, log.read_text(), saved, elsewhere, again)


@pytest.fixture(scope="module")
def undisturbed(chain: Chain) -> dict[str, torch.Tensor]:
    """The student of the same configuration, distilled here in one go."""
    anew(chain.project)
    alone(chain.project, "-c1", DCP, "--config", *CONFIG)
    return load_dcp(chain.project / DCP)


def anew(project: Path) -> None:
    """Forget the distillation."""
    for folder in ("data", "resume"):
        shutil.rmtree(project / folder / "tiny/images/rcm-0", ignore_errors=True)


def under_way(project: Path, beyond: int = 0) -> int:
    """Wait for some iterations; returns how many there are."""
    metrics = project / "resume/tiny/images/rcm-0/metrics.jsonl"

    def count() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    until(lambda: count() > beyond + 3, "a distillation")
    return count()


def states(project: Path) -> list[Path]:
    """Saved states of a distillation that has not ended."""
    return list((project / "resume/tiny/images/rcm-0").glob("0*"))


def assert_equal(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
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
def test_the_whole_chain(chain: Chain) -> None:
    assert (chain.project / "results/tiny/tables/table1.md").read_text().startswith("# Table 1")
    assert "Nothing to be done" in chain.again


@needs_slurm
@pytest.mark.slow
def test_a_warning_a_requeue_and_a_lost_node(chain: Chain, undisturbed: dict[str, torch.Tensor]) -> None:
    assert chain.saved and chain.elsewhere
    assert "User defined signal" not in chain.warned  # the warning ends none of the processes around the distillation
    assert chain.said.count("Trying to restart job") == 1  # the rest was Slurm's to repeat
    assert_equal(undisturbed, load_dcp(chain.project / "cluster"))


@needs_slurm
@pytest.mark.slow
def test_failures_are_named_and_the_rest_goes_on(cluster: Cluster, chain: Chain) -> None:
    project = chain.project
    anew(project)
    shipped = project / "assets/tiny/clips.pth"
    whole = shipped.read_bytes()
    shipped.write_bytes(b"other bytes")
    good, bad = "data/tiny/clips/samples/oracle-0/report/1-of-1", "data/tiny/clips/teacher"
    wishes = ("table3:mem_mb=99999999", "throughput:slurm_partition=nowhere", "distill:slurm_extra='--mincpus=1'")
    refused = ("results/tiny/tables/table3.csv", "results/tiny/images/throughput/teacher-2.json")
    options = ("--retries", "0", "--groups", "prompts=prompts", "--set-resources", *wishes)
    try:
        run = Run(cluster, project, good, bad, *refused, DCP, *options, config=configured(student_updates=1000))
        under_way(project)
        cluster("scontrol", "update", f"JobId={cluster.distillation()}", "EndTime=now+1second")
        status, said = run.end()
    finally:
        shipped.write_bytes(whole)
    assert status == 1
    assert (project / good).exists()  # two jobs, the second of them submitted long after the refusals
    assert not any((project / name).exists() for name in (bad, *refused, DCP))
    log = "logs/tiny/download/clips-transformer.log"
    assert log in said and "SHA-256" in (project / log).read_text()
    assert re.search(r"sbatch failed.*(Memory specification|node configuration)", said), said
    assert re.search(r"sbatch failed.*invalid partition", said), said
    assert re.search(r"SLURM status is: 'TIMEOUT'", said), said
    assert states(project) and "interrupted" in (project / LOG).read_text()  # within KillWait
    assert cluster.jobs() == {}


@needs_slurm
@pytest.mark.slow
def test_ctrl_c_cancels_and_after_kill_9_the_orphan_does(
    cluster: Cluster, chain: Chain, undisturbed: dict[str, torch.Tensor]
) -> None:
    project = chain.project
    anew(project)
    run = Run(cluster, project, DCP)
    under_way(project)
    run.signal("INT")
    assert run.end()[0] != 0
    until(lambda: not cluster.jobs(), "scancel", 40)
    until(lambda: not cluster.processes("rcm distill"), "the end of the processes", 40)
    assert states(project)

    run = Run(cluster, project, DCP)
    under_way(project, under_way(project))
    run.signal("KILL")
    run.process.wait()
    job = cluster.distillation()
    status, said = Run(cluster, project, DCP).end()
    assert status != 0 and "--unlock" in said
    cluster("scancel", job)
    until(lambda: not cluster.jobs(), "scancel", 40)
    assert Run(cluster, project, "--unlock").end()[0] == 0
    status, said = Run(cluster, project, DCP).end()
    assert status == 0, said
    assert_equal(undisturbed, load_dcp(project / DCP))


@needs_slurm
@pytest.mark.slow
def test_a_time_limit_on_two_machines(cluster: Cluster, chain: Chain) -> None:
    project = chain.project
    anew(project)
    site = ("--default-resources", "slurm_partition=cpu", "gpus_per_node=2")
    config = (*CONFIG, "nproc=4")
    run = Run(cluster, project, DCP, *site, config=config)
    under_way(project)
    job = cluster.distillation()
    assert cluster("squeue", "-h", "-j", job, "-o", "%D").strip() == "2"
    cluster("scontrol", "update", f"JobId={job}", "TimeLimit=15")  # no more left than the profile wants announced
    until(lambda: job in cluster.jobs("FAILED"), "the job's own end")
    saved = states(project)
    status, said = run.end()
    assert status == 0, said
    assert saved and said.count("Trying to restart job") == 1
    two = load_dcp(project / DCP)
    facts = json.loads((project / f"{DCP}.run.json").read_text())["facts"]
    assert facts["parallel"]["shard"] == 4

    anew(project)
    alone(project, "-c4", DCP, "--config", *config)
    assert_equal(load_dcp(project / DCP), two)


@needs_slurm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "victim", "told"),
    [
        (2, "os.getpid()", "rank 2 failed first: it was killed by SIGKILL"),
        (0, "os.getppid()", "the launcher of the first machine, .*, is gone"),
    ],
)
def test_machines_end_together_with_the_first_cause(
    cluster: Cluster, tmp_path: Path, rank: int, victim: str, told: str
) -> None:
    """A rank of the second machine is killed, or the launcher of the first, where all of them meet."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, torch, torch.distributed as dist\n"
        "from rcm.training.signals import end_with_launcher\n"
        "end_with_launcher()\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        f"if dist.get_rank() == {rank}: os.kill({victim}, signal.SIGKILL)\n"
        "dist.barrier()\n"
    )
    step = ("srun", "-N2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0")
    launch = (sys.executable, "-m", "rcm.launch", "--nproc-per-node", "2", program)
    done = subprocess.run(
        [*cluster.inside, *step, *map(str, launch)], capture_output=True, text=True, timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGKILL
    assert len(re.findall(told, done.stderr)) == 1, done.stderr
    assert rank == 0 or (done.stderr.count("failed first"), done.stderr.count("Exited with exit code 137")) == (1, 2)
    assert cluster.processes(str(program)) == []
