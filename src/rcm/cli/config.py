"""The configuration: Hydra composes it, JSON schemas check it, and a mistake in it is one sentence.

`config/` holds every number of the science; `config/schema.json` says what each may be. Both the stages and the
Snakefile come here, so that a typo reads the same wherever it is met. Imports nothing heavy.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rcm.artefact import UserError
from rcm.cli.evaluators import NAMES, WEIGHTS, subject
from rcm.tree import config_dir as config_dir
from rcm.tree import options as options

GROUPS = ("experiment", "objective", "network", "codec", "text", "pretrain", "prompts_vbench")
PIXELS = 48  # sides of a picture of the tiny world: `rcm.data.world.SIZE`, without what that imports


def compose(overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Compose the tree with Hydra overrides such as `experiment=tiny-clips`, resolve and check it.

    Returns plain dicts, lists and numbers. Raises UserError with one sentence that names the key, what was given and
    what is allowed.
    """
    with _hydra():
        tree = _composed(list(overrides))
    validate(tree, read_schema(config_dir() / "schema.json"))
    _check_combinations(tree)
    return tree


OF_A_MEDIUM = ("transformer", "synthesizer", "second", "student")  # downloads that media of a scale do not share


def several(source: str) -> bool:
    """Whether a source of `checkpoints` means a folder of files."""
    last = source.rpartition("/")[2]
    return not last or "*" in last


def files_here(source: str) -> list[str]:
    """The files on this machine that a source of `checkpoints` means: none where it is an address elsewhere."""
    parts = urlsplit(source)
    if parts.scheme not in ("", "file"):
        return []
    path = Path(url2pathname(parts.path) if parts.scheme else source)
    return sorted(str(file) for file in path.rglob("*") if file.is_file()) if path.is_dir() else [str(path)]


def stored(scale: str, media: str, name: str, source: str) -> str:
    """Where the pipeline puts the download `name` of a scale: a file, or a folder of several."""
    folder = f"data/{scale}/{f'{media}/' if name in OF_A_MEDIUM else ''}checkpoints"
    return f"{folder}/{name}{'' if several(source) else Path(source).suffix}"


OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)  # ${times:10,${...}} in a configuration


def _hydra() -> Any:
    GlobalHydra.instance().clear()  # a caller that composes twice, or an application that uses Hydra itself
    return initialize_config_dir(config_dir=str(config_dir()), version_base="1.3")


def _composed(overrides: Sequence[str]) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(hydra_compose("config", overrides=list(overrides)), resolve=True)
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).partition("/")
        names = options(group)
        raise UserError(_sentence(group, name, f"one of {', '.join(names)}", names)) from None
    except ConfigCompositionException as error:
        match = re.search(r"'([^']+)'", str(error))
        raise UserError(_unknown(match[1] if match else str(error), overrides)) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"configuration with {' '.join(overrides)}: {str(error).splitlines()[0]}") from None
    except yaml.YAMLError as error:
        raise UserError(f"configuration: {' '.join(str(error).split())}") from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _unknown(key: str, overrides: Sequence[str]) -> str:
    """Which keys there are where an override names one that there is not."""
    given = next((o.partition("=")[2] for o in overrides if o.lstrip("+~").partition("=")[0] == key), "")
    tree: Any = _composed([o for o in overrides if o.partition("=")[0] in GROUPS])
    place: list[str] = []
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            break
        tree = tree[part]
        place.append(part)
    prefix = "".join(f"{part}." for part in place)
    if not isinstance(tree, dict):
        return f"configuration key {key!r} is unknown: {prefix[:-1]!r} is {_shown(tree)} and has no keys below it"
    return _unknown_key(key, given, [f"{prefix}{name}" for name in tree])


# --- Checking against a schema -------------------------------------------------------------------------------------


# JSON takes 1000.0 for an integer; where a number counts something, Python does not
_Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int),
)


@cache
def read_schema(path: Path) -> dict[str, Any]:
    """Read a JSON schema."""
    return json.loads(path.read_text(encoding="utf-8"))


def validate(value: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Raise UserError for the first thing in `value` that `schema` does not allow."""
    order = ["", *schema["properties"]]  # a section before those that repeat it

    def place(error: ValidationError) -> tuple[int, list[str]]:
        path = list(map(str, error.path))
        return order.index(path[0] if path and path[0] in order else ""), path

    errors = sorted(_Validator(dict(schema)).iter_errors(value), key=place)
    if errors:
        raise UserError(_explained(errors[0]))


def _explained(error: ValidationError) -> str:
    key = ".".join(map(str, error.absolute_path))
    rule, given, schema = error.validator, error.instance, error.schema
    if rule == "additionalProperties":
        prefix = f"{key}." if key else ""
        extra = next(name for name in given if name not in schema["properties"])
        return _unknown_key(f"{prefix}{extra}", given[extra], [f"{prefix}{name}" for name in schema["properties"]])
    if rule == "required":
        missing = next(name for name in schema["required"] if name not in given)
        return f"configuration key {f'{key}.{missing}' if key else missing!r} is missing"
    choices = [str(choice) for choice in schema.get("enum", [])]
    return _sentence(key, given, expected(schema), choices)


def expected(schema: Mapping[str, Any]) -> str:
    """What a schema allows, in words: "an integer of at least 1"."""
    if "description" in schema:
        return schema["description"]
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "anyOf" in schema:
        return " or ".join(expected(choice) for choice in schema["anyOf"])
    bounds = " and ".join(f"{words} {schema[name]}" for name, words in _BOUNDS.items() if name in schema)
    text = f"{_KINDS[schema['type']]} {bounds}".strip()
    if "items" in schema:
        text += f", each {expected(schema['items'])}"
    return text + (", all different" if schema.get("uniqueItems") else "")


_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "string": "a text",
    "array": "a list",
    "object": "a section of keys",
    "null": "null",
    "boolean": "true or false",
}
_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "of at most",
    "exclusiveMaximum": "below",
    "multipleOf": "that is a multiple of",
    "minItems": "of length at least",
    "maxItems": "of length at most",
    "minLength": "of length at least",
    "pattern": "that matches",
}


def _sentence(key: str, given: Any, allowed: str, choices: Sequence[str] = ()) -> str:
    return f"configuration key {key!r} is {_shown(given)}; allowed: {allowed}{_hint(str(given), choices)}"


def _unknown_key(key: str, given: Any, known: Sequence[str]) -> str:
    text = f"configuration key {key!r} (given: {_shown(given)}) is unknown; allowed: {', '.join(known) or 'none'}"
    return text + _hint(key, known)


def _hint(given: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- What a schema cannot say --------------------------------------------------------------------------------------


def _check_combinations(tree: Mapping[str, Any]) -> None:
    def require(fits: bool, key: str, allowed: str) -> None:
        if not fits:
            raise UserError(_sentence(key, reduce(getitem, key.split("."), tree), allowed))

    _check_prompts(tree, require)
    _check_network(tree, require)
    _check_schedule(tree, require)
    _check_objective(tree, require)
    _check_evaluation(tree, require)


def _check_prompts(tree: Mapping[str, Any], require: Callable[[bool, str, str], None]) -> None:
    require(tree["suite"] in tree["suites"], "suite", f"{', '.join(tree['suites'])}: those of this experiment")
    for section, name in ((tree["suites"]["train"], "suites.train"), (tree["pretrain"], "pretrain")):
        if section is not None and "weights" in section:
            require(any(section["weights"].values()), f"{name}.weights", "at least one above 0")
    for name, suite in tree["suites"].items():
        if "file" in suite:
            listed = [key for key in tree["checkpoints"] if key.startswith("prompts_")]
            allowed = f"one of `checkpoints` that holds prompts ({', '.join(listed) or 'none'})"
            require(suite["file"] in listed, f"suites.{name}.file", allowed)
    if tree["codec"]["kind"] == "cells":  # those of the tiny world, which has no scenes for other words
        vocabulary = tree["prompts"]["vocabulary"]
        require(vocabulary == "tiny", "prompts.vocabulary", "tiny, the words of the tiny world that is drawn here")
        for key in ("height", "width"):
            require(tree[key] == PIXELS, key, f"{PIXELS}, the size of the tiny world")
    if tree["text"]["kind"] != "words":
        for name in ("text", "tokenizer"):
            if name not in tree["checkpoints"]:
                kind = tree["text"]["kind"]
                raise UserError(f"configuration key 'checkpoints.{name}' is missing; text.kind {kind} needs it")


def _check_network(tree: Mapping[str, Any], require: Callable[[bool, str, str], None]) -> None:
    codec, frames, stride, cell = tree["codec"], tree["frames"], tree["codec"]["stride"], tree["codec"]["cell"]
    fits = frames == 1 if tree["media"] == "images" else frames > 1 and (frames - 1) % stride == 0
    require(fits, "frames", f"1 for images, 1 + a multiple of codec.stride ({stride}) for clips")
    fits = tree["height"] % cell == 0 and tree["width"] % cell == 0
    require(fits, "codec.cell", f"a divisor of the {tree['width']} x {tree['height']} pixels of a picture")
    latents = [1 + (frames - 1) // stride, tree["height"] // cell, tree["width"] // cell]
    for name in ("network", "synthesizer"):
        network = tree[name]
        require(network["width"] % (2 * network["heads"]) == 0, f"{name}.width", f"a multiple of 2 x {name}.heads")
        require(network["in_channels"] == codec["channels"], f"{name}.in_channels", "codec.channels")
        require(network["out_channels"] == codec["channels"], f"{name}.out_channels", "codec.channels")
        require(network["text_width"] == tree["text"]["width"], f"{name}.text_width", "text.width")
        patch = network["patch"]
        fits = all(size % step == 0 for size, step in zip(latents, patch, strict=True))
        require(fits, f"{name}.patch", f"divisors of the latents {latents} along t, h, w")
        tokens = [size // step for size, step in zip(latents, patch, strict=True)]
        if network["kind"] == "wan":
            fits = all(have >= need for have, need in zip(network["positions"] or tokens, tokens, strict=True))
            require(fits, f"{name}.positions", f"null, or at least the tokens {tokens} along t, h, w")


def _check_schedule(tree: Mapping[str, Any], require: Callable[[bool, str, str], None]) -> None:
    times = [math.atan(tree["sampler"]["sigma_max"]), *tree["sampler"]["mid_times"]]
    fits = times == sorted(times, reverse=True)
    allowed = f"numbers above 0 that never rise, the first at most atan(sampler.sigma_max) = {times[0]:.4f}"
    require(fits, "sampler.mid_times", allowed)
    settings, objective = tree["distillation"], tree["objective"]
    if objective["name"] == "rcm":
        updates, alone = settings["student_updates"], settings["tangent_warmup"] + settings["scm_only"]
        key = "distillation.tangent_warmup" if settings["tangent_warmup"] >= updates else "distillation.scm_only"
        require(
            alone < updates,
            key,
            "what leaves updates to DMD: distillation.tangent_warmup + distillation.scm_only "
            f"({settings['tangent_warmup']} + {settings['scm_only']}) below distillation.student_updates ({updates})",
        )
    fixed = objective["rollout_times"]
    if objective["dmd_weight"] > 0 and fixed is not None:
        need = settings["max_rollout"] - 1
        allowed = f"null, or at least {need} times, one fewer than distillation.max_rollout"
        require(len(fixed) >= need, "objective.rollout_times", allowed)
    skip, steps = settings["dcm_skip"], settings["dcm_steps"]
    require(skip <= steps, "distillation.dcm_skip", f"an integer of at most distillation.dcm_steps ({steps})")
    if (traced := settings["profile"]) is not None:
        require(traced[0] <= traced[1], "distillation.profile", "null, or [FIRST, LAST] iteration, FIRST <= LAST")
    micro, batch = tree["parallel"]["micro_batch"], settings["batch"]
    fits = micro is None or micro <= batch
    require(fits, "parallel.micro_batch", f"null, or an integer of at most distillation.batch ({batch})")


ACTING = {  # which losses act in a method: a consistency loss, DMD, GAN
    **dict.fromkeys(("scm", "dcm", "meanflow"), (True, False, False)),
    "dmd": (False, True, False),
    "dmd2": (False, True, True),
    "rcm": (True, True, False),
}


def _check_objective(tree: Mapping[str, Any], require: Callable[[bool, str, str], None]) -> None:
    objective, network = tree["objective"], tree["network"]
    name, consistency = objective["name"], objective["consistency"]
    for key, acts in zip(("consistency_weight", "dmd_weight", "gan_weight"), ACTING[name], strict=True):
        allowed = f"{'a number above 0' if acts else '0'} for objective.name {name}"
        require((objective[key] > 0) == acts, f"objective.{key}", allowed)
    if name == "rcm":
        fits, allowed = consistency is not None, "scm, dcm or meanflow"
    else:
        expected_loss = name if ACTING[name][0] else None
        fits, allowed = consistency == expected_loss, expected_loss or "null"
    require(fits, "objective.consistency", f"{allowed} for objective.name {name}")
    if name == "dmd2":
        branch, layers, width = tree["distillation"]["discriminator"], network["layers"], network["width"]
        allowed = f"blocks of the network, rising integers from 0 to {layers - 1} (network.layers - 1)"
        fits = branch["layers"] == sorted(branch["layers"]) and branch["layers"][-1] < layers
        require(fits, "distillation.discriminator.layers", allowed)
        allowed = f"a divisor of network.width ({width})"
        require(width % branch["heads"] == 0, "distillation.discriminator.heads", allowed)


def _check_evaluation(tree: Mapping[str, Any], require: Callable[[bool, str, str], None]) -> None:
    evaluation = tree["evaluation"]
    tiny, images = tree["codec"]["kind"] == "cells", tree["media"] == "images"
    names = ("shapes",) if tiny else ("geneval-mask2former", "geneval-mmdet") if images else _OF_CLIPS
    scorer = evaluation["scorer"]
    require(scorer in names, "evaluation.scorer", f"{' or '.join(names)}, for these {tree['media']}")
    if tiny:
        for key in ("oracle_at_least", "floor_at_most"):
            if key not in evaluation:
                raise UserError(f"configuration key 'evaluation.{key}' is missing; the scorer shapes needs it")
        return
    if scorer.startswith("geneval") and "known_at_least" not in evaluation:
        raise UserError(f"configuration key 'evaluation.known_at_least' is missing; the scorer {scorer} needs it")
    suites = [
        suite for suite in ("report", "diversity", "text") if not (suite == "report" and scorer == "geneval-mmdet")
    ]
    for suite in suites:
        for name in WEIGHTS[what := subject(scorer, suite)]:
            if name not in tree["checkpoints"]:
                raise UserError(f"configuration key 'checkpoints.{name}' is missing; {NAMES[what]} needs it")


_OF_CLIPS = ("vbench", "vbench-long", "vbench-native")
