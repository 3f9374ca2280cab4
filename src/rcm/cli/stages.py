"""dvc.yaml, params.json and data/code.json, made from Snakemake's jobs, so that both tools know one workflow.

A DVC stage is a rule with one combination of its wildcards, except that the parts of a scattered rule are one stage,
whose output is the folder that holds them, and that what Snakemake deletes after use, a temporary output, is made
within the stage that reads it. params.json holds the values in the params `cfg` of the rules, by scale and
medium; data/code.json what the params `code` and the commands of the rules are. The jobs come from Snakemake's Python
interface: what a dry run prints has no params.
"""

import argparse
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rcm.artefact import UserError, read_json, sha256_json, write_text
from rcm.tree import options

PLAIN = "tiny"  # the scale whose stages have no suffix
TARGETS = ("all",)  # so that what a plain run of Snakemake has made is all that DVC asks for
SAMPLE = ("frames", "height", "width", "codec", "text")  # sections that say what a sample is
TOGETHER = ("sample", "inference")  # what a stage that reads all of it names as a whole: DVC takes time for each name
PICKED = {"objective": "method", "seed": "seed"}  # sections that differ with a wildcard
SOURCES = ("config", "constraints.txt", "kernels/flash_jvp", "Snakefile", "src/rcm", "workflow")
PIPELINE, PARAMS, CODE = Path("dvc.yaml"), Path("params.json"), Path("data/code.json")
_HEAD = "Written by `rcm stages` from the rules under workflow/ and the numbers under config/: edit those."


@dataclass
class Stage:
    """The jobs of a stage; params of the first stand for those of all."""

    scale: str
    rule: str
    wildcards: dict[str, str]
    inputs: dict[str, None]  # in order, each once
    outputs: list[str]
    items: list[str]  # parts of a scattered rule
    folders: bool  # whether its outputs are folders
    params: Mapping[str, Any]
    command: str
    fixed: str  # params that are the same for all jobs of the rule, as they stand there
    temporary: bool  # whether Snakemake deletes its output after use
    benchmarks: list[str] = field(default_factory=list)  # where Snakemake notes what its jobs took
    within: list["Stage"] = field(default_factory=list)  # those that make its temporary inputs

    @property
    def name(self) -> str:
        """Its name in dvc.yaml, with `_` for what DVC forbids there."""
        words = [self.rule, *self.wildcards.values(), *([self.scale] if self.scale != PLAIN else [])]
        return re.sub(r"[^\w-]", "_", "-".join(words))

    @property
    def rules(self) -> list[str]:
        """Its rule and those of `within`."""
        return [self.rule, *dict.fromkeys(stage.rule for stage in self.within)]

    @property
    def kept(self) -> list[str]:
        """What DVC keeps: the folder of a scattered rule, or each output and its record."""
        if self.items:
            return [str(Path(self.outputs[0]).parent)]
        beside = [".prov.json", *([".download.json"] if self.rule.startswith("download_") else [])]
        return [o + end for o in self.outputs for end in ("", *beside)]

    @property
    def seen(self) -> dict[str, str]:
        """What those that read an output depend on.

        DVC looks through a folder file by file for each of them; a record says in one file what a folder of samples is.
        """
        if not self.items:
            return {output: output for output in self.outputs}
        return {output: f"{output}.prov.json" if self.folders else self.kept[0] for output in self.outputs}

    @property
    def targets(self) -> list[str]:
        """What Snakemake is asked for: an output of each job, `{1..N}` standing for the parts."""
        count = len(self.items)
        if not count:
            return self.outputs[:1]
        if {*self.items} != {f"{k}-of-{count}" for k in range(1, count + 1)}:
            raise ValueError(f"{self.rule} is asked for parts {', '.join(sorted(self.items))}, not all of 1 to {count}")
        return [re.sub(r"\d+-of-\d+", f"{{1..{count}}}-of-{count}", self.outputs[0])]


def stages(arguments: argparse.Namespace) -> None:
    """Write the three files; with --check or --values compare them, with --values write what is no structure."""
    every = all_scales()
    for scale in arguments.scales:
        if scale not in every:
            raise UserError(f"there is no scale {scale!r}; allowed: {', '.join(every)}")
    scales = [scale for scale in every if scale in arguments.scales] or known_scales()
    pipeline, params, code = texts(scales)
    if arguments.check or arguments.values:
        require_current(PIPELINE, pipeline)
        require_untouched()
    if arguments.check:
        require_current(PARAMS, params)
        return
    if not arguments.values:
        write_text(PIPELINE, pipeline)
    write_text(PARAMS, params)
    write_text(CODE, code)


def all_scales() -> list[str]:
    """The scales that have experiments."""
    return sorted({name.rpartition("-")[0] for name in options("experiment")})


def known_scales() -> list[str]:
    """The scales in params.json; tiny where there is none."""
    if not PARAMS.exists():
        return [PLAIN]
    held = read_json(PARAMS)
    return [scale for scale in all_scales() if key(scale) in held]


def require_current(path: Path, wanted: str) -> None:
    """Refuse a file that is not what would be written now."""
    if not path.is_file() or path.read_text(encoding="utf-8") != wanted:
        raise UserError(f"{path} is not what the workflow and config/ say: run `rcm stages`, then commit it")


def require_untouched() -> None:
    """Refuse params.json with a change made by hand, which the stages would not follow."""
    held = read_json(PARAMS)
    if held.pop("sha256", None) != sha256_json(held):
        raise UserError("params.json was edited by hand, but the stages read config/: edit there and run `rcm stages`")


def require_held(scale: str, found: Iterable[Any]) -> None:
    """Refuse jobs of Snakemake with values, code or commands other than DVC takes them for, which dvc.lock would name.

    So it is where DVC was told to leave out `configure`: `dvc repro --single-item` after an edit.
    """
    params, code = (read_json(path).get(key(scale), {}) for path in (PARAMS, CODE))
    for stage in _grouped(scale, found):
        if _digest(stage) != code.get(stage.rule) or not all(
            _holds(params, [media, *place], value) for media, place, value in read(stage)
        ):
            raise UserError(
                f"{PARAMS} and {CODE} do not hold what {stage.name} would be made with now: `dvc repro -f -s configure`"
                ", then again"
            )


def _holds(node: Any, place: list[str], value: Any) -> bool:
    """Whether a tree has a value at a place, perhaps with more keys beside it."""
    for name in place:
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    if isinstance(value, dict) and value:
        return all(_holds(node, [name], inner) for name, inner in value.items())
    return bool(node == value)


def stages_of(scales: Sequence[str]) -> dict[str, Stage]:
    """The stages of dvc.yaml by name, in its order, less `configure`."""
    return {stage.name: stage for scale in scales for stage in jobs(scale)}


def texts(scales: Sequence[str], known: Mapping[str, Stage] | None = None) -> tuple[str, str, str]:
    """The contents of dvc.yaml, params.json and data/code.json; `known` are the `stages_of` the scales."""
    every = stages_of(scales) if known is None else known
    pipeline: dict[str, Any] = {
        "configure": {
            "desc": "compose config/ into params.json",
            "cmd": "bash workflow/scripts/stage.sh",
            "deps": list(SOURCES),
            "outs": [{str(PARAMS): {"cache": False, "persist": True}}, {str(CODE): {"persist": True}}],
        }
    }
    params: dict[str, Any] = {}
    code: dict[str, dict[str, str]] = {}
    metrics: list[str] = []
    plots: list[str] = []
    for scale in scales:
        found = [stage for stage in every.values() if stage.scale == scale]
        values: dict[str, Any] = {}
        for stage in found:
            for media, place, value in _all_read(stage):
                _put(values, [media, *place], value)
        kept = {output: dep for stage in found for output, dep in stage.seen.items()}
        digests = {each.rule: _digest(each) for stage in found for each in [stage, *stage.within]}
        for stage in found:
            pipeline[stage.name] = entry(stage, kept, values)
            metrics += [o for o in stage.outputs if "/metrics/" in o]
            plots += [o for o in stage.outputs if o.endswith(".png")]
        params[key(scale)], code[key(scale)] = values, digests
    whole = {"stages": pipeline, "metrics": metrics, "plots": plots}
    sealed = {"about": _HEAD, **params}
    return (
        f"# {_HEAD}\n{yaml.safe_dump(whole, sort_keys=False, width=120, allow_unicode=True)}",
        _json({"sha256": sha256_json(sealed), **sealed}),
        _json(code),
    )


def entry(stage: Stage, kept: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """A stage of dvc.yaml; `kept` says what stands for an output, `values` is what params.json has of the scale."""
    name, rules = key(stage.scale), ",".join(stage.rules)
    targets = " ".join(f"'{target}'" for target in stage.targets)
    named = [*dict.fromkeys(".".join([name, *place]) for place in places(stage, values))]
    made: dict[str, Any] = {
        "cmd": f"bash workflow/scripts/stage.sh {stage.scale} {rules} {targets}",
        "deps": sorted({kept.get(path, path) for path in stage.inputs}),
        "params": [*([{str(PARAMS): named}] if named else []), {str(CODE): [f"{name}.{rule}" for rule in stage.rules]}],
        "outs": stage.kept,
    }
    return {name: value for name, value in made.items() if value}


def read(stage: Stage) -> Iterable[tuple[str, list[str], Any]]:
    """The medium, the place in params.json and the value of each section that a stage reads."""
    given = stage.params.get("cfg")
    chosen = re.search(r"experiment=\S+-(\w+)", stage.params["overrides"] or "")  # of rules without that wildcard
    media = stage.wildcards.get("media", chosen[1] if chosen else "")
    for text in [given] if isinstance(given, str) else given or []:
        for section, value in json.loads(text).items():
            if not section:  # the whole tree, whatever is free elsewhere
                yield value["media"], [stage.rule], sha256_json(value)
                continue
            picked = stage.wildcards.get(PICKED.get(section, ""))
            above = ["sample"] if section in SAMPLE else []
            yield media, [*above, *map(key, [*section.split("."), *([picked] if picked else [])])], value


def _all_read(stage: Stage) -> Iterable[tuple[str, list[str], Any]]:
    return (found for each in [stage, *stage.within] for found in read(each))


def places(stage: Stage, values: Mapping[str, Any]) -> list[list[str]]:
    """Where the values of a stage are: a section, or the keys of it where others read more of it."""
    found: list[list[str]] = []
    for media, place, value in _all_read(stage):
        node = values[media]
        for name in place:
            node = node[name]
        whole = node == value or not isinstance(value, dict)
        found += [[media, *place]] if whole else [[media, *place, name] for name in value]
    for media, name in {(place[0], place[1]) for place in found if place[1] in TOGETHER}:
        inner = [place for place in found if place[:2] == [media, name]]
        if len(inner) > 1 and {place[-1] for place in inner} == {*values[media][name]}:
            found = [place for place in found if place not in inner[1:]]
            found[found.index(inner[0])] = [media, name]
    return found


def _put(node: dict[str, Any], place: list[str], value: Any) -> None:
    """Merge a value into a tree; what is there already must be equal."""
    for name in place[:-1]:
        node = node.setdefault(name, {})
    held = node.setdefault(place[-1], {} if isinstance(value, dict) and value else value)
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            _put(held, [name], inner)
    elif held != value:
        raise ValueError(f"params.json would hold {held!r} and {value!r} at {'.'.join(place)}")


def key(name: str) -> str:
    """A name as DVC takes it between the dots of a key."""
    return name.replace(".", "_")


def _digest(stage: Stage) -> str:
    """What a rule's code, command and fixed params are, as Snakemake compares them."""
    command = hashlib.sha256(f"{stage.command}{stage.fixed}".encode()).hexdigest()
    return " ".join(filter(None, [stage.params.get("code"), f"command {command[:12]}"]))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


@cache
def jobs(scale: str) -> list[Stage]:
    """The stages of a scale, ordered by rules and wildcards; UserError where the workflow refuses."""
    if not Path("Snakefile").is_file():
        raise UserError(f"there is no Snakefile in {Path.cwd()}: call this in the root of the project")
    from snakemake.api import SnakemakeApi
    from snakemake.exceptions import RuleException, WorkflowError
    from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, Quietness, ResourceSettings

    printed = io.StringIO()
    try:
        with (
            redirect_stdout(printed),
            redirect_stderr(printed),
            SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api,
        ):
            of_scale = api.workflow(
                resource_settings=ResourceSettings(cores=1),
                config_settings=ConfigSettings(config={"scale": scale}),
                snakefile=Path("Snakefile"),
            )
            of_scale.dag(DAGSettings(targets={*TARGETS}, forceall=True)).printrulegraph()
            workflow = of_scale._workflow
            order = [rule.name for rule in workflow.rules]
            found = _grouped(scale, workflow.dag.jobs)
    except SystemExit as refusal:
        raise UserError(str(refusal.code).removeprefix("snakemake: error: ")) from None
    except (WorkflowError, RuleException, SyntaxError) as refusal:
        said = " ".join(f"{refusal}".split()) or type(refusal).__name__
        raise UserError(f"Snakemake refuses the workflow at the scale {scale}, {said}: see `snakemake -n`") from None
    found = _folded(found)
    return sorted(found, key=lambda stage: (order.index(stage.rule), [*stage.wildcards.values()]))


def _folded(found: list[Stage]) -> list[Stage]:
    """Stages without those of temporary outputs, which become part of the stages that read them."""
    brief = {path: stage for stage in found if stage.temporary for path in stage.outputs}
    for stage in found:
        stage.within = [brief[path] for path in stage.inputs if path in brief]
        inputs = [[*brief[path].inputs] if path in brief else [path] for path in stage.inputs]
        stage.inputs = dict.fromkeys(path for each in inputs for path in each)
    return [stage for stage in found if not stage.temporary]


def _grouped(scale: str, found: Iterable[Any]) -> list[Stage]:
    """Jobs of Snakemake as stages."""
    groups: dict[tuple[str, ...], Stage] = {}
    for job in sorted((job for job in found if job.output), key=lambda job: str(job.output[0])):
        wildcards = dict(job.wildcards_dict)
        item = wildcards.pop("scatteritem", None)
        name = (job.rule.name, *wildcards.values())
        if name not in groups:
            params = {name: job.params.get(name) for name in ("cfg", "code", "overrides")}
            fixed = {name: value for name, value in job.rule.params.items() if not callable(value)}
            groups[name] = Stage(
                *(scale, job.rule.name, wildcards, {}, [], []),
                folders=job.output[0].is_directory,
                params=params,
                command=job.rule.shellcmd or "",
                fixed=json.dumps(fixed, sort_keys=True, default=str),
                temporary=bool(job.output[0].flags.get("temp")),
            )
        groups[name].inputs |= dict.fromkeys(map(str, job.input))
        groups[name].outputs += map(str, job.output)
        groups[name].items += [item] if item else []
        groups[name].benchmarks += [str(job.benchmark)] if job.benchmark else []
    return [*groups.values()]
