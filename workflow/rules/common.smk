# The configuration, checked, and what a rule asks of it.
import json
import math
import os
import shlex
import sys
from functools import cache
from pathlib import Path

try:
    from rcm.artefact import UserError
    from rcm.cli.config import compose, options, read_schema, validate
    from rcm.cli.sources import code_digest
except ImportError as error:
    sys.exit(
        f"snakemake: error: {error}: {sys.executable} lacks this project; use .venv/bin/snakemake after `make setup`"
    )

# every rule calls the interpreter that runs Snakemake
shell.prefix(f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH; ")


def plain(value):
    """The configuration with the numbers in lists of the command line, which Snakemake takes for texts, as numbers."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def check_pipeline():
    """Check config/pipeline.yaml with what the command line changed in it."""
    validate(config, read_schema(Path(workflow.source_path("../schemas/pipeline.schema.json"))))
    scales = sorted({name.rpartition("-")[0] for name in options("experiment") if name.endswith(("-images", "-clips"))})
    if config["scale"] not in scales:
        raise UserError(
            f"configuration key 'scale' is {json.dumps(config['scale'])}; allowed: the scales that have experiments "
            f"in config/experiment/, {', '.join(scales)}"
        )
    clips = {"table2", "figure_clips"} & {*config["tables"], *config["figures"]}
    if clips and config["clips"] not in ("all", *config["methods"]):
        raise UserError(
            f"configuration key 'clips' is {json.dumps(config['clips'])}; allowed: all, or one of methods "
            f"({', '.join(config['methods'])}); or leave out {' and '.join(sorted(clips))}"
        )
    lacking = {"oracle", "shuffled"} - {*config["controls"]}
    if config["tables"] and lacking:
        raise UserError(
            f"configuration key 'controls' is {json.dumps(config['controls'])}; allowed where tables are built: lists "
            f"with oracle and shuffled, by which a table is trusted or refused; missing: {', '.join(sorted(lacking))}"
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


def check_trees():
    """Compose the tree of every medium and method, so that a mistake there shows at once, and compare it with steps."""
    for media in ("images", "clips"):
        experiment = f"experiment={config['scale']}-{media}"
        for objective in ("", *(f"objective={method}" for method in config["methods"])):
            composed = tree(*filter(None, (experiment, objective)), *config["overrides"])
        times = 1 + len(composed["sampler"]["mid_times"])
        if max(config["steps"]) > times:
            raise UserError(
                f"configuration key 'steps' is {config['steps']}; allowed: up to {times} steps for {media}, "
                "one more than sampler.mid_times has entries"
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
    check_trees()
except UserError as mistake:
    sys.exit(f"snakemake: error: {mistake}")  # where WorkflowError would add the lines of this file
SCALE = config["scale"]


def part(node, key):
    """The value at a dotted key; the whole tree at the empty one."""
    for name in filter(None, key.split(".")):
        node = node[name]
    return node


def chosen(wildcards):
    """The Hydra overrides that a job's wildcards stand for."""
    groups = {"objective": "method", "seed": "seed", "suite": "suite"}
    picked = [f"{key}={wildcards[name]}" for key, name in groups.items() if name in wildcards]
    return [f"experiment={SCALE}-{wildcards.get('media', 'images')}", *picked]


# The sections of the configuration that decide what a stage makes; it is made again when a value in them changes.
READS = {
    "prompts": ("media", "prompts", "suites.{suite}"),
    "download transformer": ("checkpoints.transformer",),
    "download codec": ("checkpoints.codec",),
    "pretrain": ("media", "frames", "network", "codec", "text", "prompts", "pretrain"),
    "convert": ("network",),
    "synthesize": ("frames", "network", "codec", "text", "teacher", "suites.train", "evaluation.batch"),
    # previews, which read more, are not worth another training
    "distill": ("media", "frames", "network", "codec", "text", "seed", "objective", "distillation", "parallel"),
    "export": ("media", "frames", "network", "codec", "text", "seed", "objective", "sampler"),
    "sample student": ("frames", "codec", "suites.{suite}", "evaluation.batch"),
    "sample teacher": ("frames", "network", "codec", "text", "teacher", "suites.{suite}", "evaluation.batch"),
    "sample control": ("frames", "codec", "suites.{suite}", "evaluation.batch"),
    "evaluate": ("media", "evaluation.bootstrap"),
    "precision": ("frames", "network", "codec", "text", "teacher", "suites.{suite}.seed", "evaluation.precision"),
    "table": ("evaluation.oracle_at_least", "evaluation.floor_at_most"),
    "report": ("",),
}
# ... except for these, which change no weights
FREE = {
    "distill": {
        "distillation": ("state_every", "preview_every", "profile", "wandb"),
        "parallel": (
            *("device", "replicate", "shard", "context", "recompute", "tangent_pass", "micro_batch"),
            *("offload_teacher", "compile", "workers", "timeout"),
        ),
    }
}


def numbers(stage, **fixed):
    """For params: the values that a stage reads, as JSON; `fixed` stands for wildcards that its files do not have."""

    def values(wildcards):
        known = {**wildcards, **fixed}
        composed = tree(*chosen(known), *config["overrides"])
        read = {key: part(composed, key) for key in (key.format(**known) for key in READS[stage])}
        for key, free in FREE.get(stage, {}).items():
            read[key] = {name: value for name, value in read[key].items() if name not in free}
        return json.dumps(read, sort_keys=True)

    return values


def overrides(stage, **fixed):
    """For params: the overrides on a stage's command line, what its wildcards choose and those of the user.

    What they change is in `numbers`; Snakemake leaves params that ask for `threads` out of its comparison.
    """
    return lambda wildcards, threads: shlex.join([*chosen({**wildcards, **fixed}), *config["overrides"]])


def launcher(wildcards, threads):
    """For params: how a distillation starts, on each of its threads a process with one thread; as `overrides`, free.

    Rounded weights need a launcher even for one process: master weights are FSDP's.
    """
    precision = tree(*chosen(wildcards), *config["overrides"])["parallel"]["precision"]
    if threads == 1 and precision == "float32":
        return "python -m rcm"
    environment = "OMP_NUM_THREADS=1 MKL_NUM_THREADS=1"
    return f"{environment} python -m rcm.launch --standalone --nproc-per-node {threads} -m rcm"


def students(media):
    """The students of a medium, METHOD-SEED."""
    methods = config["methods"] if media == "images" or config["clips"] == "all" else [config["clips"]]
    return [f"{method}-{seed}" for method in methods for seed in config["seeds"]]


def models(media):
    """What a table compares: the teacher and the students at each number of steps, MODEL-STEPS."""
    steps = tree(f"experiment={SCALE}-{media}", *config["overrides"])["teacher"]["steps"]
    return [f"teacher-{steps}", *(f"{student}-{k}" for student in students(media) for k in config["steps"])]


def scores(media, kind="models"):
    """Score files of the models, or of the controls."""
    names = models(media) if kind == "models" else [f"{control}-0" for control in config["controls"]]
    return [f"<results>/{media}/scores/{name}.json" for name in names]


def samples(media):
    """Folders of samples of the models, suite `report`."""
    pattern = gather.report("<data>/{media}/samples/{model}/report/{scatteritem}", allow_missing=True)
    return expand(pattern, media=media, model=models(media))


def precisions():
    """Files of rounding errors: of the teacher, and of rCM's first student where there is one."""
    names = ["teacher", *(name for name in students("images") if name.startswith("rcm-"))][:2]
    return [f"<results>/images/precision/{name}.json" for name in names]
