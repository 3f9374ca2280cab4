# The configuration, checked, and what a rule asks of it.
import json
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
    scales = sorted({name.rpartition("-")[0] for name in options("experiment")})
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


def check_steps():
    """Every number of steps needs its sampler times; composes the trees, so that a mistake there shows at once."""
    for media in ("images", "clips"):
        times = 1 + len(tree(f"experiment={config['scale']}-{media}", *config["overrides"])["sampler"]["mid_times"])
        if max(config["steps"]) > times:
            raise UserError(
                f"configuration key 'steps' is {config['steps']}; allowed: up to {times} steps for {media}, "
                "one more than sampler.mid_times has entries"
            )


config.update(plain(config))
try:
    check_pipeline()
    check_steps()
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
    "distill": (
        *("media", "frames", "network", "codec", "text", "seed", "objective", "distillation"),
        *("sampler", "prompts", "suites.dev.seed"),
    ),
    "export": ("media", "frames", "network", "codec", "text", "seed", "objective", "sampler"),
    "sample student": ("frames", "codec", "suites.{suite}", "evaluation.batch"),
    "sample teacher": ("frames", "network", "codec", "text", "teacher", "suites.{suite}", "evaluation.batch"),
    "sample control": ("frames", "codec", "suites.{suite}", "evaluation.batch"),
    "evaluate": ("media", "evaluation.bootstrap", "evaluation.confidence"),
    "table": ("evaluation.oracle_at_least", "evaluation.floor_at_most"),
    "report": ("",),
}


def values(stage, wildcards, words):
    composed = tree(*chosen(wildcards), *words)
    keys = [key.format(**wildcards) for key in READS[stage]]
    return json.dumps({key: part(composed, key) for key in keys}, sort_keys=True)


def numbers(stage, **fixed):
    """For params: the values that a stage reads, as JSON; `fixed` stands for wildcards that its files do not have."""
    return lambda wildcards: values(stage, {**wildcards, **fixed}, config["overrides"])


def overrides(stage, **fixed):
    """For params: overrides for a stage's command line: what its wildcards choose, and of `overrides` what it reads."""

    def matters(word, wildcards):
        others = [other for other in config["overrides"] if other != word]
        try:
            return values(stage, wildcards, others) != values(stage, wildcards, config["overrides"])
        except UserError:  # the others need this one
            return True

    def words(wildcards):
        known = {**wildcards, **fixed}
        return shlex.join([*chosen(known), *(word for word in config["overrides"] if matters(word, known))])

    return words


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
