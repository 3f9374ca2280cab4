"""The stages of the command line, their options and their help; imports nothing heavy."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rcm.artefact import UserError
from rcm.cli import evaluators


def place(text: str) -> Path:
    """A file or folder, which has a name: "." gets that of the folder."""
    path = Path(text) if Path(text).name else Path(text).absolute()
    if not path.name:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a file nor a folder of one's own")
    return path


@dataclass(frozen=True)
class Option:
    """One option of a stage; `repeat` takes one or more values, kind `bool` none: it is a switch."""

    name: str
    help: str
    kind: Callable[[str], Any] = place
    required: bool = True
    default: Any = None
    repeat: bool = False
    choices: Sequence[str] | None = None
    group: str = ""  # the heading in the help under which it stands


@dataclass(frozen=True)
class Stage:
    """One stage: where its function lives (`module:function`), what it does, its options and an example."""

    where: str
    summary: str
    options: tuple[Option, ...]
    example: str
    overrides: str = ""  # the keys of the configuration that matter most; empty: the stage takes no overrides
    exclusive: tuple[str, ...] = field(default=())  # options of which exactly one must be given
    more: tuple[str, ...] = field(default=())  # further examples


def part(text: str) -> str:
    """`K-of-N`, checked."""
    number, separator, count = text.partition("-of-")
    if not (separator and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; expected something like 1-of-4")
    return text


def natural(text: str) -> int:
    """An integer that is not negative."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return value


def counted(text: str) -> int:
    """An integer of at least 1."""
    value = natural(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return value


def pixels(text: str) -> tuple[int, int]:
    """Width and height of "832x480"."""
    width, separator, height = text.partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected something like 832x480")
    return int(width), int(height)


def positive(text: str) -> float:
    """A number above 0."""
    if not 0 < (value := _number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def scale(text: str) -> float:
    """A number of 0 or more."""
    if not 0 <= (value := _number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return value


def fraction(text: str) -> float:
    """A number between 0 and 1."""
    if not 0 < (value := _number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def size(text: str) -> float:
    """Bytes of "80GiB", "80GB" or "80e9"."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "": 1}
    unit = next(unit for unit in units if text.endswith(unit))
    try:
        return positive(text.removesuffix(unit)) * units[unit]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected something like 80GiB") from None


def weights(text: str) -> tuple[str, Path]:
    """One of `evaluators.ALL` and where it is, of "NAME=PATH"."""
    name, separator, path = text.partition("=")
    if not (separator and path and name in evaluators.ALL):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=PATH with a NAME of {', '.join(evaluators.ALL)}")
    return name, Path(path)


class _Named(argparse.Action):
    """Pairs of name and value as a dict; a name that stands twice is a mistake."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        found = dict(getattr(namespace, self.dest) or {})
        for name, value in values:
            if name in found:
                parser.error(f"argument {self.option_strings[0]}: {name} stands there twice")
            found[name] = value
        setattr(namespace, self.dest, found)


EXPERIMENT = "experiment=tiny-images|tiny-clips"
DTYPE = Option(
    "--dtype", "data type of the weights written", str, False, "keep", choices=("keep", "float32", "bfloat16")
)
EVALUATORS = Option(
    "--weights",
    f"weights of what looks at the samples, NAME=PATH ...; the names are {', '.join(evaluators.ALL)}",
    weights,
    required=False,
    repeat=True,
)

STAGES: dict[str, Stage] = {
    "prompts": Stage(
        "rcm.cli.data:prompts",
        "Write a suite of prompts as JSON lines: captions with the facts they state (GenEval's), or those of a file.",
        (
            Option(
                "--source",
                "a prompt file in the place of drawn captions: .txt (one a line), .jsonl or .csv (`prompt`, `name`)",
                required=False,
            ),
            Option(
                "--names",
                "VBench: a file with the same prompts as samples are named by, where --source has longer ones",
                required=False,
            ),
            Option("--info", "VBench: VBench_full_info.json, which dimension asks what of a prompt", required=False),
            Option("--out", "the prompts, FILE.jsonl"),
        ),
        "rcm prompts experiment=tiny-images suite=report --out data/tiny/images/prompts/report.jsonl",
        overrides=f"{EXPERIMENT}  suite=train|dev|report|diversity|text",
    ),
    "download": Stage(
        "rcm.cli.checkpoints:download",
        "Fetch a checkpoint that the configuration names, verify it, and note what came in OUT.download.json.",
        (
            Option("--name", "which checkpoint of the configuration, such as transformer, codec or text", str),
            Option("--out", "where to put it: a file, or a folder where the source ends in a slash or has a *"),
        ),
        "rcm download --name transformer --out data/tiny/images/checkpoints/transformer.pth",
        overrides="experiment=NAME  checkpoints.NAME.source=PATH|http(s)://...|s3://BUCKET/KEY|hf://OWNER/REPO/PATH  "
        "checkpoints.NAME.sha256=HEX",
    ),
    "pretrain": Stage(
        "rcm.cli.train:pretrain",
        "Train the tiny teacher and its codec again from nothing (half an hour a medium on one core).",
        (
            Option("--out", "the transformer, FILE.pth"),
            Option("--codec-out", "the codec, FILE.pth"),
            Option("--codec", "a codec to train on, FILE.pth; otherwise one is fitted", required=False),
            Option("--resume", "folder of the unfinished state; a run that was killed goes on from it"),
        ),
        "rcm pretrain --out transformer.pth --codec-out codec.pth --resume resume/tiny/pretrain",
        overrides=EXPERIMENT,
    ),
    "convert": Stage(
        "rcm.cli.checkpoints:convert",
        "Convert a checkpoint to a DCP folder, the format of training, one tensor at a time.",
        (
            Option("--checkpoint", "the checkpoint: FILE.pth, FILE.safetensors, a folder of these, or a DCP folder"),
            Option(
                "--network",
                "the section of the configuration whose network it is",
                str,
                required=False,
                default="network",
                choices=("network", "synthesizer"),
            ),
            DTYPE,
            Option("--out", "the DCP folder"),
        ),
        "rcm convert --checkpoint data/tiny/images/checkpoints/transformer.pth --out data/tiny/images/teacher",
        overrides=EXPERIMENT,
    ),
    "embed": Stage(
        "rcm.cli.embed:embed",
        "Encode prompts, the empty and the negative ones included, so that no other stage needs the text encoder.",
        (
            Option("--prompts", "the prompts, FILE.jsonl, .txt or .csv"),
            Option("--part", "which part of the prompts, such as 1-of-4; otherwise all", part, required=False),
            Option("--encoder", "the weights of the text encoder, a checkpoint, where it has any", required=False),
            Option("--tokenizer", "folder of its tokenizer.json, where it has weights", required=False),
            Option("--out", "the embeddings, FILE.safetensors"),
        ),
        "rcm embed experiment=wan2.1-1.3b-clips --prompts data/wan/prompts/train.jsonl "
        "--encoder data/wan/checkpoints/models_t5_umt5-xxl-enc-bf16.pth --tokenizer data/wan/checkpoints/umt5-xxl "
        "--out data/wan/text/train.safetensors",
        overrides="experiment=NAME  inference.device=cpu|cuda|auto  inference.precision=float32|bfloat16",
    ),
    "synthesize": Stage(
        "rcm.cli.data:synthesize",
        "Let the teacher sample one shard of the training prompts; a run that was killed goes on where it was.",
        (
            Option("--teacher", "the teacher, a DCP folder"),
            Option("--prompts", "the training prompts, FILE.jsonl"),
            Option("--text", "the same, encoded by `rcm embed`, FILE.safetensors", required=False),
            Option("--shard", "which part of the prompts, such as 1-of-4", part),
            Option("--out", "the shard, FILE.tar; its manifest is written beside it as FILE.tar.json"),
        ),
        "rcm synthesize --teacher data/tiny/images/teacher --prompts data/tiny/images/prompts/train.jsonl "
        "--shard 1-of-4 --out data/tiny/images/shards/1-of-4.tar",
        overrides=f"{EXPERIMENT}  suites.train.seed=N  synthesis.guidance=S  inference.batch=N",
    ),
    "adopt": Stage(
        "rcm.cli.shards:adopt",
        "Make shards of the published data set's tars (.latent.pt, .embed.pt, .prompt.txt), or of such of your own.",
        (
            Option("--data", "the tars of the data set, FILE.tar ...", repeat=True),
            Option("--name", "what the data set is called; otherwise as the folder of the tars", str, required=False),
            Option("--seed", "seed of its first sample", natural, required=False, default=0),
            Option("--shard", "which part of the tars, such as 1-of-4", part, required=False, default="1-of-1"),
            Option("--out-dir", "the folder of the shards, one a tar, with their manifests"),
        ),
        "rcm adopt --data wan/Wan2.1_14B_480p_16:9_Euler-step100_shift-3.0_cfg-5.0_seed-0_250K/shard_*.tar "
        "--out-dir data/wan2.1-1.3b/clips/shards",
    ),
    "verify": Stage(
        "rcm.cli.shards:verify",
        "Check all shards of a set against their manifests, and say what they hold and where they are from.",
        (
            Option("--data", "the shards, FILE.tar ...", repeat=True),
            Option("--samples", "also each sample: its hash, and numbers that cannot be latents", bool, required=False),
        ),
        "rcm verify --data data/tiny/images/shards/*.tar --samples",
    ),
    "merge": Stage(
        "rcm.cli.shards:merge",
        "Make one set of shards of several, or cut a set into another number of shards.",
        (
            Option("--data", "the shards, FILE.tar ...", repeat=True),
            Option("--shards", "how many shards the new set has", natural),
            Option("--mixed", "also where their origins differ, which the manifests then list", bool, required=False),
            Option("--renumber", "also where samples are missing, numbering the others anew", bool, required=False),
            Option("--out-dir", "the folder of the new shards; must be empty"),
        ),
        "rcm merge --data data/one/*.tar data/two/*.tar --mixed --shards 4 --out-dir data/both",
    ),
    "contact-sheet": Stage(
        "rcm.cli.shards:contact_sheet",
        "Show samples of shards: a frame at the beginning and one in the middle, with prompt and seed.",
        (
            Option("--data", "the shards, or some of them, FILE.tar ...", repeat=True),
            Option("--codec", "the codec that decodes them, FILE.pth"),
            Option("--count", "how many samples, evenly spread", natural, required=False, default=24),
            Option("--out", "the sheet, FILE.png, or FILE.html with the whole prompts"),
        ),
        "rcm contact-sheet --data data/tiny/images/shards/*.tar --codec data/tiny/checkpoints/codec.pth "
        "--out sheet.png",
        overrides="experiment=NAME  inference.device=cpu|cuda|auto",
    ),
    "plan": Stage(
        "rcm.cli.plan:plan",
        "Say which settings of a distillation fit a cluster, what they need and how long they take.",
        (
            Option("--gpus", "GPUs of the run, one process each", natural),
            Option("--gpus-per-node", "GPUs of a machine, or all where there are fewer", natural, False, 8),
            Option("--memory", "memory of a GPU, such as 80GiB", size, False, "80GiB"),
            Option("--tflops", "peak of a GPU in the data type of the passes, TFLOP/s", positive, False, 989.0),
            Option("--utilisation", "expected share of that peak", positive, False, 0.4),
            Option("--node-bandwidth", "of a GPU inside a machine, GB/s a direction", positive, False, 450.0),
            Option("--network-bandwidth", "of a GPU between machines, GB/s a direction", positive, False, 50.0),
            Option("--count", "how many settings are listed", natural, False, 8),
            Option("--json", "all of them with their details, FILE.json", required=False),
        ),
        "rcm plan experiment=wan2.1-14b-clips --gpus 32 --memory 80GiB",
        overrides="experiment=NAME  objective=NAME  parallel.KEY=VALUE (taken as given, the others are proposed)",
    ),
    "distill": Stage(
        "rcm.cli.train:distill",
        "Distil the teacher into a few-step student; a run that was killed goes on where it was.",
        (
            Option("--teacher", "the teacher, a DCP folder"),
            Option("--data", "the shards of latents, FILE.tar ...", repeat=True),
            Option("--codec", "the codec that decodes the previews, FILE.pth"),
            Option("--resume", "folder of the unfinished state"),
            Option("--text", "the prompts of the previews, encoded by `rcm embed`, FILE.safetensors", required=False),
            Option("--out", "the student, averaged over the training, a DCP folder"),
            Option("--raw", "the student as the last step left it, a DCP folder", required=False),
            Option("--metrics", "one line a step, FILE.jsonl"),
            Option("--previews", "folder of sample grids, made during training (until its end under --resume)"),
        ),
        "rcm distill objective=rcm seed=0 --teacher data/tiny/images/teacher --data data/tiny/images/shards/*.tar "
        "--codec data/tiny/checkpoints/codec.pth --resume resume/rcm-0 --out student/dcp "
        "--metrics student/metrics.jsonl --previews student/previews",
        overrides=f"{EXPERIMENT}  objective=scm|dcm|meanflow|dmd|dmd2|rcm  seed=N",
    ),
    "export": Stage(
        "rcm.cli.checkpoints:export",
        "Export a student with its sampler's settings, as .safetensors, and beside it as .pth or in diffusers' layout.",
        (
            Option("--student", "the student, a DCP folder, of averaged weights or of raw ones"),
            Option(
                "--format",
                "what to write: FILE.safetensors, FILE.pth, the folder FILE.diffusers (default: the first two)",
                str,
                required=False,
                repeat=True,
                choices=("safetensors", "pth", "diffusers"),
            ),
            DTYPE,
            Option("--out", "the export, FILE.safetensors"),
        ),
        "rcm export objective=rcm --student student/dcp --out student/student.safetensors",
        overrides=f"{EXPERIMENT}  objective=scm|dcm|meanflow|dmd|dmd2|rcm  seed=N",
    ),
    "sample": Stage(
        "rcm.cli.sample:sample",
        "Sample pictures or clips for a suite of prompts from a student, the teacher, or a control.",
        (
            Option("--checkpoint", "a student (FILE.safetensors) or the teacher (DCP folder)", required=False),
            Option(
                "--control",
                "instead of a model: ground truth, ground truth through the codec, or ground truth of another prompt",
                str,
                required=False,
                choices=("oracle", "codec", "shuffled"),
            ),
            Option("--codec", "the codec, FILE.pth"),
            Option("--prompts", "the prompts, FILE.jsonl"),
            Option("--text", "the same, encoded by `rcm embed`, FILE.safetensors", required=False),
            Option("--steps", "sampling steps; of a student 1 or more, ignored for controls", natural),
            Option("--part", "which part of the prompts, such as 1-of-2", part),
            Option("--out", "the folder of samples, in GenEval's layout"),
        ),
        "rcm sample suite=report --checkpoint student/student.safetensors --codec data/tiny/checkpoints/codec.pth "
        "--prompts data/tiny/images/prompts/report.jsonl --steps 4 --part 1-of-2 --out samples/1-of-2",
        overrides=f"{EXPERIMENT}  suite=report|diversity|text|dev",
        exclusive=("--checkpoint", "--control"),
    ),
    "measure": Stage(
        "rcm.cli.measure:measure",
        "Let an evaluator's models look at samples and store what they see; nothing is judged here.",
        (
            Option("--samples", "folders of samples, in GenEval's layout", repeat=True),
            EVALUATORS,
            Option("--out", "a line a sample, or a prompt, FILE.jsonl"),
        ),
        "rcm measure experiment=cosmos-predict2-2b-images suite=report --samples samples/report/1-of-8 "
        "--weights detector=checkpoints/detector clip_large=checkpoints/clip_large --out measured/report/1-of-8.jsonl",
        overrides="experiment=NAME  suite=report|diversity|text  evaluation.scorer=NAME  inference.device=cpu|cuda",
    ),
    "arrange": Stage(
        "rcm.cli.arrange:arrange",
        "Lay samples out as an official evaluator wants them: GenEval's folders, VBench's files named by the prompt.",
        (
            Option("--samples", "folders of samples of the report suite", repeat=True),
            Option("--out", "the folder of the evaluator: links to the samples, or copies"),
        ),
        "rcm arrange experiment=wan2.1-1.3b-clips --samples samples/report/1-of-2 samples/report/2-of-2 --out official",
        overrides="experiment=NAME  evaluation.scorer=geneval-mmdet|vbench|vbench-long",
    ),
    "evaluate": Stage(
        "rcm.cli.score:evaluate",
        "Score one model: ShapeEval and ShapeBench, GenEval, VBench or small text, and diversity, with intervals.",
        (
            Option(
                "--samples",
                "shapes: folders of samples of the report suite; geneval-mask2former: the same, to be measured first",
                required=False,
                repeat=True,
            ),
            Option(
                "--measured", "what `rcm measure` stored of that suite, FILE.jsonl ...", required=False, repeat=True
            ),
            Option(
                "--official",
                "results of the official evaluator: GenEval's results.jsonl, VBench's eval_results.json",
                required=False,
            ),
            Option(
                "--diversity",
                "of the diversity suite: folders of samples (shapes), or what `rcm measure` stored, FILE.jsonl ...",
                required=False,
                repeat=True,
            ),
            Option(
                "--prompts", "the prompts of the suite, FILE.jsonl, by which missing samples are found", required=False
            ),
            EVALUATORS,
            Option("--out", "the scores, MODEL-STEPS.json such as rcm-0-4.json"),
            Option("--results", "one line a sample with the verdict and its reason, FILE.jsonl"),
            Option(
                "--metrics", "the few values that one would compare first, FILE.json, for dvc metrics", required=False
            ),
        ),
        "rcm evaluate --samples samples/report/1-of-2 samples/report/2-of-2 --diversity samples/diversity/1-of-1 "
        "--out scores/rcm-0-4.json --results scores/rcm-0-4.results.jsonl",
        overrides=f"{EXPERIMENT}  suite=report|text  evaluation.scorer=NAME  evaluation.allow_missing=true|false",
        more=(
            "rcm evaluate experiment=cosmos-predict2-2b-images --measured measured/report/*.jsonl "
            "--prompts prompts/report.jsonl --out scores/rcm-0-4.json --results scores/rcm-0-4.results.jsonl",
            "rcm evaluate experiment=cosmos-predict2-2b-images evaluation.scorer=geneval-mmdet --official seen.jsonl "
            "--out scores/rcm-0-4.json --results scores/rcm-0-4.results.jsonl",
        ),
    ),
    "throughput": Stage(
        "rcm.cli.throughput:throughput",
        "Time samples one by one, sampling and decoding: frames per second, as in table 2 of the paper.",
        (
            Option("--checkpoint", "a student (FILE.safetensors) or the teacher (DCP folder)"),
            Option("--codec", "the codec, FILE.pth"),
            Option("--prompts", "the prompts, FILE.jsonl"),
            Option("--text", "the same, encoded by `rcm embed`, FILE.safetensors", required=False),
            Option("--steps", "sampling steps, 1 or more", counted),
            Option("--out", "the times, MODEL-STEPS.json such as rcm-0-4.json"),
        ),
        "rcm throughput experiment=tiny-clips --checkpoint student/student.safetensors "
        "--codec data/tiny/checkpoints/codec.pth --prompts data/tiny/clips/prompts/report.jsonl --steps 4 "
        "--out throughput/rcm-0-4.json",
        overrides=f"{EXPERIMENT}  evaluation.throughput=N  inference.device=cpu|cuda|auto",
    ),
    "precision": Stage(
        "rcm.cli.precision:precision",
        "Measure how much bfloat16 rounds in a network and in its tangent, against float64 (figure 11 of the paper).",
        (
            Option("--checkpoint", "a student (FILE.safetensors) or the teacher (DCP folder)"),
            Option("--teacher", "the teacher, a DCP folder, whose samples and directions are used"),
            Option("--prompts", "the prompts, FILE.jsonl"),
            Option("--text", "the same, encoded by `rcm embed`, FILE.safetensors", required=False),
            Option("--out", "the errors at each time, MODEL.json such as rcm-0.json"),
        ),
        "rcm precision suite=dev --checkpoint student/student.safetensors --teacher data/tiny/images/teacher "
        "--prompts data/tiny/images/prompts/dev.jsonl --out results/tiny/images/precision/rcm-0.json",
        overrides=f"{EXPERIMENT}  evaluation.precision.times=N  evaluation.precision.samples=N",
    ),
    "table": Stage(
        "rcm.cli.score:table",
        "Make a table from scores as CSV, Markdown and LaTeX; refuses when the controls fail.",
        (
            Option("--name", "which table", str, choices=("table1", "table2", "table3", "table_text")),
            Option("--scores", "the scores of the models, FILE.json ...", required=False, repeat=True),
            Option("--controls", "the scores of the controls, FILE.json ...", required=False, repeat=True),
            Option("--throughput", "times of `rcm throughput`, FILE.json ...", required=False, repeat=True),
            Option("--published", "the paper's rows, FILE.csv", required=False),
            Option("--out-dir", "folder of NAME.csv, NAME.md and NAME.tex"),
        ),
        "rcm table --name table1 --scores results/tiny/images/scores/{teacher-20,rcm-0-4}.json "
        "--controls results/tiny/images/scores/{oracle,codec,shuffled}-0.json --published config/published/table1.csv "
        "--out-dir results/tiny/tables",
        overrides="evaluation.oracle_at_least=SHARE  evaluation.floor_at_most=SHARE",
    ),
    "figure": Stage(
        "rcm.cli.score:figure",
        "Draw a figure from samples, scores or metrics.",
        (
            Option(
                "--name",
                "which figure",
                str,
                choices=(
                    *("figure_samples", "figure_clips", "figure_quality_diversity", "figure_steps", "figure_training"),
                    *("figure_precision", "figure_lambda", "figure_rollout"),
                ),
            ),
            Option(
                "--inputs",
                "sample folders, or files of scores, metrics or rounding errors, as the figure needs",
                repeat=True,
            ),
            Option("--published", "the paper's numbers for figure_lambda or figure_steps, FILE.csv", required=False),
            Option("--out", "the figure, FILE.png"),
        ),
        "rcm figure --name figure_training --inputs data/tiny/images/rcm-0/metrics.jsonl --out figure_training.png",
    ),
    "report": Stage(
        "rcm.cli.score:report",
        "Gather tables, figures, clips, configuration, wall times and provenance in one self-contained HTML page.",
        (
            Option("--scores", "the scores to report on, FILE.json ...", required=False, repeat=True),
            Option("--results", "folders with tables, figures, samples, provenance and benchmarks", repeat=True),
            Option("--out", "the page, FILE.html"),
        ),
        "rcm report --scores results/tiny/{images,clips}/scores/{teacher-20,rcm-0-4,oracle-0}.json "
        "--results results/tiny data/tiny logs/tiny --out results/tiny/report.html",
        overrides=EXPERIMENT,
    ),
    "generate": Stage(
        "rcm.cli.generate:generate",
        "Make images or clips from prompts, and from an image where the model takes one, with a student or a teacher.",
        (
            Option("--prompt", "what to show; empty: whatever the model likes", str),
            Option("--prompts", "a file of prompts: .txt, a line each, .jsonl or .csv"),
            Option(
                "--out",
                "the output; its suffix decides: .png (animated for clips), .gif, .mp4 or .npy. Several samples: a "
                "grid, a row a prompt, and beside it each as NAME-0, NAME-1, ... along the rows. The settings are in "
                "the comment of the file",
            ),
            Option("--samples", "samples of each prompt", counted, False, 1),
            Option(
                "--seed",
                "seed of the noise; sample s of prompt p of a file has the noise that it has in `rcm sample`",
                *(natural, False, 0),
            ),
            Option(
                "--model",
                "a scale, such as wan2.1-1.3b, or one of config/model/, such as wan2.1-1.3b-rcm: its settings, "
                "where the checkpoint has none, and where its files are (default: tiny)",
                str,
                False,
                group="model",
            ),
            Option("--teacher", "the checkpoint is a teacher, many steps with guidance", bool, False, group="model"),
            Option(
                "--download", "fetch and verify the files of the model below data/ first", bool, False, group="model"
            ),
            Option(
                "--checkpoint",
                "an export of `rcm export`, or with --model any file or folder of the network "
                "(default: the student, or teacher, of the model below data/)",
                required=False,
                group="model",
            ),
            Option("--second-checkpoint", "Wan2.2: the expert of low noise", required=False, group="model"),
            Option(
                "--boundary",
                "Wan2.2: the time (0 to 1) below which it is used (default: 0.9)",
                fraction,
                False,
                group="model",
            ),
            Option(
                "--codec",
                "the codec (this and the following by default: the model's downloads below data/)",
                required=False,
                group="model",
            ),
            Option("--text-encoder", "the weights of the text encoder", required=False, group="model"),
            Option("--tokenizer", "folder of its tokenizer.json", required=False, group="model"),
            Option(
                "--text",
                "instead of both: the prompts (and the negative one) encoded by `rcm embed`",
                required=False,
                group="model",
            ),
            Option("--vision", "Wan2.1 I2V: the weights of the image encoder", required=False, group="model"),
            Option(
                "--steps",
                "sampling steps (default: 4 of a student, those of the model's settings of a teacher)",
                natural,
                False,
                group="sampling",
            ),
            Option(
                "--sigma-max",
                "noise level of the first step; more: less diverse (default: the model's)",
                positive,
                False,
                group="sampling",
            ),
            Option(
                "--ode",
                "students: no fresh noise between the steps; sharper but less robust, for I2V",
                bool,
                False,
                group="sampling",
            ),
            Option(
                "--guidance",
                "teachers: scale of the guidance; none at 1 of Wan's, at 0 of Cosmos', which is Wan's less 1",
                scale,
                False,
                group="sampling",
            ),
            Option(
                "--shift",
                "teachers: shift of the times; Wan2.1 I2V has 3 at 480p and 5 at 720p. The model's --sigma-max goes "
                "with it",
                positive,
                False,
                group="sampling",
            ),
            Option(
                "--negative-prompt",
                "teachers: what guidance leads away from (default: the model's)",
                str,
                False,
                group="sampling",
            ),
            Option(
                "--image",
                "I2V: the first frame, any image; RGB over white, upright, resized and cut about its "
                "centre to the size of the clip",
                required=False,
                group="size",
            ),
            Option(
                "--resolution",
                "Wan: 832x480 or 1280x720 at 16:9; Cosmos: 768x432 or 1360x768; of an image: as many "
                "pixels in its own aspect ratio",
                str,
                False,
                choices=("480p", "720p"),
                group="size",
            ),
            Option(
                "--aspect",
                "aspect ratio; an image is cut to it",
                str,
                False,
                choices=("16:9", "9:16", "1:1", "4:3", "3:4"),
                group="size",
            ),
            Option(
                "--size", "width and height in pixels, such as 832x480, instead of both", pixels, False, group="size"
            ),
            Option(
                "--frames", "frames of a clip, 1 + a multiple of 4 (default: the model's)", counted, False, group="size"
            ),
            Option(
                "--device",
                "where to compute; auto: cuda where there is one",
                str,
                False,
                "auto",
                choices=("auto", "cpu", "cuda"),
                group="speed",
            ),
            Option(
                "--precision",
                "of the networks; auto: bfloat16 on cuda, float32 on cpu",
                str,
                False,
                "auto",
                choices=("auto", "float32", "bfloat16"),
                group="speed",
            ),
            Option(
                "--benchmark",
                "say how many seconds a sample takes and how many frames per second that is, as table 2 "
                "of the paper: batch 1, sampling and decoding, after one sample to warm up; the mean over --samples",
                bool,
                False,
                group="speed",
            ),
        ),
        'rcm generate --prompt "a photo of a red circle" --steps 4 --out out.png',
        exclusive=("--prompt", "--prompts"),
        more=(
            'rcm generate --model wan2.1-1.3b --prompt "a red panda eats bamboo" --samples 4 --out panda.mp4',
            'rcm generate --model wan2.1-14b --teacher --prompt "a storm at sea" --resolution 720p --out storm.mp4',
            "rcm generate --model cosmos-predict2-2b --prompts prompts.txt --aspect 1:1 --out sheet.png",
            'rcm generate --model wan2.1-i2v-14b --teacher --image cat.jpg --prompt "the cat yawns" --out cat.mp4',
            "rcm generate --model wan2.2-i2v-a14b --checkpoint high.pth --second-checkpoint low.pth --sigma-max 200 "
            '--image cat.jpg --prompt "the cat yawns" --out cat.mp4',
        ),
    ),
    "stages": Stage(
        "rcm.cli.stages:stages",
        "Write dvc.yaml and params.json from the workflow, so that `dvc repro` knows what Snakemake knows.",
        (
            Option("scales", "of which scales (default: those in params.json, else tiny)", str, False, repeat=True),
            Option("--check", "write nothing; fail where the files are not current", bool),
            Option("--values", "leave dvc.yaml, fail where it is not current: what its first stage does", bool),
        ),
        "rcm stages",
        more=("rcm stages --check", "rcm stages tiny cosmos-predict2-2b"),
    ),
    "why": Stage(
        "rcm.cli.why:why",
        "Say where a number, figure or student comes from: the chain back to checkpoint, prompts and code.",
        (
            Option("file", "a table, figure, score, sample folder, student: anything that has a .prov.json"),
            Option("--model", "of a table, figure or report one model and its steps, such as rcm-0-4", str, False),
            Option("--check", "hash what is big, too, and take what is gone for broken", bool, False),
        ),
        "rcm why results/tiny/tables/table1.csv --model rcm-0-4",
    ),
    "record": Stage(
        "rcm.cli.record:record",
        "Write what Snakemake made into dvc.lock, after a check that it is whole and current; then: dvc push.",
        (Option("targets", "stages of dvc.yaml, with what they need (default: all)", str, False, repeat=True),),
        "rcm record",
        more=("rcm record table1",),
    ),
    "sync": Stage(
        "rcm.cli.record:sync",
        "Fetch what dvc.lock names, check it, and have Snakemake and DVC take it for made; runs no stage.",
        (Option("targets", "stages of dvc.yaml, with what they need (default: all)", str, False, repeat=True),),
        "rcm sync",
        more=("rcm sync table1",),
    ),
    "doctor": Stage(
        "rcm.cli.doctor:doctor",
        "Say what is installed, which backends will be used, and what is used instead of what is missing.",
        (),
        "rcm doctor",
    ),
}


def overview() -> str:
    """The help of `rcm` itself."""
    width = max(map(len, STAGES))
    lines = [f"  {name:<{width}}  {stage.summary}" for name, stage in STAGES.items()]
    return "\n".join(
        [
            "usage: rcm STAGE [key=value ...] [options]        (the same as python -m rcm STAGE)",
            "",
            "Distil a diffusion teacher into a few-step student with rCM, from checkpoint to table.",
            "Options name files; key=value pairs change numbers of the configuration under config/.",
            "",
            "stages:",
            *lines,
            "",
            "`rcm STAGE --help` says more about one stage; `snakemake -n` shows how the stages depend on one another.",
        ]
    )


PROMPTS = ("--prompt", "--negative-prompt")  # options whose value is any text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


_METAVARS: dict[Callable[[str], Any], str] = {place: "PATH", weights: "NAME=PATH"}


def build(name: str) -> argparse.ArgumentParser:
    """The parser of one stage."""
    stage = STAGES[name]
    parser = _Parser(
        prog=f"rcm {name}",
        description=stage.summary,
        epilog="\n  ".join(["examples:" if stage.more else "example:", stage.example, *stage.more]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_mutually_exclusive_group(required=True) if stage.exclusive else None
    headings = {name: parser.add_argument_group(name) for name in dict.fromkeys(o.group for o in stage.options) if name}
    for option in stage.options:
        target = group if group is not None and option.name in stage.exclusive else headings.get(option.group, parser)
        if option.kind is bool:
            target.add_argument(option.name, action="store_true", help=option.help)
            continue
        if not option.name.startswith("-"):
            target.add_argument(option.name, type=option.kind, nargs="*" if option.repeat else None, help=option.help)
            continue
        target.add_argument(
            option.name,
            type=option.kind,
            required=option.required and option.name not in stage.exclusive,
            default=option.default,
            choices=option.choices,
            nargs="+" if option.repeat else None,
            metavar=None if option.choices else _METAVARS.get(option.kind, option.name[2:].upper()),
            help=option.help + (f" (default: {option.default})" if option.default is not None else ""),
            action=_Named if option.kind is weights else "store",
        )
    if stage.overrides:
        parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"configuration: {stage.overrides}")
    return parser


def parse(name: str, argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of a stage; raises UserError with one sentence.

    Overrides may stand before, between or after options. The values of PROMPTS may begin with a dash.
    """
    words, texts = argv, dict[str, str]()
    for option in PROMPTS:
        words, text = _without_prompt(words, option, {option.name for option in STAGES[name].options})
        texts |= {option[2:].replace("-", "_"): text} if text is not None else {}
    arguments = build(name).parse_intermixed_args(words)
    vars(arguments).update(texts)
    for override in getattr(arguments, "overrides", []):
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"{override!r} is neither an option nor a key=value (see `rcm {name} --help`)")
    return arguments


def _without_prompt(argv: list[str], wanted: str, options: set[str]) -> tuple[list[str], str | None]:
    """Put a harmless word in place of the value of an option that takes any text: argparse has rules of its own."""
    if wanted not in options:
        return argv, None
    words: list[str] = []
    prompt = None
    rest = iter(argv)
    for word in rest:
        option, separator, value = word.partition("=")
        if option == wanted and not separator:
            value = next(rest, "--out")
            if value.partition("=")[0] in options:  # the prompt was forgotten
                words += [wanted, value]
                continue
        if option == wanted:
            word, prompt = f"{wanted}=given", value
        words.append(word)
    return words, prompt
