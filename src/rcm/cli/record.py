"""From Snakemake to DVC and back: `record` what a run made, `sync` what was recorded elsewhere; neither runs a stage.

Both go by dvc.yaml, whose stages are Snakemake's jobs, and both refuse where Snakemake and DVC would then hold for made
what is damaged, or what other code, numbers or inputs have made.
"""

import argparse
import difflib
import fnmatch
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from rcm.artefact import (
    MANIFEST,
    UserError,
    beside,
    content_sha256,
    read_json,
    sha256_file,
    verified_sha256,
    write_text,
)
from rcm.cli import stages as pipeline
from rcm.cli.stages import Stage

LOCK = Path("dvc.lock")
SHOWN = 4  # names in a sentence
_BESIDE = (".snakemake_timestamp", ".*.partial", ".gitignore")  # in a folder of parts


def record(arguments: argparse.Namespace) -> None:
    """Write what Snakemake made into dvc.lock and DVC's cache."""
    _alone()
    known, _, code = _current()
    _lock()  # one that is damaged is said to be so before anything is hashed
    wanted = _with_inputs(known, arguments.targets)
    for scale, targets in _asked(known, arguments.targets):
        if rules := _unfinished(scale, targets):
            raise UserError(
                f"Snakemake has work to do at the scale {scale}, {_some(rules)}: finish the run, then record it"
            )
    if old := [path for name in wanted for path in _strangers(known[name])]:
        raise UserError(f"no stage makes {_some(old)}, which would be recorded with the parts beside: `rm` it first")
    verify(_outputs(known, wanted))
    write_text(pipeline.CODE, code)
    done = _dvc("commit", "--quiet", "--force", *_with_deps(arguments.targets))
    if done.returncode:
        raise UserError(
            f"dvc commit failed: {_last(done.stdout)}; what was made is untouched, record it again afterwards"
        )
    print(
        f"recorded {len(wanted) + 1} stages in {LOCK}; next: git add {LOCK} {pipeline.PIPELINE} {pipeline.PARAMS}, "
        "git commit, dvc push"
    )


def sync(arguments: argparse.Namespace) -> None:
    """Fetch what dvc.lock names and have Snakemake take it for made, if this clone would make the same."""
    _alone()
    known, made, code = _current()
    wanted = _with_inputs(known, arguments.targets)
    lock = _lock()
    if lacking := [name for name in ("configure", *wanted) if name not in lock]:
        raise UserError(f"{LOCK} does not hold {_some(lacking)}: make it with `dvc repro`, or run and `rcm record` it")
    rules, changes = _differences(wanted, known, made, lock, json.loads(code))
    if rules:
        write_text(pipeline.CODE, code)  # so that `dvc repro` sees it too
        raise UserError(
            f"the code or the packages here are not those of {LOCK}, for {_some(rules)}: check out the commit that "
            "recorded it and `make setup`, or make it again with `dvc repro`"
        )
    _require_none(changes)
    _pull(arguments.targets, code, _outputs(known, wanted))
    _require_none(_changed_deps(wanted, known, made, lock, inside=True))
    hashes = verify(_outputs(known, wanted))
    for scale, targets in _asked(known, arguments.targets):
        status, said = _snakemake("--touch", "--forceall", "--cores", "1", scale=scale, targets=targets)
        if status:
            raise UserError(f"snakemake --touch failed: {_last(said)}")
    _keep((stage for name, stage in known.items() if name not in wanted), hashes)
    print(f"{len(wanted) + 1} stages are here as recorded; Snakemake and DVC have nothing to make of them")


def verify(outputs: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of each; UserError where one is missing, or disagrees with its record or what was made of it."""
    found: dict[str, str] = {}
    uses: list[tuple[Path, str, str]] = []
    artefacts = dict.fromkeys(outputs)
    for artefact in artefacts:
        if not artefact.exists():
            raise UserError(f"{artefact} is missing: run Snakemake, then record; or `dvc pull`, if it was recorded")
        if artefact.suffix and artefact.with_suffix("") in artefacts:  # the index of a shard has no record
            continue
        if not (file := beside(artefact, ".prov.json")).is_file():
            raise UserError(f"{artefact} has no {file.name}: {_again(artefact)}")
        found[artefact.as_posix()] = verified_sha256(artefact)
        _verify_files(artefact)
        uses += [(artefact, each["path"], each["sha256"]) for each in read_json(file)["inputs"]]
    for artefact, name, known in uses:
        if found.get(name, known) != known:
            raise UserError(f"{artefact} was made of another {name} than the one here: {_again(artefact)}")
    return found


def _again(artefact: Path) -> str:
    return f"make it again with `snakemake {artefact} --forcerun {artefact}`"


def _keep(others: Iterable[Stage], hashes: Mapping[str, str]) -> None:
    """Have what was made of just the synced content stay newer than it, so that it is not made again.

    Where an input is another than the one that was read, times are left alone: there Snakemake has work to do.
    """
    known = dict(hashes)

    def here(name: str) -> str:
        if name not in known:
            record = beside(name, ".prov.json")
            whole = Path(name).exists()
            known[name] = (
                read_json(record)["sha256"] if whole and record.is_file() else content_sha256(name) if whole else ""
            )
        return known[name]

    now = time.time_ns()
    for stage in others:
        for output in map(Path, stage.outputs):
            names = (beside(each, ".prov.json") for each in (output, output.with_suffix("")))
            record = next((name for name in names if name.is_file()), None)
            if record is None or not output.exists():
                continue
            if all(here(each["path"]) == each["sha256"] for each in read_json(record)["inputs"]):
                stamp = output / ".snakemake_timestamp"  # what counts for Snakemake of a folder
                os.utime(stamp if stamp.is_file() else output, ns=(now, now))
        for benchmark in filter(os.path.exists, stage.benchmarks):  # the oldest counts of these and of the outputs
            os.utime(benchmark, ns=(now, now))


def _verify_files(folder: Path) -> None:
    """Compare the files of a folder whose identity is in its manifest, a DCP, with that."""
    files = read_json(folder / MANIFEST).get("files", {}) if (folder / MANIFEST).is_file() else {}
    for name, known in files.items() if isinstance(files, dict) else ():
        if not (folder / name).is_file() or sha256_file(folder / name) != known:
            raise UserError(f"{folder / name} is missing or damaged: its SHA-256 is not that of {folder / MANIFEST}")


def _alone() -> None:
    """Refuse beside a Snakemake that is at work."""
    locks = Path(".snakemake/locks")
    if locks.is_dir() and any(locks.iterdir()):
        raise UserError("Snakemake is at work here: wait for it; if it was killed, `snakemake --unlock` first")


def _current() -> tuple[dict[str, Stage], dict[str, Any], str]:
    """The stages less `configure`, those of dvc.yaml and what data/code.json has to be.

    UserError where a generated file is not current.
    """
    scales = pipeline.known_scales()
    known = pipeline.stages_of(scales)
    wanted, params, code = pipeline.texts(scales, known)
    pipeline.require_current(pipeline.PIPELINE, wanted)
    pipeline.require_untouched()
    pipeline.require_current(pipeline.PARAMS, params)
    return known, _yaml(wanted)["stages"], code


def _lock() -> dict[str, Any]:
    """The stages of dvc.lock; UserError where a merge has left both sides in it."""
    try:
        held = _yaml(LOCK.read_text(encoding="utf-8")) if LOCK.is_file() else {"stages": {}}
        return dict(held["stages"])
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{LOCK} is damaged, perhaps by a merge: take one side with `git checkout --ours {LOCK}` or --theirs, then "
            "`rcm sync` it or make and record it again"
        ) from None


def _yaml(text: str) -> Any:
    """YAML as DVC reads it, in which 1e-05 is a number. Raises ValueError for what is none."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ValueError(str(error)) from None


def _with_inputs(known: Mapping[str, Stage], targets: list[str]) -> list[str]:
    """Names of the stages that the targets need, in the order of dvc.yaml; of all without targets."""
    for name in targets:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3) or ["see `dvc stage list --name-only`"]
            raise UserError(f"dvc.yaml has no stage {name!r}; allowed: {', '.join(near)}")
    makers = {path: name for name, stage in known.items() for path in stage.outputs}
    queue, found = [*(targets or known)], set()
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += [makers[path] for path in known[name].inputs if path in makers]
    return [name for name in known if name in found]


def _outputs(known: Mapping[str, Stage], names: Iterable[str]) -> Iterator[Path]:
    """What the stages make."""
    return (Path(path) for name in names for path in known[name].outputs)


def _strangers(stage: Stage) -> Iterator[str]:
    """What lies in the folder of a scattered stage although it makes no such part, as after another `scatter`."""
    own = {*stage.outputs, *(f"{output}.{kind}.json" for output in stage.outputs for kind in ("prov", "run"))}
    for folder in map(Path, stage.kept if stage.items else ()):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.as_posix() not in own and not any(fnmatch.fnmatch(path.name, name) for name in _BESIDE):
                yield path.as_posix()


def _asked(known: Mapping[str, Stage], names: list[str]) -> list[tuple[str, list[str]]]:
    """What Snakemake is asked for at each scale."""
    found: dict[str, list[str]] = {}
    for name in names or known:
        found.setdefault(known[name].scale, []).extend(known[name].outputs if names else ())
    return [(scale, targets or [*pipeline.TARGETS]) for scale, targets in found.items()]


def _differences(
    wanted: list[str], known: Mapping[str, Stage], made: Mapping[str, Any], lock: Mapping[str, Any], code: Any
) -> tuple[list[str], list[str]]:
    """Rules whose code is not that of dvc.lock, and what else of it `dvc status` would say before anything is here."""
    values = {str(pipeline.PARAMS): read_json(pipeline.PARAMS), str(pipeline.CODE): code}
    rules, changes = [], []
    for name in wanted:
        held, now = lock[name], made[name]
        if held["cmd"] != now["cmd"]:
            changes.append(f"{name} (changed command)")
        if {each["path"] for each in held.get("outs", ())} != {*now["outs"]}:
            changes.append(f"{name} (other outputs)")
        for file, keys in ((file, keys) for each in now.get("params", ()) for file, keys in each.items()):
            told = held.get("params", {}).get(file, {})
            other = [place for place in keys if place not in told or told[place] != _at(values[file], place)]
            if other and file == str(pipeline.CODE):
                rules += [place.rpartition(".")[2] for place in other]
            elif other:
                changes.append(f"{name} (changed {file}: {_some(other)})")
    return sorted({*rules}), [*changes, *_changed_deps(wanted, known, made, lock, inside=False)]


def _changed_deps(
    wanted: list[str], known: Mapping[str, Stage], made: Mapping[str, Any], lock: Mapping[str, Any], inside: bool
) -> Iterator[str]:
    """Inputs that are not those of dvc.lock; `inside`: those in folders of parts, which have to be here for that."""
    outs = {each["path"]: each.get("md5") for stage in lock.values() for each in stage.get("outs", ())}
    parts = {path for stage in known.values() for output in stage.outputs for path in (output, f"{output}.prov.json")}
    for name in wanted:
        told = {each["path"]: each.get("md5") for each in lock[name].get("deps", ())}
        for path in made[name].get("deps", ()):
            if inside == (path in parts and path not in outs) and told.get(path) != (outs.get(path) or _md5(path)):
                yield f"{name} (changed {path})"


def _at(node: Any, place: str) -> Any:
    for name in place.split("."):
        node = node[name]
    return node


def _md5(path: str) -> str:
    """Of a file's bytes, as DVC has it; empty where there is none."""
    if not Path(path).is_file():
        return ""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _require_none(changes: Iterable[str]) -> None:
    if found := [*changes]:
        raise UserError(
            f"{LOCK} does not fit this clone: {_some(found, '; ')}. Check out the commit that recorded it, or make it "
            "again with `dvc repro`"
        )


def _unfinished(scale: str, targets: list[str]) -> list[str]:
    """Rules with jobs that Snakemake would run."""
    status, said = _snakemake("--dry-run", "--quiet", "rules", scale=scale, targets=targets)
    if status:
        raise UserError(f"snakemake -n failed: {_last(said)}")
    rows = re.findall(r"^(\w+) +\d+$", said, re.MULTILINE)
    return [rule for rule in dict.fromkeys(rows) if rule not in ("total", "all")]


def _snakemake(*words: str, scale: str, targets: list[str]) -> tuple[int, str]:
    """Call Snakemake in this process, which has loaded it; its exit status and what it said."""
    from snakemake.cli import main
    from snakemake.executors import touch

    touch.Executor.SLEEPING_TIME = 0  # seconds a job, 0.1 by default; inputs are touched first, and not newer is enough
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main([*words, "--profile", "none", "--config", f"scale={scale}", "--", *targets])
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, said.getvalue()


def _last(said: str) -> str:
    """The error that a command ended with, or what else it said last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    start = next((k for k, line in enumerate(lines) if line.startswith("ERROR:")), len(lines) - 2)
    told = [line for line in lines[max(start, 0) :] if not line.startswith(("Is your cache", "<https://error.dvc.org"))]
    return _some(told, " ").removeprefix("ERROR: ") or "it did not say why"


def _dvc(*words: str) -> subprocess.CompletedProcess[str]:
    """Call DVC; what it would ask is refused."""
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _with_deps(targets: list[str]) -> list[str]:
    return ["--with-deps", *targets] if targets else []


def _pull(targets: list[str], code: str, outputs: Iterable[Path]) -> None:
    """Fetch and check out; UserError that names what did not come. data/code.json is what this clone has."""
    pipeline.CODE.unlink(missing_ok=True)
    try:
        done = _dvc("pull", *_with_deps(targets))
    finally:
        write_text(pipeline.CODE, code)
    if done.returncode:
        lacking = [str(path) for path in outputs if not path.exists()]
        raise UserError(
            f"dvc pull did not bring everything from {_remote()}{', not ' if lacking else ''}{_some(lacking)}: "
            f"{_last(done.stdout)}. `dvc push` it from where it was recorded, then sync again; what is here and not "
            "recorded, record or move away"
        )


def _remote() -> str:
    """Where the default remote is."""
    name = _dvc("config", "core.remote").stdout.strip()
    url = _dvc("config", f"remote.{name}.url").stdout.strip()
    place = url if "://" in url else Path(".dvc", url).resolve()  # DVC counts from its own folder
    return f"{place} (no such folder)" if isinstance(place, Path) and not place.is_dir() else str(place)


def _some(names: list[str], between: str = ", ") -> str:
    """The first names of a list, and how many there are more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more
