"""`rcm record`, `rcm sync` and what a remote can do to them: real processes, and an S3 server on this machine."""

import hashlib
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

import boto3
import pytest
from moto.server import ThreadedMotoServer

from rcm.artefact import UserError, recording
from rcm.cli import record
from rcm.cli.record import verify
from rcm.cli.stages import Stage

ROOT = Path(__file__).parents[2]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
NEEDED = ("Snakefile", "workflow", "config", "src", "kernels", "assets", "constraints.txt", ".dvcignore", ".gitignore",
          "dvc.yaml", "params.json")  # fmt: skip
TARGETS = ("prompts-images-report", "convert-images")  # light, and one with an input that is made
FILES = ("data/tiny/images/prompts/report.jsonl", "data/tiny/images/teacher")
DRAWN = "data/tiny/images/samples/oracle-0/report/1-of-2"  # made of the first

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A file, parts made of it in a folder, and their records."""
    monkeypatch.chdir(tmp_path)
    source, parts = Path("data/source.txt"), Path("data/parts")
    parts.mkdir(parents=True)
    with recording(source, stage="prompts"):
        source.write_text("a")
    for name in ("1-of-2.txt", "2-of-2.txt"):
        with recording(parts / name, stage="sample", inputs=[source]):
            (parts / name).write_text(name)
    return [source, parts / "1-of-2.txt", parts / "2-of-2.txt"]


def parts(made: list[Path]) -> Stage:
    outputs = [str(path) for path in made[1:]]
    return Stage("tiny", "sample", {}, {}, outputs, ["1-of-2", "2-of-2"], False, {}, "", "", False, ["data/took.tsv"])


def test_what_is_verified(made: list[Path]) -> None:
    assert [*verify(made)] == [path.as_posix() for path in made]
    source, part, other = made
    part.write_text("1-of-2.tx_")
    with pytest.raises(UserError, match=r"data/parts/1-of-2.txt is damaged or was replaced"):
        verify(made)
    part.unlink()
    with pytest.raises(UserError, match=r"data/parts/1-of-2.txt is missing"):
        verify(made)
    part.write_text("1-of-2.txt")
    with recording(source, stage="prompts"):
        source.write_text("b")
    with pytest.raises(UserError, match=r"data/parts/1-of-2.txt was made of another data/source.txt than the one here"):
        verify(made)
    other.with_name("2-of-2.txt.prov.json").unlink()
    with pytest.raises(UserError, match=r"2-of-2.txt.prov.json: make it again with `snakemake data/parts/2-of-2.txt "):
        verify(made)


def test_no_other_stages_or_parts_are_recorded(made: list[Path]) -> None:
    stage = parts(made)
    with pytest.raises(UserError, match=r"dvc.yaml has no stage 'sampel'; allowed: sample$"):
        record._with_inputs({stage.name: stage}, ["sampel"])
    Path("data/parts/.gitignore").touch()
    assert [*record._strangers(stage)] == []
    with recording("data/parts/1-of-3.txt", stage="sample"):
        Path("data/parts/1-of-3.txt").write_text("old")
    old = [f"data/parts/1-of-3.txt{end}" for end in ("", ".prov.json", ".run.json")]
    assert [*record._strangers(stage)] == old


def test_a_conflict_in_what_was_recorded_is_told(made: list[Path]) -> None:
    Path("dvc.lock").write_text("schema: '2.0'\n<<<<<<< ours\nstages: {}\n=======\nstages: {}\n>>>>>>> theirs\n")
    with pytest.raises(UserError, match=r"dvc.lock is damaged, perhaps by a merge: take one side with `git checkout"):
        record._lock()


def test_only_what_was_made_of_the_very_content_stays_made(made: list[Path]) -> None:
    source, part, other = made
    made_of_another = other.with_name("2-of-2.txt.prov.json")
    made_of_another.write_text(made_of_another.read_text().replace(hashlib.sha256(b"a").hexdigest(), "0" * 64))
    took = Path("data/took.tsv")
    took.touch()
    for path in (*made, took):
        os.utime(path, (1, 1))
    record._keep([parts(made)], {source.as_posix(): hashlib.sha256(b"a").hexdigest()})
    assert part.stat().st_mtime == took.stat().st_mtime > 1 == other.stat().st_mtime


def test_the_files_of_a_dcp_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its identity is that of its tensors, which the manifest names; the bytes are compared too."""
    monkeypatch.chdir(tmp_path)
    with recording("dcp", stage="convert"):
        Path("dcp").mkdir()
        Path("dcp/0.distcp").write_bytes(b"abc")
        files = {"0.distcp": hashlib.sha256(b"abc").hexdigest()}
        Path("dcp/manifest.json").write_text(json.dumps({"content_sha256": "0" * 64, "files": files}))
    outputs = [Path("dcp")]
    verify(outputs)
    Path("dcp/0.distcp").write_bytes(b"abd")
    with pytest.raises(UserError, match=r"dcp/0.distcp is missing or damaged"):
        verify(outputs)


# --- A small pipeline, and an S3 server ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def direct() -> dict[str, str]:
    """The environment with the keys of the S3 server, and without a proxy before it."""
    return {name: value for name, value in os.environ.items() if name.lower() != "http_proxy"} | KEYS


def call(folder: Path) -> Run:
    """Call a module of Python in a folder, with the library of that folder where it has one."""
    path = os.pathsep.join(str(folder / name) for name in ("src", "kernels"))
    environment = {**direct(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])

    def run(module: str, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        command = ["git", *words] if module == "git" else [sys.executable, "-m", module, *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        if code is not None:
            assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def begin(folder: Path, endpoint: str | None, bucket: str) -> Run:
    """A git repository with DVC as this project configures it; the remote is S3, or that of the project."""
    (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)
    run = call(folder)
    run("git", "init", "-q")
    if endpoint is not None:
        client = boto3.client("s3", endpoint_url=endpoint, **{k.lower(): v for k, v in list(KEYS.items())[:2]},
                              region_name="us-east-1")  # fmt: skip
        client.create_bucket(Bucket=bucket)
        run("dvc", "remote", "add", "-d", "s3", f"s3://{bucket}/store")
        run("dvc", "remote", "modify", "s3", "endpointurl", endpoint)
        run("dvc", "remote", "modify", "s3", "verify", "true")
    return run


def commit(run: Run) -> None:
    run("git", "add", "-A")
    run("git", "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-q", "-m", "x")


@pytest.fixture
def small(tmp_path: Path, endpoint: str) -> tuple[Path, Run, str]:
    """A recorded pipeline of one stage: 40 files of 200 kB in a folder."""
    folder, bucket = tmp_path / "here", f"b{time.time_ns()}"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "parts").mkdir()
    for k in range(40):
        (folder / "data" / "parts" / str(k)).write_bytes(hashlib.sha256(bytes([k])).digest() * 6250)
    stage = {"cmd": "true", "outs": ["data/parts"]}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": {"parts": stage}}))
    run = begin(folder, endpoint, bucket)
    run("dvc", "commit", "--force", "--quiet")
    commit(run)
    return folder, run, bucket


def objects(endpoint: str, bucket: str) -> dict[str, int]:
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="test", aws_secret_access_key="test",
                          region_name="us-east-1")  # fmt: skip
    return {each["Key"]: each["Size"] for each in client.list_objects_v2(Bucket=bucket).get("Contents", [])}


def clone(folder: Path, to: Path) -> Run:
    subprocess.run(["git", "clone", "-q", folder, to], check=True)
    return call(to)


@pytest.mark.slow
def test_a_push_that_breaks_off(small: tuple[Path, Run, str], endpoint: str, tmp_path: Path) -> None:
    """Killed in the middle, then without a server: what was recorded is whole, and the next push completes."""
    folder, run, bucket = small
    cache = {path: path.read_bytes() for path in (folder / ".dvc/cache").rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "dvc", "push", "--jobs", "1"]
    killed = subprocess.Popen(command, cwd=folder, env=direct(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while killed.poll() is None and not objects(endpoint, bucket):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    there = objects(endpoint, bucket)
    assert 0 < len(there) < 41
    assert {*there.values()} == {200_000}  # no half object, and no list of a folder whose files are not all there
    run("dvc", "remote", "modify", "--local", "s3", "endpointurl", "http://127.0.0.1:9")
    run("dvc", "remote", "modify", "--local", "s3", "connect_timeout", "1")
    refused = run("dvc", "push", code=None)
    assert refused.returncode and "127.0.0.1:9" in refused.stderr and "Traceback" not in refused.stderr
    assert {path: path.read_bytes() for path in cache} == cache
    (folder / ".dvc/config.local").unlink()
    run("dvc", "push")
    assert len(objects(endpoint, bucket)) == 41
    other = clone(folder, tmp_path / "there")
    other("dvc", "pull")
    assert (tmp_path / "there/data/parts/7").read_bytes() == (folder / "data/parts/7").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["missing", "corrupted"])
def test_a_pull_of_what_the_remote_has_lost(
    small: tuple[Path, Run, str], endpoint: str, tmp_path: Path, fault: str
) -> None:
    """It fails, leaves nothing that looks whole, and succeeds when the object is there again."""
    folder, run, bucket = small
    run("dvc", "push")
    content = (folder / "data/parts/7").read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    key = next(key for key in objects(endpoint, bucket) if key.endswith(md5[2:]))
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="test", aws_secret_access_key="test",
                          region_name="us-east-1")  # fmt: skip
    if fault == "missing":
        client.delete_object(Bucket=bucket, Key=key)
    else:
        client.put_object(Bucket=bucket, Key=key, Body=b"!" + content[1:])
    there = tmp_path / "there"
    other = clone(folder, there)
    failed = other("dvc", "pull", code=None)
    assert failed.returncode and "Traceback" not in failed.stderr
    assert md5 in failed.stderr if fault == "missing" else "data/parts" in failed.stderr
    assert not (there / "data/parts/7").exists()
    assert not (there / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).exists()
    client.put_object(Bucket=bucket, Key=key, Body=content)
    other("dvc", "pull")
    assert (there / "data/parts/7").read_bytes() == content


# --- The workflow itself -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A repository in which Snakemake has made a table and a teacher, both recorded and pushed."""
    folder = tmp_path_factory.mktemp("remote") / "here"
    folder.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, folder / name, ignore=skipped, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder / name)
    run = begin(folder, None, "")
    early = run("rcm", "record", *TARGETS, code=2)
    assert re.search(r"has work to do at the scale tiny, .*convert.*: finish the run", early.stderr), early.stderr
    run("snakemake", "-c2", *FILES)
    file = folder / FILES[0]
    times, content = file.stat(), file.read_bytes()
    file.write_bytes(content.replace(b"a", b"e", 1))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    damaged = run("rcm", "record", *TARGETS, code=2)
    assert "report.jsonl is damaged or was replaced" in damaged.stderr and not (folder / "dvc.lock").exists()
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = run("rcm", "record", *TARGETS)
    assert re.search(r"recorded 4 stages in dvc.lock; next: git add dvc.lock", done.stdout)
    commit(run)
    run("dvc", "push", "--with-deps", *TARGETS)
    return folder, run


@pytest.mark.slow
def test_the_round_trip(recorded: tuple[Path, Run], tmp_path: Path) -> None:
    """A fresh clone takes what was recorded for made, in both tools, and makes one part of it again."""
    here, _ = recorded
    there = tmp_path / "there"
    run = clone(here, there)
    (tmp_path / "rcm-store").symlink_to(here.parent / "rcm-store")
    done = run("rcm", "sync", *TARGETS)
    assert "4 stages are here as recorded" in done.stdout
    nothing = run("snakemake", "-n", *FILES)
    assert "Nothing to be done" in nothing.stdout + nothing.stderr
    assert "missing provenance" not in nothing.stdout + nothing.stderr  # so that later changes are seen
    assert "up to date" in run("dvc", "repro", *TARGETS).stdout  # `configure` too, with what Python has compiled here

    run("snakemake", "-c2", DRAWN)
    for name in (FILES[0], f"{FILES[0]}.prov.json"):
        (there / name).unlink()
    run("rcm", "sync", TARGETS[0])
    nothing = run("snakemake", "-n", "--max-checksum-file-size", "0", "--", *FILES, DRAWN)  # as of big files
    assert "Nothing to be done" in nothing.stdout + nothing.stderr

    before = {path: path.read_bytes() for path in (there / FILES[1]).rglob("*") if path.is_file()}
    again = run("snakemake", "-c1", FILES[0], "-R", "prompts")
    assert "1 of 1 steps" in again.stdout + again.stderr
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.slow
def test_sync_refuses(recorded: tuple[Path, Run], tmp_path: Path) -> None:
    """What other code, other numbers or nobody recorded, and what the remote has lost."""
    here, _ = recorded
    there, store = tmp_path / "there", tmp_path / "rcm-store"
    run = clone(here, there)
    assert re.search(
        r"everything from \S+/rcm-store \(no such folder\), not data/tiny/images/prompts/report.jsonl: ",
        run("rcm", "sync", TARGETS[0], code=2).stderr,
    )
    shutil.copytree(here.parent / "rcm-store", store)
    assert "dvc.lock does not hold" in run("rcm", "sync", "table1", code=2).stderr

    code = there / "src/rcm/checkpoints/dcp.py"
    text = code.read_text(encoding="utf-8")
    code.write_text(text + "\nEXTRA = 1\n", encoding="utf-8")
    refused = run("rcm", "sync", *TARGETS, code=2).stderr
    assert re.search(r"the code or the packages here are not those of dvc.lock, for convert: ", refused), refused
    assert not (there / FILES[1]).exists()
    code.write_text(text, encoding="utf-8")

    lost = next(path for path in (here / FILES[1]).iterdir() if path.name.endswith(".distcp"))
    md5 = hashlib.md5(lost.read_bytes()).hexdigest()
    (store / "files/md5" / md5[:2] / md5[2:]).rename(tmp_path / "kept")
    refused = run("rcm", "sync", *TARGETS, code=2).stderr
    assert re.search(
        r"dvc pull did not bring everything from \S+/rcm-store, not .*data/tiny/images/teacher.*: failed to transfer",
        refused,
    ), refused
    assert not (there / FILES[1]).exists()
    (tmp_path / "kept").rename(store / "files/md5" / md5[:2] / md5[2:])
    locks = there / ".snakemake/locks"
    locks.mkdir(parents=True, exist_ok=True)
    (locks / "0.output.lock").touch()
    assert "Snakemake is at work here" in run("rcm", "sync", TARGETS[0], code=2).stderr
    (locks / "0.output.lock").unlink()
    run("rcm", "sync", *TARGETS)

    changed = there / "config/experiment/tiny-images.yaml"
    text = changed.read_text(encoding="utf-8")
    other = re.sub(r"(\n  report:.*?\n    seed: +)\d+", r"\g<1>999", text, count=1, flags=re.DOTALL)
    assert other != text
    changed.write_text(other, encoding="utf-8")
    assert "run `rcm stages`" in run("rcm", "sync", *TARGETS, code=2).stderr
    run("rcm", "stages")
    refused = run("rcm", "sync", *TARGETS, code=2).stderr
    assert re.search(r"dvc.lock does not fit this clone: prompts-images-report \(changed params.json: ", refused), (
        refused
    )
