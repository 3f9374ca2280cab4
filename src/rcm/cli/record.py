"""From Snakemake to DVC and back: `record` what a run made, `sync` what was recorded elsewhere; neither runs a stage.

Both go by dvc.yaml, whose stages are Snakemake's jobs, and both refuse where Snakemake and DVC would then hold for made
what is damaged, or what other code, numbers or inputs have made.
"""

import argparse
import difflib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rcm.artefact import MANIFEST, UserError, read_json, sha256_file, verified_sha256, write_text
from rcm.cli import stages as pipeline

LOCK = Path("dvc.lock")
SHOWN = 4  # names in a sentence


def record(arguments: argparse.Namespace) -> None:
    """Write what Snakemake made into dvc.lock and DVC's cache."""
    _alone()
    known, code = _current()
    wanted = _with_inputs(known, arguments.targets)
    for scale, targets in _asked(known, arguments.targets):
        if rules := _unfinished(scale, targets):
            raise UserError(
                f"Snakemake has work to do at the scale {scale}, {_some(rules)}: finish the run, then record it"
            )
    verify(_outputs(known, wanted))
    write_text(pipeline.CODE, code)
    if _dvc("commit", "--quiet", "--force", *_with_deps(arguments.targets)):
        raise UserError("dvc commit failed, see above; what was made is untouched, record it again afterwards")
    print(
        f"recorded {len(wanted)} stages in {LOCK}; next: git add {LOCK} {pipeline.PIPELINE} {pipeline.PARAMS}, "
        "git commit, dvc push"
    )


def sync(arguments: argparse.Namespace) -> None:
    """Fetch what dvc.lock names and have Snakemake take it for made, if this clone would make the same."""
    _alone()
    known, code = _current()
    wanted = _with_inputs(known, arguments.targets)
    recorded = yaml.load(LOCK.read_text(encoding="utf-8"), _Loader)["stages"] if LOCK.is_file() else {}
    if lacking := [name for name in wanted if name not in recorded]:
        raise UserError(f"{LOCK} does not hold {_some(lacking)}: make it with `dvc repro`, or run and `rcm record` it")
    _pull(["configure"], "--force")  # data/code.json, which anybody can make again
    if changed := _changed_code(wanted, known, code):
        write_text(pipeline.CODE, code)  # so that `dvc repro` sees it too
        raise UserError(
            f"the code or the packages here are not those of {LOCK}, for {_some(changed)}: check out the commit that "
            "recorded it and `make setup`, or make it again with `dvc repro`"
        )
    _pull(arguments.targets)
    if changed := _status(arguments.targets):
        raise UserError(
            f"{LOCK} does not fit this clone: {_some(changed, '; ')}. Check out the commit that recorded it, or "
            "make it again with `dvc repro`"
        )
    verify(_outputs(known, wanted))
    for scale, targets in _asked(known, arguments.targets):
        run = _snakemake("--touch", "--forceall", "--cores", "1", scale=scale, targets=targets)
        if run.returncode:
            raise UserError(f"snakemake --touch failed: {_last(run)}")
    print(f"{len(wanted)} stages are here as recorded; Snakemake and DVC have nothing to make of them")


def verify(outputs: Iterable[Path]) -> None:
    """UserError where an output is missing, or disagrees with its record or with those of what was made of it."""
    found: dict[str, str] = {}
    uses: list[tuple[Path, str, str]] = []
    for output in outputs:
        if not output.exists():
            raise UserError(f"{output} is missing: run Snakemake, then record; or `dvc pull`, if it was recorded")
        records = [output] if output.name.endswith(".prov.json") else sorted(output.glob("*.prov.json"))
        for file in records:
            artefact = file.with_name(file.name.removesuffix(".prov.json"))
            found[artefact.as_posix()] = verified_sha256(artefact)
            _verify_files(artefact)
            uses += [(artefact, each["path"], each["sha256"]) for each in read_json(file)["inputs"]]
    for artefact, name, known in uses:
        if found.get(name, known) != known:
            raise UserError(
                f"{artefact} was made of another {name} than the one here: make it again with `snakemake {artefact} "
                f"--forcerun {artefact}`"
            )


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


def _current() -> tuple[dict[str, Any], str]:
    """The stages of dvc.yaml, and what data/code.json has to be; UserError where a generated file is not current."""
    wanted, params, code = pipeline.texts(pipeline.known_scales())
    pipeline.require_current(pipeline.PIPELINE, wanted)
    pipeline.require_untouched()
    pipeline.require_current(pipeline.PARAMS, params)
    return yaml.load(wanted, _Loader)["stages"], code


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of LibYAML, ten times as fast


def _with_inputs(known: dict[str, Any], targets: list[str]) -> list[str]:
    """Names of the stages that the targets need, in the order of dvc.yaml; of all without targets."""
    for name in targets:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3) or ["see `dvc stage list --name-only`"]
            raise UserError(f"dvc.yaml has no stage {name!r}; allowed: {', '.join(near)}")
    makers = {path: name for name, stage in known.items() for path in _paths(stage)}
    queue, found = [*(targets or known)], {"configure"}
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            needed = [place for path in known[name].get("deps", ()) for place in (path, Path(path).parent.as_posix())]
            queue += [makers[place] for place in needed if place in makers]
    return [name for name in known if name in found]


def _paths(stage: dict[str, Any]) -> list[str]:
    """The outputs of a stage."""
    return [path for out in stage["outs"] for path in ([out] if isinstance(out, str) else out)]


def _outputs(known: dict[str, Any], names: Iterable[str]) -> Iterator[Path]:
    """What the stages make; `configure` is compared otherwise."""
    return (Path(path) for name in names if name != "configure" for path in _paths(known[name]))


def _call(stage: dict[str, Any]) -> tuple[str, str, list[str]]:
    """Scale, rule and targets of the command of a stage, which is `stage.sh SCALE RULE TARGET ...`."""
    scale, rule, *targets = shlex.split(stage["cmd"])[2:]
    return scale, rule, targets


def _asked(known: dict[str, Any], names: list[str]) -> list[tuple[str, list[str]]]:
    """What Snakemake is asked for at each scale."""
    found: dict[str, list[str]] = {}
    for name in names or known:
        if name != "configure":
            scale, _, targets = _call(known[name])
            found.setdefault(scale, [])
            for target in targets if names else ():
                parts = re.search(r"\{1\.\.(\d+)\}", target)
                count = int(parts[1]) if parts else 1
                found[scale] += [target.replace(parts[0], str(k + 1)) if parts else target for k in range(count)]
    return [(scale, targets or [*pipeline.TARGETS]) for scale, targets in found.items()]


def _changed_code(wanted: list[str], known: dict[str, Any], code: str) -> list[str]:
    """Rules whose code differs from that which was recorded."""
    held, now = read_json(pipeline.CODE), json.loads(code)
    calls = {_call(known[name])[:2] for name in wanted if name != "configure"}
    return sorted(
        rule
        for scale, rule in calls
        if held.get(pipeline.key(scale), {}).get(rule) != now.get(pipeline.key(scale), {}).get(rule)
    )


def _unfinished(scale: str, targets: list[str]) -> list[str]:
    """Rules with jobs that Snakemake would run."""
    run = _snakemake("--dry-run", "--quiet", "rules", scale=scale, targets=targets)
    if run.returncode:
        raise UserError(f"snakemake -n failed: {_last(run)}")
    rows = re.findall(r"^(\w+) +\d+$", run.stdout + run.stderr, re.MULTILINE)
    return [rule for rule in dict.fromkeys(rows) if rule not in ("total", "all")]


def _snakemake(*words: str, scale: str, targets: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "SNAKEMAKE_PROFILE"}
    command = [sys.executable, "-m", "snakemake", *words, "--config", f"scale={scale}", "--", *targets]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _last(run: subprocess.CompletedProcess[str]) -> str:
    """What a command said last."""
    lines = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {run.returncode}"


def _dvc(*words: str) -> int:
    """Call DVC; what it says is for the user to see, what it would ask is refused."""
    return subprocess.run([sys.executable, "-m", "dvc", *words], stdin=subprocess.DEVNULL).returncode


def _with_deps(targets: list[str]) -> list[str]:
    return ["--with-deps", *targets] if targets else []


def _pull(targets: list[str], *words: str) -> None:
    """Fetch and check out; UserError that names what did not come."""
    if not _dvc("pull", "--quiet", *words, *_with_deps(targets)):
        return
    lacking = [line for line in _status(targets) if "deleted" in line or "not in cache" in line]
    raise UserError(
        f"dvc pull did not bring everything, see above{': ' if lacking else ''}{_some(lacking, '; ')}. `dvc push` it "
        "from where it was recorded, then sync again; what is here and not recorded, record or move away"
    )


def _status(targets: list[str]) -> list[str]:
    """What `dvc status` says of stages other than `configure`, a phrase each."""
    command = [sys.executable, "-m", "dvc", "status", "--json", *_with_deps(targets)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"dvc status failed: {_last(run)}")
    found = []
    for name, changes in json.loads(run.stdout).items():
        for change in changes if name != "configure" else ():
            kinds = change.items() if isinstance(change, dict) else [(change, {})]
            found += [
                f"{name} ({kind}: {_some(_phrases(what))})" if what else f"{name} ({kind})" for kind, what in kinds
            ]
    return found


def _phrases(what: dict[str, Any]) -> list[str]:
    """`FILE modified`, or the keys of a file of parameters."""
    return [
        f"{path} {how}" if isinstance(how, str) else f"{path} {', '.join(map(str, how))}" for path, how in what.items()
    ]


def _some(names: list[str], between: str = ", ") -> str:
    """The first names of a list, and how many there are more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more
