# The configuration, checked, and what a rule asks of it.
import json
import math
import os
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import yaml

try:
    from rcm.artefact import UserError, sha256_json
    from rcm.cli.config import OF_A_MEDIUM, compose, files_here, options, read_schema, several, stored, validate
    from rcm.cli.evaluators import OFFICIAL, WEIGHTS, subject
    from rcm.cli.sources import stage_code
    from rcm.cli.stages import SAMPLE, require_held
    from rcm.report.legends import LEGENDS
    from rcm.tree import config_dir
except ImportError as error:
    sys.exit(
        f"snakemake: error: {error}: {sys.executable} lacks this project; use .venv/bin/snakemake after `make setup`"
    )

try:
    OF_SCALE = (
        config_dir() / "scale" / f"{config['scale']}.yaml"
    )  # what this scale has otherwise than config/pipeline.yaml
except UserError as mistake:
    sys.exit(f"snakemake: error: {mistake}")
if OF_SCALE.is_file():

    configfile: str(OF_SCALE)


# every rule calls the interpreter that runs Snakemake
shell.prefix(f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH; ")


def plain(value):
    """The configuration with the numbers in lists of the command line, which Snakemake takes for texts, as numbers."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, str) and value.isdecimal() else value


# media that a table or figure is made of; the others take those that there are, the first where it has to be one
NEEDS = {"table1": {"images"}, "table2": {"clips"}, "figure_samples": {"images"}, "figure_clips": {"clips"}}


def media_of(scale):
    """The media that a scale has an experiment for."""
    return [media for media in ("images", "clips") if f"{scale}-{media}" in options("experiment")]


def check_pipeline():
    """Check config/pipeline.yaml with what the command line changed in it."""
    validate(config, read_schema(Path(workflow.source_path("../schemas/pipeline.schema.json"))))
    scales = sorted({name.rpartition("-")[0] for name in options("experiment")})
    if config["scale"] not in scales:
        raise UserError(
            f"configuration key 'scale' is {json.dumps(config['scale'])}; allowed: the scales that have experiments "
            f"in config/experiment/, {', '.join(scales)}"
        )
    for name in (*config["tables"], *config["figures"]):
        if lacking := NEEDS.get(name, set()) - {*media_of(config["scale"])}:
            key = "tables" if name in config["tables"] else "figures"
            raise UserError(
                f"configuration key '{key}' contains {json.dumps(name)}, which is made of {', '.join(lacking)}; the "
                f"scale {config['scale']} has {' and '.join(media_of(config['scale']))} only"
            )
    for name in sorted({*NEEDS} & {*sys.argv[1:]}):
        if lacking := NEEDS[name] - {*media_of(config["scale"])}:
            raise UserError(
                f"the target {name} is made of {', '.join(lacking)}; the scale {config['scale']} has "
                f"{' and '.join(media_of(config['scale']))} only"
            )
    clips = {"table2", "figure_clips"} & {*config["tables"], *config["figures"]}
    if clips and config["clips"] not in ("all", *config["methods"]):
        raise UserError(
            f"configuration key 'clips' is {json.dumps(config['clips'])}; allowed: all, or one of methods "
            f"({', '.join(config['methods'])}); or leave out {' and '.join(sorted(clips))}"
        )
    shards, parts = (config["scatter"][name] for name in ("synthesize", "embed"))
    if shards % parts:
        raise UserError(
            f"configuration key 'scatter.embed' is {parts}; allowed: a divisor of scatter.synthesize ({shards}), so that "
            "the prompts of a shard stand in one part"
        )
    for word in config["overrides"]:
        if word.lstrip("+~").partition("=")[0] in ("experiment", "objective", "seed", "suite"):
            raise UserError(
                f"configuration key 'overrides' contains {word!r}; the rules set this themselves, "
                "from scale, methods, seeds and the suite of a job"
            )


@cache
def tree(*words):
    """The composed configuration."""
    return compose(words)


def check_controls(scorer):
    """Tables of the tiny world are trusted, or refused, by their controls; real prompts have no ground truth."""
    lacking = {"oracle", "shuffled"} - {*config["controls"]}
    if scorer == "shapes" and config["tables"] and lacking:
        raise UserError(
            f"configuration key 'controls' is {json.dumps(config['controls'])}; allowed where tables are built: lists "
            f"with oracle and shuffled, by which a table is trusted or refused; missing: {', '.join(sorted(lacking))}"
        )
    if scorer != "shapes" and config["controls"]:
        raise UserError(
            f"configuration key 'controls' is {json.dumps(config['controls'])}; allowed at the scale {config['scale']}: "
            "[], for its prompts have no ground truth"
        )
    if scorer == "shapes" and "table_text" in sys.argv[1:]:
        raise UserError("there is no target table_text at the scale tiny, for the tiny world has no letters")
    if scorer == "shapes" and "table_text" in config["tables"]:
        raise UserError(
            "configuration key 'tables' contains \"table_text\"; allowed at the scale tiny: those without it, for the "
            "tiny world has no letters"
        )


def check_figures(scorer):
    """Refuse figures of an overall score where the scorer has none."""
    overall = [name for name in config["figures"] if name in ("figure_steps", "figure_quality_diversity")]
    if scorer == "vbench-native" and overall:
        raise UserError(
            f"configuration key 'figures' contains {json.dumps(overall[0])}; allowed with evaluation.scorer vbench-native, "
            "which has no total: those without figure_steps and figure_quality_diversity"
        )


def check_trees():
    """Compose the tree of every medium and method, so that a mistake there shows at once, and compare it with steps."""
    shared = {}
    for media in media_of(config["scale"]):
        experiment = f"experiment={config['scale']}-{media}"
        for objective in ("", *(f"objective={method}" for method in config["methods"])):
            composed = tree(*filter(None, (experiment, objective)), *config["overrides"])
        times = 1 + len(composed["sampler"]["mid_times"])
        if refused := [steps for steps in config["steps"] if steps > times and steps != 8]:
            raise UserError(
                f"configuration key 'steps' contains {refused[0]}; allowed: up to {times} steps for {media}, one more than "
                "sampler.mid_times has entries, and 8"
            )
        check_controls(composed["evaluation"]["scorer"])
        check_figures(composed["evaluation"]["scorer"])
        for name in composed["checkpoints"].keys() - {*OF_A_MEDIUM}:
            if shared.setdefault(name, composed["checkpoints"][name]) != composed["checkpoints"][name]:
                raise UserError(
                    f"configuration key 'checkpoints.{name}' differs between the media of the scale {config['scale']}; "
                    "allowed: one for all of them"
                )
        layout = composed["parallel"]
        sizes = [layout[name] for name in ("replicate", "shard", "context")]
        fixed = math.prod(size or 1 for size in sizes)
        if config["nproc"] % fixed or (None not in sizes and config["nproc"] != fixed):
            raise UserError(
                f"configuration key 'nproc' is {config['nproc']}; allowed for {media}: replicate x shard x context of "
                f"the section parallel, {' x '.join('whatever remains' if size is None else str(size) for size in sizes)}"
            )


config.update(plain(config))
try:
    check_pipeline()
    if workflow.is_main_process and "RCM_STAGE" not in os.environ:  # else who started it has composed them
        check_trees()
except UserError as mistake:
    sys.exit(f"snakemake: error: {mistake}")  # where WorkflowError would add the lines of this file
SCALE = config["scale"]
MEDIA = media_of(SCALE)


def part(node, key):
    """The value at a dotted key; the whole tree at the empty one."""
    for name in filter(None, key.split(".")):
        node = node[name]
    return node


def chosen(wildcards):
    """The Hydra overrides that a job's wildcards stand for."""
    groups = {"objective": "method", "seed": "seed", "suite": "suite"}
    picked = [f"{key}={wildcards[name]}" for key, name in groups.items() if wildcards.get(name)]
    return [f"experiment={SCALE}-{wildcards.get('media', MEDIA[0])}", *picked]


def composed(wildcards):
    """The configuration of a job. Seed and suite change nothing else in it, so that a few trees serve all jobs."""
    known = {**wildcards}
    base = tree(*chosen({**known, "seed": None, "suite": None}), *config["overrides"])
    if known.get("suite", "report") not in base["suites"]:
        return tree(*chosen(known), *config["overrides"])  # which says what is wrong
    return base | ({"seed": int(known["seed"])} if "seed" in known else {})


# The sections of the configuration that decide what a stage makes; it is made again when a value in them changes.
DRAWN = ("inference.device", "inference.precision", "inference.batch")
READS = {
    "prompts": ("media", "prompts", "suites.{suite}"),
    "download": ("checkpoints.{name}",),
    "pretrain": ("media", "frames", "network", "codec", "text", "prompts", "pretrain"),
    "convert": ("{role}",),
    "embed": ("text", "teacher.negative_prompt", "synthesis.negative_prompt", "inference.precision"),
    "synthesize": (*SAMPLE, *DRAWN, "synthesizer", "synthesis", "suites.train"),
    # previews, which read more, are not worth another training
    "distill": (
        *(*SAMPLE, "media", "network", "seed", "objective", "distillation", "parallel"),
        "teacher.negative_prompt",
    ),
    "export": (*SAMPLE, "media", "network", "seed", "objective", "sampler"),
    "sample student": (*SAMPLE, *DRAWN, "suites.{suite}", "inference.format"),
    "sample teacher": (*SAMPLE, *DRAWN, "network", "teacher", "suites.{suite}", "inference.format"),
    "sample control": (*SAMPLE, "suites.{suite}", "inference.format"),
    "measure": ("media",),
    "official": ("media", "suites.report", "evaluation.scorer"),
    "evaluate": ("media", "evaluation"),
    "throughput": (*SAMPLE, *DRAWN, "network", "teacher", "evaluation.throughput"),
    "precision": (*SAMPLE, "network", "teacher", "suites.{suite}.seed", "evaluation.precision"),
    "table": ("evaluation",),
    "report": ("",),
}
# ... except for these, which change no weights and no scores
FREE = {
    "evaluate": {
        "evaluation": ("precision", "throughput", "oracle_at_least", "floor_at_most"),
    },
    "table": {"evaluation": ("precision", "throughput", "known_at_least", "bootstrap")},
    "distill": {
        "distillation": ("state_every", "preview_every", "profile", "wandb"),
        "parallel": (
            *("device", "replicate", "shard", "context", "recompute", "tangent_pass", "micro_batch"),
            *("offload_teacher", "compile", "workers", "timeout"),
        ),
    },
}


def numbers(stage, **fixed):
    """For params: the values that a stage reads, as JSON; `fixed` stands for wildcards that its files do not have."""

    def read(wildcards):
        known = {**wildcards, **fixed}
        values = composed(known)
        found = {key: part(values, key) for key in (key.format(**known) for key in READS[stage])}
        for key, free in FREE.get(stage, {}).items():
            found[key] = {name: value for name, value in found[key].items() if name not in free}
        return json.dumps(found, sort_keys=True)

    return read


def code(stage):
    """For params: the code and packages of a stage. Of real models nothing is made again for them: `-R RULE` does."""
    return lambda _: None if BIG else stage_code(stage)


def overrides(stage, **fixed):
    """For params: the overrides on a stage's command line, what its wildcards choose and those of the user.

    What they change is in `numbers`; Snakemake leaves params that ask for `threads` out of its comparison.
    """
    return lambda wildcards, threads: shlex.join([*chosen({**wildcards, **fixed}), *config["overrides"]])


def machines():
    """How many machines a distillation starts on: as many as its processes fill, where a profile names `gpus_per_node`."""
    size = workflow.resource_settings._parsed_default_resources.get("gpus_per_node")
    if size is None or size.value is None or config["nproc"] <= size.value:
        return 1
    if config["nproc"] % size.value:
        sys.exit(
            f"snakemake: error: configuration key 'nproc' is {config['nproc']}; allowed on machines of {size.value} GPUs "
            "(gpus_per_node of the profile): a multiple of it, for a distillation has its machines to itself"
        )
    return config["nproc"] // size.value


MACHINES = machines()


def launcher(wildcards, threads, resources):
    """For params: how a distillation starts, with a process for each thread, or at scales of real models for each GPU.

    Free as `overrides`. Rounded weights need a launcher even for one process: master weights are FSDP's.
    """
    precision = tree(*chosen(wildcards), *config["overrides"])["parallel"]["precision"]
    processes = config["nproc"] // MACHINES if BIG or MACHINES > 1 else threads
    if processes * MACHINES == 1 and precision == "float32":
        return "python -m rcm"
    start = ["python -m rcm.launch", f"--nproc-per-node {processes} -m rcm"]
    if MACHINES == 1:
        start.insert(1, "--standalone")
    else:
        step = f"--nodes={MACHINES} --ntasks={MACHINES} --ntasks-per-node=1 --cpus-per-task={resources.cpus_per_task}"
        start.insert(0, f"{resources.mpi} {step} --kill-on-bad-exit=0 --wait=0")  # the launchers end together
    if not BIG:
        start.insert(0, "OMP_NUM_THREADS=1 MKL_NUM_THREADS=1")
    return " ".join(start)


def told(path, category):
    """An output that `snakemake --report` shows, with `caption` below it."""
    return report(path, caption="../report/caption.rst", category=category)


def caption(wildcards, output):
    """For params: what stands below a figure, or a whole table in words once there is one.

    Free: Snakemake leaves params that ask for `output` out of its comparison too.
    """
    made = Path(output[0])
    words = made.with_suffix(".md")
    return LEGENDS.get(made.stem) or (words.read_text(encoding="utf-8") if words.is_file() else "")


def students(media):
    """The students of a medium, METHOD-SEED."""
    if media not in MEDIA:
        return []
    methods = config["methods"] if media == "images" or config["clips"] == "all" else [config["clips"]]
    return [f"{method}-{seed}" for method in methods for seed in config["seeds"]]


def models(media):
    """What a table compares: the teacher and the students at each number of steps, MODEL-STEPS."""
    steps = tree(f"experiment={SCALE}-{media}", *config["overrides"])["teacher"]["steps"]
    return [f"teacher-{steps}", *(f"{student}-{k}" for student in students(media) for k in config["steps"])]


FIRST = tree(f"experiment={SCALE}-{MEDIA[0]}", *config["overrides"])
CHECKPOINTS = {name: entry["source"] for name, entry in FIRST["checkpoints"].items() if entry}
BIG = FIRST["codec"]["kind"] != "cells"  # a scale of real models
ENCODED = "text" in CHECKPOINTS  # by an encoder that has weights, before the prompts are used


SCORER = FIRST["evaluation"]["scorer"]  # the same for all media of a scale
ENDING = "jsonl" if SCORER == "geneval-mmdet" else "json"  # of an official evaluator's results


def sized(tiny, big):
    """A resource of a rule, at the scale tiny and at those of real models (one sample at 480p, 14B at most)."""
    return big if BIG else tiny


def fetched(name):
    """Where a download goes, for rules with the wildcard media."""
    return stored(SCALE, "{media}", name, CHECKPOINTS[name])


def source(name):
    """For input: the files that a download is made of, where they are on this machine."""
    return lambda wildcards: files_here(composed(wildcards)["checkpoints"][name]["source"])


def of_medium(pattern, name):
    """A pattern of log or benchmark files of a download, with the medium where it has one."""
    return pattern.format(f"{{media}}-{name}" if "{media}" in fetched(name) else name)


def prompt_file(wildcards):
    """The downloaded file that a suite takes its prompts from; none where they are drawn."""
    name = composed(wildcards)["suites"][wildcards.suite].get("file")
    return fetched(name) if name else []


def of_vbench(wildcards, name):
    """A file that VBench's prompts come with, for the suite that it scores; none for other suites and prompts."""
    listed = prompt_file(wildcards) and wildcards.suite == "report" and name in CHECKPOINTS
    return fetched(name) if listed else []


def texts(suite):
    """The encoded prompts of a suite, for rules with the wildcard media; none where nothing is encoded."""
    return f"<data>/{{media}}/text/{suite}/1-of-1.safetensors" if ENCODED else []


def texts_of_shard(wildcards):
    """The part of the encoded training prompts that holds those of a shard; none where nothing is encoded."""
    number, parts = int(wildcards.scatteritem.partition("-")[0]), config["scatter"]["embed"]
    return f"<data>/{{media}}/text/train/{(number - 1) % parts + 1}-of-{parts}.safetensors" if ENCODED else []


def encoded(wildcards, input):
    """For params: the option that names encoded prompts."""
    return f"--text {input.text}" if input.text else ""


def scores(media, kind="models"):
    """Score files of the models, or of the controls."""
    names = (
        []
        if media not in MEDIA
        else models(media) if kind == "models" else [f"{control}-0" for control in config["controls"]]
    )
    return [f"<results>/{media}/scores/{name}.json" for name in names]


def parts(kind, suite):
    """What there is of a model's parts of a suite, `samples` or `measured`, for rules with the wildcards media, model."""
    ending = {"samples": "", "measured": ".jsonl"}[kind]
    folder = {"samples": "<data>", "measured": "<results>"}[kind]
    pattern = f"{folder}/{{media}}/{kind}/{{model}}/{suite}/{{scatteritem}}{ending}"
    return getattr(gather, suite)(pattern, allow_missing=True)


def elsewhere(python, needs):
    """For shell: say in one sentence where an environment of Snakemake's lacks, `needs` being a module of it."""
    return (
        f'"${{{{CONDA_PREFIX:-}}}}/bin/python" -c "import {needs}" || {{{{ echo "{python}: error: {needs} cannot be imported '
        f'here: call snakemake with --sdm conda, which makes its environment from workflow/envs/"; exit 1; }}}}; '
    )


def environment(name):
    """For params: a digest of workflow/envs/NAME.yaml and of the script that Snakemake runs after it, less comments."""
    file = Path(workflow.source_path(f"../envs/{name}.yaml"))
    script = file.with_suffix(".post-deploy.sh")
    lines = script.read_text(encoding="utf-8").splitlines() if script.exists() else []
    steps = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return sha256_json([yaml.safe_load(file.read_text(encoding="utf-8")), steps])[:16]


def by(*scorers):
    """Whether one of these scores what there is."""
    return SCORER in scorers


def given(wildcards, input):
    """For params: each named input that there is as an option of its name."""
    return " ".join(f"--{name} {files}" for name, files in input.items() if files)


def weights(suite):
    """The weights that look at the samples of a suite, NAME: FILE."""
    return {name: fetched(name) for name in WEIGHTS[subject(SCORER, suite)]}


def texts_read(media):
    """Scores of the small text of a medium's models."""
    return [f"<results>/{media}/text/{name}.json" for name in models(media)]


def throughputs(media):
    """How fast the models of a medium sample."""
    return [f"<results>/{media}/throughput/{name}.json" for name in models(media)] if media in MEDIA else []


def ablation(*methods, steps):
    """Scores of the teacher and of the first students by some methods, and these students' metrics."""
    media, names = MEDIA[0], [f"{method}-{config['seeds'][0]}" for method in methods]
    scored = [models(media)[0], *(f"{name}-{k}" for name in names for k in steps)]
    return [
        *(f"<results>/{media}/scores/{name}.json" for name in scored),
        *(f"<data>/{media}/{name}/metrics.jsonl" for name in names),
    ]


def most_steps():
    """The number of steps at which objectives are compared."""
    return max([steps for steps in config["steps"] if steps <= 4] or config["steps"])


def samples(media):
    """Folders of samples of the models, suite `report`."""
    pattern = gather.report("<data>/{media}/samples/{model}/report/{scatteritem}", allow_missing=True)
    return expand(pattern, media=media, model=models(media))


def precisions():
    """Files of rounding errors: of the teacher, and of rCM's first student where there is one."""
    rcm = [f"rcm-{seed}" for seed in config["seeds"] if f"rcm-{seed}" in students(MEDIA[0])]
    return [f"<results>/{MEDIA[0]}/precision/{name}.json" for name in ["teacher", *rcm[:1]]]
