"""Stages behind the samples: evaluate, table, figure, report."""

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rcm.artefact import UserError, atomic_file, recording, sha256_file, write_json, write_text
from rcm.cli.config import compose, config_dir, options
from rcm.cli.names import model_and_steps

if TYPE_CHECKING:
    from rcm.evaluation import Evaluation

# Of each scorer, and of the suite `text`: the options by which it can be given what it scores, and what else it takes.
_Options = tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]
TAKES: dict[str, _Options] = {
    "shapes": ((("samples",),), ("diversity", "prompts")),
    "geneval-mask2former": ((("measured",), ("samples", "weights")), ("diversity", "prompts")),
    "geneval-mmdet": ((("official",),), ("samples", "diversity", "prompts")),
    "vbench": ((("official",),), ("measured", "samples", "diversity", "prompts")),
    "vbench-long": ((("official",),), ("measured", "samples", "diversity", "prompts")),
    "vbench-native": ((("measured",), ("samples", "weights")), ("diversity", "prompts")),
    "text": ((("measured",), ("samples",)), ("prompts",)),
}
_FIRST = (".overall", ".total", ".quality", ".semantic", ".vendi", ".dino_distance", ".psnr", ".sharpness", ".cer")
_SAME = ("checkpoint_sha256", "sampler", "sigma_max", "times", "steps", "precision")  # of two suites of one model


def evaluate(arguments: Namespace) -> None:
    """Score one model at one number of steps."""
    from rcm.evaluation import results_jsonl
    from rcm.evaluation.samples import SAMPLING

    config = compose(arguments.overrides)
    kind = "text" if config["suite"] == "text" else config["evaluation"]["scorer"]
    given = _given(arguments, kind)
    model, steps = model_and_steps(arguments.out)
    common = {"model": model, "steps": steps, "resamples": config["evaluation"]["bootstrap"]}
    settings = {key: config["evaluation"].get(key) for key in ("allow_missing", "known_at_least", "paper")}
    numbers = {"media": config["media"], "scorer": kind, **common, **settings}
    read = given
    if "official" in given:  # its samples were judged elsewhere; how they were made is all that is read of them
        read = {
            **given,
            "samples": [path for folder in given.get("samples", ()) if (path := folder / SAMPLING).exists()],
        }
    files = [[value] if isinstance(value, Path) else value for name, value in read.items() if name != "weights"]
    inputs = [*chain.from_iterable(files), *given.get("weights", {}).values()]
    outputs = [path for path in (arguments.out, arguments.results, arguments.metrics) if path]
    with recording(*outputs, stage="evaluate", inputs=inputs, config=numbers):
        made = _evaluated(kind, given, config, common)
        evaluator = made.scores["evaluator"]
        evaluator["prompts_file_sha256"] = _prompts_file(config)[1]
        _check_prompts(evaluator["sampling"], given.get("prompts"))
        if evaluator["known"]:
            from rcm.evaluation import known

            known.trusted(evaluator["known"], config["evaluation"]["known_at_least"])
        write_json(arguments.out, made.scores)
        write_text(arguments.results, results_jsonl(made.results))
        if arguments.metrics:
            metrics = {name: entry["value"] for name, entry in made.scores["metrics"].items()}
            write_json(arguments.metrics, {name: metrics[name] for name in metrics if name.endswith(_FIRST)})


def _given(arguments: Namespace, kind: str) -> dict[str, Any]:
    """The options of `TAKES` that were given; UserError unless they fit."""
    names = ("samples", "measured", "official", "weights", "diversity", "prompts")
    given = {name: value for name in names if (value := getattr(arguments, name))}
    ways, more = TAKES[kind]
    if not any({*way} <= {*given} <= {*way, *more} for way in ways):
        words = ", or ".join(" and ".join(f"--{name}" for name in way) for way in ways)
        what = "suite=text" if kind == "text" else f"evaluation.scorer={kind}"
        raise UserError(
            f"{what} takes {words}, and if wanted {', '.join(f'--{name}' for name in more)}; "
            f"given: {', '.join(f'--{name}' for name in given) or 'none of them'}"
        )
    return given


def _evaluated(
    kind: str, given: Mapping[str, Any], config: Mapping[str, Any], common: Mapping[str, Any]
) -> "Evaluation":
    """The scores, by the module of the scorer."""
    allow = config["evaluation"]["allow_missing"]
    numbers = {**common, "expected": _expected(given, config), "allow_missing": allow}
    if kind == "shapes":
        from rcm.evaluation import evaluate as of_shapes

        return of_shapes(given["samples"], given.get("diversity", ()), media=config["media"], **numbers)

    from rcm.evaluation.measured import read_measured

    numbers |= {"prompts_file": _prompts_file(config)[0], "paper": config["evaluation"].get("paper")}
    measured = read_measured(given["measured"], _what(kind)) if "measured" in given else None
    if measured is None and "official" not in given:
        from rcm.cli.evaluators import taken
        from rcm.cli.measure import measured as look

        measured = look(_what(kind), given["samples"], taken(_what(kind), given.get("weights", {})), config)
    if kind == "text":
        from rcm.evaluation import small_text

        assert measured is not None
        return small_text.evaluation(measured, media=config["media"], **numbers)
    diversity = read_measured(given["diversity"], "diversity") if "diversity" in given else None
    from rcm.evaluation.samples import read_sampling

    sampling = measured.header.get("sampling") if measured else None
    if sampling is None and "samples" in given:
        sampling = read_sampling(given["samples"])
    if diversity:
        _check_same(sampling, diversity.header.get("sampling"), given["diversity"][0])
    numbers["diversity"] = diversity
    if kind.startswith("vbench"):
        from rcm.evaluation import vbench

        made = vbench.evaluation(measured, given.get("official"), protocol=kind, **numbers)
        made.scores["evaluator"]["sampling"] = sampling
        return made

    from rcm.evaluation import geneval_scores

    if measured is None:
        return geneval_scores.from_results(given["official"], sampling=sampling, **numbers)
    return geneval_scores.from_measured(measured, **numbers)


def _what(kind: str) -> str:
    """What is measured for a scorer, or for the suite `text`."""
    return kind if kind == "text" else "vbench" if kind.startswith("vbench") else "geneval"


def _expected(given: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The prompts of the suite and how many samples each of them should have; None where --prompts does not say."""
    from rcm.data.prompt_files import read_prompt_file
    from rcm.evaluation.samples import Expected

    if "prompts" not in given:
        return None
    prompts, samples = read_prompt_file(given["prompts"]), config["suites"][config["suite"]]["samples"]
    return Expected(prompts, [prompt.get("samples", samples) for prompt in prompts])


def _check_prompts(sampling: Mapping[str, Any] | None, path: Path | None) -> None:
    """Raise UserError where the samples were made from another file of prompts."""
    said = (sampling or {}).get("prompts_sha256")
    if said and path and said != (found := sha256_file(path)):
        raise UserError(
            f"{path} has the SHA-256 {found}, but the samples were made from prompts with {said}; give those, or "
            "sample again"
        )


def _check_same(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None, path: Path) -> None:
    """Raise UserError where quality and diversity were measured on samples that were made otherwise."""
    for key in _SAME if first and second else ():
        if first and second and first.get(key) != second.get(key):
            raise UserError(
                f"{path} is of samples with another {key} ({second.get(key)}, not {first.get(key)}); diversity and "
                "quality are only told together of one model, sampled in one way"
            )


def _prompts_file(config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Name and SHA-256, or its known digits, of the file that the suite's prompts come from; none if they are drawn."""
    suite = config["suites"][config["suite"]]
    if "file" not in suite:
        return None, None
    found = config["checkpoints"][suite["file"]]
    return found["source"].rpartition("/")[2], found["sha256"]


def table(arguments: Namespace) -> None:
    """Make a table in three formats, unless the controls fail."""
    from rcm.report.stored import read_score, read_speed
    from rcm.report.tables import make_table

    settings = compose(arguments.overrides)["evaluation"]
    limits = {key: settings[key] for key in ("oracle_at_least", "floor_at_most") if key in settings}
    lists = {name: getattr(arguments, name) or [] for name in ("scores", "controls", "throughput")}
    published = [] if arguments.published is None else [arguments.published]
    inputs = [*chain.from_iterable(lists.values()), *published]
    outputs = {suffix: arguments.out_dir / f"{arguments.name}.{suffix}" for suffix in ("csv", "md", "tex")}
    with recording(*outputs.values(), stage="table", inputs=inputs, config={"name": arguments.name, **limits}):
        scores, controls = ([read_score(path) for path in lists[name]] for name in ("scores", "controls"))
        times = [read_speed(path) for path in lists["throughput"]]
        made = make_table(arguments.name, scores, controls, arguments.published, throughput=times, **limits)
        for suffix, path in outputs.items():
            write_text(path, made[suffix])


def figure(arguments: Namespace) -> None:
    """Draw a figure."""
    from rcm.report import figures
    from rcm.report.stored import read_rounding, read_score

    published = {} if arguments.published is None else {"published": arguments.published}
    if published and arguments.name not in ("figure_lambda", "figure_steps"):
        raise UserError(f"{arguments.name} has no place for the paper's numbers: leave --published out")
    inputs = [*arguments.inputs, *published.values()]
    with recording(arguments.out, stage="figure", inputs=inputs, config={"name": arguments.name}):
        readers = {"figure_quality_diversity": read_score, "figure_precision": read_rounding}
        read = readers.get(arguments.name)
        inputs = [read(path) for path in arguments.inputs] if read else arguments.inputs
        drawn = getattr(figures, arguments.name)(inputs, **published)
        with atomic_file(arguments.out) as path:
            path.write_bytes(drawn)


def report(arguments: Namespace) -> None:
    """Make the HTML page."""
    from rcm.report.page import clip_folders, report_page
    from rcm.report.stored import read_score

    paths = arguments.scores or []
    scores = [read_score(path) for path in paths]
    chosen = next((word for word in arguments.overrides if word.startswith("experiment=")), "experiment=tiny-images")
    scale = chosen.removeprefix("experiment=").rpartition("-")[0]
    words = [
        word for word in arguments.overrides if not word.startswith(("experiment=", "objective=", "seed=", "suite="))
    ]
    config = _configuration(scale, words, scores)
    patterns = ("tables/*.csv", "figures/*.png")
    found = {path for folder in arguments.results for pattern in patterns for path in folder.glob(pattern)}
    clips = clip_folders(arguments.results, scores)
    with recording(arguments.out, stage="report", inputs=[*paths, *sorted(found), *clips], config=config):
        title = "rCM in miniature" if scale == "tiny" else f"rCM: {scale}"
        texts = [
            (heading, yaml.safe_dump(part, sort_keys=False, width=120, allow_unicode=True))
            for heading, part in config.items()
        ]
        write_text(arguments.out, report_page(scores, arguments.results, configuration=texts, title=title))


def _configuration(scale: str, words: Sequence[str], scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the page shows of the configuration: what is built, one medium's numbers, and those of the other."""
    scored = {str(score["model"]).rpartition("-")[0] for score in scores}
    methods = [name for name in options("objective") if name in scored]
    names = {media: f"{scale}-{media}" for media in ("images", "clips") if f"{scale}-{media}" in options("experiment")}
    trees = {media: _of_medium([f"experiment={name}", *words], methods) for media, name in names.items()}
    files = [path for path in (Path("pipeline.yaml"), Path("scale", f"{scale}.yaml")) if (config_dir() / path).exists()]
    shown = {
        f"config/{path} (without what --config changed)": yaml.safe_load((config_dir() / path).read_text("utf-8"))
        for path in files
    }
    (media, first), *others = trees.items()
    shown[f"Configuration of {media}"] = first
    return shown | {f"Configuration of {other}, where it differs": _differences(first, tree) for other, tree in others}


def _of_medium(words: list[str], methods: Iterable[str]) -> dict[str, Any]:
    """The composed tree with the objectives of all methods, without what differs from job to job."""
    trees = {method: compose([*words, f"objective={method}"]) for method in methods}
    tree = next(iter(trees.values()), None) or compose(words)
    numbers = {key: value for key, value in tree.items() if key not in ("objective", "seed", "suite")}
    return {**numbers, "objectives": {method: tree["objective"] for method, tree in trees.items()}}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in `b` and not so in `a`."""
    found = {}
    for key, value in b.items():
        if isinstance(value, dict) and isinstance(a.get(key), dict):
            if inner := _differences(a[key], value):
                found[key] = inner
        elif key not in a or value != a[key]:
            found[key] = value
    return found
