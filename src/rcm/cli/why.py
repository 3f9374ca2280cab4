"""The stage `why`: from a number, a figure or a student back to checkpoint, prompts, configuration and code.

The chain is that of the `.prov.json` beside each artefact, followed by hash: an input counts as the one that was read
only while its record, or its content, still has the hash that was noted then. Records may come from anywhere: they
name files below the project's folder only, and what they say is shown without control characters.
"""

import csv
import re
import textwrap
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rcm.artefact import UserError, beside, code_digest, content_sha256, read_json, read_record, read_run, sha256_json
from rcm.usage import duration, total

SMALL = 64 * 2**20  # bytes up to which content is hashed without --check
MANY = 4  # inputs of one stage, above which a table or figure names them without what lies behind
DEPTH = 40  # of a chain; the longest of this workflow has ten artefacts
WIDTH = 120
SHOWN = {  # values that decide what a stage makes, by dotted key
    "prompts": ("suite", "media", "prompts", "per_task", "file"),
    "download": ("name",),
    "convert": ("kind", "width", "layers"),
    "embed": ("text.kind", "precision"),
    "synthesize": ("synthesis.sampler", "synthesis.steps", "synthesis.guidance", "synthesis.shift"),
    "distill": (
        *("objective.name", "objective.dmd_weight", "distillation.student_updates", "distillation.batch"),
        *("distillation.guidance", "distillation.student_lr", "parallel.precision"),
    ),
    "export": ("sampler.sigma_max", "sampler.mid_times"),
    "sample": ("control", "steps", "samples", "teacher.guidance"),
    "evaluate": ("scorer", "resamples"),
    "throughput": ("steps", "samples"),
    "table": ("oracle_at_least", "floor_at_most"),
}
_PART = re.compile(r"(?<![0-9])[0-9]+-of-([0-9]+)")


@dataclass(frozen=True)
class Link:
    """An artefact in the chain, as its consumer read it; without `record` nothing is known of how it was made."""

    path: str
    sha256: str
    record: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None
    source: Mapping[str, Any] | None = None  # what a download noted
    fault: str = ""
    note: str = ""
    inputs: tuple["Link", ...] = field(default=())

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.record["stage"]) if self.record else "file"


def why(arguments: Namespace) -> None:
    """Print where an artefact comes from; UserError where the chain is broken."""
    path = arguments.file
    if not path.exists():
        raise UserError(f"{path} does not exist; expected an artefact, such as results/tiny/tables/table1.csv")
    if not (beside(path, ".prov.json")).is_file():
        raise UserError(f"{path} has no record of how it was made ({path.name}.prov.json); make it with `rcm` again")
    record = read_record(beside(path, ".prov.json"))
    root = _root(path, record["artefact"])
    inputs = record["inputs"] if arguments.model is None else _of_model(record, arguments.model, path)
    chain = _Follow(root, arguments.check).artefact(record["artefact"], record["sha256"], inputs)
    lines = [*_lines(chain), "", *_summary(chain)]
    if arguments.model is not None:
        lines = [*_row(path, arguments.model), *lines]
    print("\n".join(_plain(line) for line in lines))
    if faults := [f"{link.path} {link.fault}" for link in _distinct(chain) if link.fault]:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UserError(f"the chain is broken: {_plain(faults[0])}{more}; make again what rests on it")


# --- Following -----------------------------------------------------------------------------------------------------


def _root(path: Path, artefact: str) -> Path:
    """The project's folder: what is left of the path without the artefact's own."""
    own, whole = PurePosixPath(artefact).parts, path.absolute().parts
    return Path(*whole[: -len(own)]) if own and whole[-len(own) :] == own else Path.cwd()


class _Follow:
    """Follows records below the folder `root`; `check`: hashes content of any size."""

    def __init__(self, root: Path, check: bool):
        self.root, self.check = root, check
        self._known: dict[tuple[str, str], Link] = {}
        self._open: list[tuple[str, str]] = []

    def artefact(self, path: str, sha256: str, inputs: Sequence[Mapping[str, str]] | None = None) -> Link:
        """The chain behind what was read at `path`, with this hash; `inputs` instead of all of its own."""
        key = path, sha256
        if key in self._known:
            return self._known[key]
        if key in self._open or len(self._open) >= DEPTH:
            return Link(path, sha256, fault="is said to be made from itself")
        self._open.append(key)
        self._known[key] = self._link(path, sha256, inputs)
        self._open.pop()
        return self._known[key]

    def _link(self, path: str, sha256: str, inputs: Sequence[Mapping[str, str]] | None) -> Link:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts or not path.isprintable():
            return Link(path, sha256, fault="is no path of a file of this project")
        place = self.root / pure
        if not beside(place, ".prov.json").exists():
            return self._file(path, sha256, place)
        try:
            record = read_record(beside(place, ".prov.json"))
        except UserError as error:
            return Link(path, sha256, fault=f"has a record that cannot be read ({error})")
        if record["sha256"] != sha256:
            fault = f"was made again since: {sha256[:8]} was read, {record['sha256'][:8]} is there now"
            return Link(path, sha256, fault=fault)
        fault, note = self._content(place, sha256)
        given = record["inputs"] if inputs is None else inputs
        return Link(
            path,
            sha256,
            record,
            read_run(beside(place, ".run.json"), sha256),
            _source(beside(place, ".download.json")),
            fault,
            note,
            tuple(self.artefact(item["path"], item["sha256"]) for item in given),
        )

    def _file(self, path: str, sha256: str, place: Path) -> Link:
        """What has no record: a file of the project's own, or one from elsewhere."""
        if place.exists():
            fault, note = self._content(place, sha256)
            return Link(path, sha256, fault=fault, note=note)
        if "/" not in path:
            return Link(path, sha256, note="lay outside of the project: it cannot be looked at")
        return Link(path, sha256, fault="is gone, and so is its record")

    def _content(self, place: Path, sha256: str) -> tuple[str, str]:
        """What is wrong with the content on the disk, and what is to be said of it."""
        if not place.exists():
            told = "is gone; its record is there"
            return (told, "") if self.check else ("", told)
        if not (place.is_file() or place.is_dir()):
            return "is neither a file nor a folder", ""
        if not self.check and _bytes(place) > SMALL:
            return "", "is big: --check reads it"
        try:
            found = content_sha256(place)
        except (UserError, OSError) as error:
            return f"cannot be read ({error})", ""
        if found != sha256:
            return f"has changed since: {sha256[:8]} was read, {found[:8]} is there now", ""
        return "", ""


def _bytes(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def _source(path: Path) -> dict[str, Any] | None:
    """What a download noted; a damaged note says nothing."""
    with suppress(UserError):
        said = read_json(path) if path.is_file() else None
        if isinstance(said, dict) and isinstance(said.get("source"), str):
            return said
    return None


def _distinct(chain: Link) -> list[Link]:
    """Every artefact of a chain once, the nearest first."""
    found: dict[tuple[str, str, str], Link] = {}
    queue = [chain]
    while queue:
        link = queue.pop(0)
        if (key := (link.path, link.sha256, link.fault)) not in found:
            found[key] = link
            queue += link.inputs
    return list(found.values())


# --- One row of a table --------------------------------------------------------------------------------------------


def _of_model(record: Mapping[str, Any], model: str, path: Path) -> list[Mapping[str, str]]:
    """The inputs that are of one model and number of steps; UserError where there are none."""
    names = {_model(item["path"]) for item in record["inputs"]}
    found = [item for item in record["inputs"] if _model(item["path"]) == model]
    if not found:
        known = ", ".join(sorted(name for name in names if re.search(r"-[0-9]+$", name)))
        raise UserError(f"{path} was made from nothing of {model!r}; expected one of {known or 'no model at all'}")
    return found


def _model(path: str) -> str:
    """MODEL-STEPS, or the student METHOD-SEED, that an input is of."""
    pure = PurePosixPath(path)
    if pure.name == "metrics.jsonl":
        return pure.parent.name
    if "samples" in pure.parts:
        return pure.parts[min(pure.parts.index("samples") + 1, len(pure.parts) - 1)]
    return pure.name.partition(".")[0]


def _row(path: Path, model: str) -> list[str]:
    """The numbers that a table prints of a model, from its CSV."""
    table = path.with_suffix(".csv")
    if not table.is_file():
        return []
    name, _, steps = model.rpartition("-")
    method, _, seed = name.rpartition("-") if re.search(r"-[0-9]+$", name) else (name, "", "")
    with table.open(encoding="utf-8", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row.get("block") == "models"
            and (row.get("model"), row.get("steps")) == (method, steps)
            and row.get("seed", "") in (seed, "")
        ]
    if not rows:
        return []
    numbers = ", ".join(f"{row.get('metric')} {row.get('value')}" for row in rows)
    return [*textwrap.wrap(f"{model} in {table.name}: {numbers}", WIDTH, subsequent_indent="  "), ""]


# --- Showing -------------------------------------------------------------------------------------------------------


def _lines(chain: Link) -> Iterator[str]:
    """The tree, each branch once."""
    shown: set[tuple[Any, ...]] = set()

    def branch(links: Sequence[Link], first: str, rest: str, brief: bool) -> Iterator[str]:
        key = tuple((link.path, link.sha256) for link in links)
        again = key in shown and links[0].record is not None
        head = f"{_names(links)}  [{links[0].stage}]" if links[0].record else f"{_names(links)}  {links[0].sha256[:8]}"
        yield f"{first}{head}{'  (as above)' if again else ''}"
        for link in links:
            for told in filter(None, (link.fault and f"BROKEN: {link.fault}", link.note)):
                yield f"{rest}     {f'{link.path}: ' if len(links) > 1 else ''}{told}"
        if again or (brief and links[0].inputs):
            return
        shown.add(key)
        groups = _groups(links)
        bar = "│ " if groups else "  "
        for detail in _details(links):
            yield from textwrap.wrap(detail, WIDTH, initial_indent=f"{rest}{bar} ", subsequent_indent=f"{rest}{bar}   ")
        stages = [group[0].stage for group in groups]
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            short = stages.count(group[0].stage) > MANY
            yield from branch(group, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "), short)

    yield from branch([chain], "", "", False)


def _groups(links: Sequence[Link]) -> list[list[Link]]:
    """The inputs of one artefact, or of parts of one, each once; what one job made, or the jobs of parts, together."""
    groups: dict[Any, list[Link]] = defaultdict(list)
    for link in {(link.path, link.sha256): link for parent in links for link in parent.inputs}.values():
        groups[_job(link)].append(link)
    return list(groups.values())


def _job(link: Link) -> Any:
    """What the outputs of one job, and those of the other parts, have in common."""
    record = link.record
    if record is None or link.fault:
        return link.path, link.sha256
    place = PurePosixPath(_PART.sub(r"-of-\1", link.path))
    same = place.parent, record["stage"], record.get("seed"), record.get("code_sha256")
    config = {key: value for key, value in record["config"].items() if key not in ("part", "shard")}
    inputs = sorted({_PART.sub(r"-of-\1", item.path) for item in link.inputs})
    return *same, sha256_json([config, inputs])


def _names(links: Sequence[Link]) -> str:
    """The paths of a group, parts told as such."""
    names = list(dict.fromkeys(_PART.sub(r"*-of-\1", link.path) for link in links))
    first, *others = names
    return ", ".join([first, *(PurePosixPath(name).name for name in others)])


def _details(links: Sequence[Link]) -> Iterator[str]:
    """What is told of a group: content and configuration, the source of a download, the run."""
    link, record = links[0], links[0].record
    if record is None:
        return
    content = f"content {link.sha256[:8]}" if len(links) == 1 else f"{len(links)} files"
    seed = "" if record.get("seed") is None else f", seed {record['seed']}"
    values = [f"{key.rpartition('.')[2]} {value}" for key, value in _values(record)]
    told = f"{content}, config {record['config_sha256'][:8]}, code {str(record.get('code_sha256'))[:8]}{seed}"
    yield "; ".join([told, *([", ".join(values)] if values else [])])
    if record["stage"] == "download":
        source = link.source or record["config"]
        revision = f", revision {source['revision']}" if source.get("revision") else ""
        yield f"from {source.get('source')}{revision}, SHA-256 {link.sha256}"
    runs = [link.run for link in links if link.run]
    yield told_run(runs) if runs else "no .run.json: when and where it ran is not known here"


def _values(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in SHOWN.get(record["stage"], ()):
        node: Any = record["config"]
        for name in key.split("."):
            node = node.get(name) if isinstance(node, Mapping) else None
        if node is not None and not isinstance(node, Mapping):
            yield key, str(node)[:60]


def told_run(runs: Sequence[Mapping[str, Any]]) -> str:
    """When, where and how long jobs ran, and by which commit."""
    run, cost = min(runs, key=lambda run: str(run["started"])), total(runs)
    machine, git = run.get("host") or {}, run.get("git")
    commit = f"commit {str(git['commit'])[:8]}{' + changes' if git.get('dirty') else ''}" if git else "no commit"
    attempts = f" in {run['attempts']} attempts" if run.get("attempts", 1) != 1 else ""
    jobs = f"{cost['jobs']} jobs, " if cost["jobs"] > 1 else ""
    job = f", Slurm job {run['slurm_job_id']}" if run.get("slurm_job_id") else ""
    return (
        f"{str(run['started'])[:16].replace('T', ' ')}, {jobs}{duration(cost['wall_seconds'])}{attempts} on "
        f"{machine.get('gpu') or machine.get('cpu') or 'an unknown machine'}{job}, {cost['peak_mib']:,.0f} MiB, "
        f"{cost['gpu_hours']:.3g} GPU-hours, {commit}"
    )


def _summary(chain: Link) -> Iterator[str]:
    """What it all cost, and whether the code has changed since."""
    links = _distinct(chain)
    made = [link for link in links if link.record]
    runs, cost = [link.run for link in made if link.run], total(link.run for link in made if link.run)
    unknown = f"; of {len(made) - len(runs)} of them no .run.json tells the cost" if len(runs) < len(made) else ""
    yield (
        f"In all: {len(made)} artefacts by {cost['jobs']} jobs, {duration(cost['wall_seconds'])}, "
        f"{cost['core_hours']:.3g} core-hours, {cost['gpu_hours']:.3g} GPU-hours{unknown}."
    )
    codes = sorted({str(link.record.get("code_sha256")) for link in made if link.record})
    now = code_digest()
    if codes == [now]:
        yield f"Code: {now[:8]}, as it is here."
    else:
        yield f"Code: {', '.join(code[:8] for code in codes)}; here it is {now[:8]}."
    if not any(link.fault for link in links):
        yield "Every input is the one that was read."
    if [link.stage for link in chain.inputs].count("evaluate") > MANY:
        yield "What is behind one of these rows: add --model with its name, such as rcm-0-4."


def _plain(line: str) -> str:
    """Without control characters, which a record could bring to the terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in line)
