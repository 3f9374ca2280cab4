"""What `rcm generate` is to make: its options, with what the model itself says, checked before anything is loaded."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rcm.artefact import UserError
from rcm.checkpoints import download, read_settings
from rcm.cli import config, images, sizes
from rcm.cli.models import EXPORTED, times_of
from rcm.data.prompt_files import read_prompt_file
from rcm.sampling import teacher_sample
from rcm.tree import options, settings_of

STEPS = 4  # of a student


@dataclass(frozen=True)
class Order:
    """Everything that decides what is made.

    settings    sections as in an experiment: frames, height, width, network, codec, text, sampler or teacher, ...; of a
                student also `times`
    of_teacher  whether the checkpoint is sampled as a teacher (`settings["teacher"]`) or as a student (`["sampler"]`)
    files       the paths that are needed, by the name of the option
    image       the first frame, for networks that take one
    placed      device and precision of the networks
    """

    settings: Mapping[str, Any]
    of_teacher: bool
    steps: int
    prompts: Sequence[str]
    samples: int
    seed: int
    files: Mapping[str, Path]
    image: Image.Image | None
    placed: Mapping[str, str]

    @property
    def size(self) -> sizes.Size:
        """Width and height in pixels."""
        return self.settings["width"], self.settings["height"]

    @property
    def texts(self) -> list[str]:
        """The different texts to encode: the prompts, and of a teacher the negative prompt."""
        negative = [self.settings["teacher"]["negative_prompt"]] if self.of_teacher else []
        return list(dict.fromkeys([*self.prompts, *negative]))


def ordered(arguments: Namespace) -> Order:
    """The order that the options make; UserError for what cannot be."""
    try:
        return _ordered(arguments)
    except KeyError as error:  # a model file is not checked by a schema
        raise UserError(f"the settings of the model {arguments.model or arguments.checkpoint} lack {error}") from error


def _ordered(arguments: Namespace) -> Order:
    if arguments.prompts is None:
        prompts = [checked(arguments.prompt)]
    else:
        prompts = [item["prompt"] for item in read_prompt_file(arguments.prompts)]
    placed = _placed(arguments)
    scale, settings, checkpoint = _model(arguments)
    settings = _with_sampling(arguments, settings)
    image = _image(arguments, settings)
    settings = _with_size(arguments, settings, image)
    return Order(
        settings=settings,
        of_teacher=arguments.teacher,
        steps=settings["teacher"]["steps"] if arguments.teacher else arguments.steps or STEPS,
        prompts=prompts,
        samples=arguments.samples,
        seed=arguments.seed,
        files=_files(arguments, scale, settings, checkpoint),
        image=image,
        placed=placed,
    )


def checked(prompt: str) -> str:
    """The prompt, if it is text; UserError for bytes that are not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not valid UTF-8 text") from error
    return prompt


# --- Model -----------------------------------------------------------------------------------------------------------


def _model(arguments: Namespace) -> tuple[str, dict[str, Any], Path]:
    """The scale that files are looked for under, the settings of the model, and its checkpoint."""
    scale, settings = "tiny", dict[str, Any]()
    if arguments.model or arguments.teacher or arguments.checkpoint is None:
        scale, settings = named(arguments.model or scale)
    if arguments.teacher and "teacher" not in settings:
        raise UserError(f"the model {scale} is a student: omit --teacher, or name another with --model")
    checkpoint = arguments.checkpoint or _checkpoint(scale, settings, arguments.teacher)
    if not arguments.teacher:
        _fetch(arguments, scale, settings, "student", checkpoint)
        _exists(checkpoint, "checkpoint", _remedy(scale, settings, "student"))
        settings |= _exported(checkpoint, bool(settings))
        if "sampler" not in settings:
            raise UserError(f"the model {scale} is a teacher: add --teacher")
    return scale, settings, checkpoint


def _exported(path: Path, known: bool) -> dict[str, Any]:
    """What an export says of itself; nothing, if the model is known and the file is of another origin."""
    try:
        settings = read_settings(path)
    except UserError as error:
        if known:
            return {}
        raise UserError(f"{error}; for a checkpoint without settings say --model") from error
    if lacking := [key for key in EXPORTED if key not in settings]:
        raise UserError(f"{path} does not say its {', '.join(lacking)}; export the student again with `rcm export`")
    return settings


def named(name: str) -> tuple[str, dict[str, Any]]:
    """(scale, settings) of a model: of config/model/, a scale, or an experiment. UserError where there is none."""
    if name in options("model"):
        settings = settings_of("model", name)
        groups = [group for group in ("network", "codec", "text", "vision") if group in settings]
        try:
            return name, settings | {group: settings_of(group, settings[group]) for group in groups}
        except ValueError as error:
            raise UserError(f"the model {name}: {error}") from error
    experiments = options("experiment")
    for experiment in (name, f"{name}-images", f"{name}-clips"):
        if experiment in experiments:
            return experiment.rpartition("-")[0], config.compose([f"experiment={experiment}"])
    scales = {experiment.rpartition("-")[0] for experiment in experiments}
    raise UserError(f"there is no model {name!r}; there are {', '.join(sorted({*scales, *options('model')}))}")


# --- Files -----------------------------------------------------------------------------------------------------------

OPTION_OF_FILE = {"second": "second-checkpoint", "text": "text-encoder", "embeddings": "text"}  # others have its name


def _files(arguments: Namespace, scale: str, settings: Mapping[str, Any], checkpoint: Path) -> dict[str, Path]:
    """The files that are needed, as given or where the pipeline puts them; a missing one is a UserError."""
    wanted: dict[str, Path | None] = {"checkpoint": checkpoint, "codec": arguments.codec}
    if settings.get("boundary") is not None:
        if arguments.checkpoint is not None and arguments.second_checkpoint is None:
            raise UserError(f"{checkpoint} is one of two experts: name that of low noise with --second-checkpoint")
        wanted["second"] = arguments.second_checkpoint
    if arguments.text is not None:
        wanted["embeddings"] = arguments.text
    elif settings["text"]["kind"] != "words":
        wanted |= {"text": arguments.text_encoder, "tokenizer": arguments.tokenizer}
    if settings["network"].get("image_width"):
        wanted["vision"] = arguments.vision
    if arguments.image is not None:
        wanted["image"] = arguments.image
    files = {}
    for name, given in wanted.items():
        option = OPTION_OF_FILE.get(name, name)
        if given is None and "checkpoints" not in settings and settings["codec"]["kind"] != "cells":
            raise UserError(f"{checkpoint} does not say where its other files are: say --{option}, or --model")
        files[name] = given or stored(scale, settings, name)
        source = "transformer" if name == "checkpoint" else name
        _fetch(arguments, scale, settings, source, files[name])
        _exists(files[name], option, _remedy(scale, settings, source))
    return files


def _checkpoint(scale: str, settings: Mapping[str, Any], of_teacher: bool) -> Path:
    """Where the pipeline puts a student or a teacher of a scale."""
    folder = Path("data", scale, settings["media"])
    if not of_teacher:
        released = "student" in settings.get("checkpoints", {})
        return stored(scale, settings, "student") if released else folder / "rcm-0" / "student.safetensors"
    converted = folder / "teacher"
    return converted if converted.exists() else stored(scale, settings, "transformer")


def stored(scale: str, settings: Mapping[str, Any], name: str) -> Path:
    """Where the pipeline puts a download of a model."""
    entry = settings.get("checkpoints", {}).get(name) or {"source": f"{name}.pth"}
    return Path(config.stored(scale, settings["media"], name, entry["source"]))


def _fetch(arguments: Namespace, scale: str, settings: Mapping[str, Any], name: str, path: Path) -> None:
    """Download a file, or verify that of an earlier download, if that was asked for and it is one of the model's."""
    entry = settings.get("checkpoints", {}).get(name)
    if arguments.download and entry and path == stored(scale, settings, name):
        download(entry["source"], path, entry.get("sha256"))


def _exists(path: Path, option: str, remedy: str) -> None:
    if not path.exists():
        raise UserError(f"{path} does not exist: {remedy}, or name another with --{option}")


def _remedy(scale: str, settings: Mapping[str, Any], name: str) -> str:
    """What makes a file that is missing."""
    if scale == "tiny":
        return "run `make tables` first"
    if entry := settings.get("checkpoints", {}).get(name):
        return f"add --download, which fetches it from {entry['source']}"
    if name != "student":
        return "check the path"
    if f"{scale}-rcm" in options("model"):
        return f"distil it, take the released one with --model {scale}-rcm --download"
    if scale in options("model"):
        return "this model has no student here: add --teacher"
    return "distil it"


# --- Sampling --------------------------------------------------------------------------------------------------------


def _with_sampling(arguments: Namespace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the options that change how samples are drawn, tried out on a sample of one number."""
    of_teachers = ("steps", "guidance", "shift", "negative_prompt")
    given = {name: value for name in ("sigma_max", *of_teachers) if (value := getattr(arguments, name)) is not None}
    if arguments.ode:
        given["ode"] = True
    if "boundary" not in settings and (arguments.second_checkpoint is None) != (arguments.boundary is None):
        raise UserError("--second-checkpoint, the expert of low noise, and --boundary, where it begins, go together")
    boundary = {} if arguments.boundary is None else {"boundary": arguments.boundary}
    try:
        if arguments.teacher:
            if arguments.ode:
                raise UserError("--ode is for students; the steps of a teacher are those of an ODE")
            before = settings["teacher"]
            teacher = {**before, **given}
            if "shift" in given and "sigma_max" not in given:  # so that the first u is the same
                teacher["sigma_max"] = before["sigma_max"] * given["shift"] / before["shift"]
            if teacher["guidance_form"] == "unconditional" and teacher["guidance"] == 0:
                raise UserError("--guidance 0 leaves the negative prompt alone here; 1 is no guidance")
            checked(teacher["negative_prompt"])
            words = {name: teacher[name] for name in ("sampler", "steps", "shift", "sigma_max")}
            teacher_sample(lambda x, r: x, torch.zeros(1, 1), **words)
            return {**settings, **boundary, "teacher": teacher}
        steps = given.pop("steps", STEPS)
        if mistaken := next((name for name in of_teachers if name in given), None):
            raise UserError(f"--{mistaken.replace('_', '-')} is for teachers: students have their guidance built in")
        sampler = {**settings["sampler"], **given}
        times = times_of(sampler, steps)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    return {**settings, **boundary, "sampler": sampler, "times": times}


def _placed(arguments: Namespace) -> dict[str, str]:
    """Device and precision; automatic ones are bfloat16 on a GPU and float32 on a CPU."""
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but there is no GPU here; allowed on this machine: cpu or auto")
    automatic = "bfloat16" if device == "cuda" else "float32"
    return {"device": device, "precision": automatic if arguments.precision == "auto" else arguments.precision}


# --- Size and image --------------------------------------------------------------------------------------------------


def _image(arguments: Namespace, settings: Mapping[str, Any]) -> Image.Image | None:
    network = settings["network"]
    takes = network["in_channels"] != network["out_channels"]
    if takes and arguments.image is None:
        raise UserError("this model makes clips from an image: say which with --image FILE")
    if not takes and arguments.image is not None:
        raise UserError("this model takes no image; those that do are wan2.1-i2v-14b and wan2.2-i2v-a14b")
    return images.read(arguments.image) if takes else None


def _with_size(arguments: Namespace, settings: Mapping[str, Any], image: Image.Image | None) -> dict[str, Any]:
    """The settings with the size and length of what is made, which codec and network can take."""
    width, height = _size(arguments, settings, image)
    frames = settings["frames"] if arguments.frames is None else arguments.frames
    sizes.check(settings, (width, height), frames)
    return {**settings, "width": width, "height": height, "frames": frames}


def _size(arguments: Namespace, settings: Mapping[str, Any], image: Image.Image | None) -> sizes.Size:
    """Width and height: as given, by resolution and aspect ratio, from the image's own, or the model's."""
    default = settings["width"], settings["height"]
    resolution, aspect = arguments.resolution, arguments.aspect
    if arguments.size is not None:
        if resolution or aspect:
            raise UserError("--size says all; omit --resolution and --aspect")
        return arguments.size
    kind = settings["network"]["kind"]
    if image is not None and not aspect:
        area = sizes.named(kind, resolution, "16:9") if resolution else default
        return sizes.of_image(image.size, area[0] * area[1], sizes.multiples(settings))
    if not (resolution or aspect):
        return default
    if resolution is None:
        of_default = [name for name in sizes.RESOLUTIONS if default in sizes.LANDSCAPE[kind][name].values()]
        if not of_default:
            raise UserError(f"--aspect needs --resolution ({' or '.join(sizes.RESOLUTIONS)}) here, or say --size")
        resolution = of_default[0]
    return sizes.named(kind, resolution, aspect or "16:9")
