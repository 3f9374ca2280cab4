"""Stages that make the data set: prompts, synthesize."""

import functools
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

from rcm.artefact import UserError, content_sha256, recording, sha256_file, write_text
from rcm.cli.config import compose
from rcm.cli.progress import Progress
from rcm.usage import usage

if TYPE_CHECKING:
    from rcm.cli.models import Job, Teacher
    from rcm.data.samples import Sample
    from rcm.data.unfinished import Unfinished
    from rcm.parallel import Mesh

_A_DAY = 86400  # a rank waits as long as another one draws; one that is gone is noticed by the launcher


def prompts(arguments: Namespace) -> None:
    """Write the prompts of a suite as JSON lines: drawn captions with their facts, or the lines of a file."""
    from rcm.data.prompts import to_jsonl

    config = compose(arguments.overrides)
    suite, source = config["suites"][config["suite"]], arguments.source
    if source is None and "file" in suite:
        raise UserError(f"the prompts of suite={config['suite']} are those of a file: name it with --source")
    if (arguments.names and not source) or (arguments.info and not arguments.names):
        raise UserError("--info goes with --names, and --names with --source: name all that come before it")
    numbers = {"suite": config["suite"], "media": config["media"], "prompts": config["prompts"], **suite}
    inputs = [path for path in (source, arguments.names, arguments.info) if path is not None]
    with recording(arguments.out, stage="prompts", inputs=inputs, config=numbers, seed=suite["seed"]):
        chosen = _drawn(config) if source is None else _listed(arguments, config)
        write_text(arguments.out, to_jsonl(chosen))


def _listed(arguments: Namespace, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first prompts of a file, as many as the suite wants; those of the suite `diversity` from all parts of it."""
    from rcm.data.prompt_files import read_prompt_file
    from rcm.data.vbench_prompts import vbench_prompts

    suite = config["suites"][config["suite"]]
    if arguments.names is None:
        prompts = read_prompt_file(arguments.source)
    else:
        still = suite.get("still_samples")
        prompts = vbench_prompts(arguments.source, arguments.names, arguments.info, still_samples=still)
    count = suite.get("prompts") or len(prompts)
    if config["suite"] == "diversity":  # VBench's file begins with still scenes
        return [prompts[k * len(prompts) // count] for k in range(min(count, len(prompts)))]
    return prompts[:count]


def _drawn(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The captions of a suite."""
    from rcm.data.prompts import VOCABULARIES, evaluation_suite, geneval, training_suite
    from rcm.data.text_prompts import text_prompts

    suite, common = config["suites"][config["suite"]], config["prompts"]
    if config["suite"] == "text":
        return text_prompts(suite["seed"], suite["prompts"], config["media"])
    vocabulary = VOCABULARIES[common["vocabulary"]]
    options = {"seed": suite["seed"], "media": config["media"], "still": common["still"]}
    if config["suite"] == "train":
        return training_suite(vocabulary, number=suite["prompts"], weights=suite["weights"], **options)
    if "draws" in suite:
        return geneval(vocabulary, seed=suite["seed"], n=suite["draws"])
    return evaluation_suite(vocabulary, per_task=suite["per_task"], **options)


def synthesize(arguments: Namespace) -> None:
    """Let the teacher sample the prompts of one part and write them as a shard; every rank runs this.

    The noise of a sample follows from the seed and its index alone, and a batch is drawn by one rank, whole: so the
    shard is the same however many ranks drew it, and wherever it was interrupted.
    """
    from rcm.cli.models import jobs_of, teacher
    from rcm.cli.sources import code_digest
    from rcm.collective import everywhere
    from rcm.data.prompt_files import read_prompt_file
    from rcm.data.shards import manifest_path
    from rcm.data.unfinished import unfinished
    from rcm.parallel import start

    config = compose(arguments.overrides)
    train = config["suites"]["train"]
    inputs = [path for path in (arguments.teacher, arguments.prompts, arguments.text) if path is not None]
    sections = ("synthesizer", "synthesis", "text", "codec", "frames", "height", "width")
    numbers = {key: config[key] for key in sections} | {"shard": arguments.shard, "samples": train["samples"]}
    numbers["inference"] = {key: config["inference"][key] for key in ("device", "precision", "batch")}
    with ExitStack() as stack:
        mesh = start(device=config["inference"]["device"], timeout=_A_DAY)
        stack.callback(mesh.close)
        facts: dict[str, Any] = {}
        if mesh.is_main:  # what is written and said is rank 0's
            outputs = (arguments.out, manifest_path(arguments.out))
            known: dict[str, Any] = {"inputs": inputs, "config": numbers, "seed": train["seed"]}
            facts = stack.enter_context(recording(*outputs, stage="synthesize", ranks=mesh.world, **known))
        captions = [item["prompt"] for item in read_prompt_file(arguments.prompts)]
        jobs = jobs_of(arguments.shard, len(captions), train["samples"])
        model = teacher(config, arguments.teacher, arguments.text, synthesis=True)
        manifest = {
            "part": arguments.shard,
            "prompts_sha256": sha256_file(arguments.prompts),
            "samples_per_prompt": train["samples"],
            "teacher_sha256": content_sha256(arguments.teacher),
            "sampler": dict(config["synthesis"]),
            "text": dict(config["text"] if arguments.text is None else model.encoder.encoder),
            "seed": train["seed"],
        }
        shard = None
        if mesh.is_main:
            _say_what_is_cut(model.encoder, captions, jobs)
            identity = {**manifest, **numbers, "code": code_digest("synthesize")}
            shard = stack.enter_context(unfinished(arguments.out, identity, _say))
        _draw(model, captions, jobs, config, mesh, shard)
        if shard is not None:
            shard.finish(manifest)
        facts["ranks"] = everywhere(usage, mesh.group)[1:]


def _say(text: str) -> None:
    print(f"rcm synthesize: note: {text}", file=sys.stderr, flush=True)


def _say_what_is_cut(encoder: Any, captions: Sequence[str], jobs: Sequence["Job"]) -> None:
    """Say which prompts are too long for the encoder; UserError for one that it does not know."""
    numbers = sorted({prompt for prompt, _ in jobs})
    if cut := encoder.cut([captions[prompt] for prompt in numbers]):
        many = f"{len(cut)} of {len(numbers)} prompts (number {numbers[cut[0]] + 1} is the first)"
        _say(f"{many} are longer than {encoder.tokens} tokens and cut there")


def _draw(
    model: "Teacher",
    captions: Sequence[str],
    jobs: Sequence["Job"],
    config: Mapping[str, Any],
    mesh: "Mesh",
    shard: "Unfinished | None",
) -> None:
    """Draw what the shard of rank 0 lacks: in each round a batch on every rank, the same ones wherever it began."""
    from rcm.collective import everywhere

    batch = config["inference"]["batch"]
    done = everywhere(lambda: shard.count if shard else 0, mesh.group)[0]
    progress = Progress("synthesize", len(jobs), "samples") if mesh.is_main else nullcontext()
    with progress as bar:
        if bar is not None:
            bar.advance(done)
        for first in range(done, len(jobs), batch * mesh.world):
            place = first + batch * mesh.rank
            mine = functools.partial(_batch, model, captions, jobs[place : place + batch], config)
            drawn = list(chain(*everywhere(mine, mesh.group)))
            everywhere(lambda: shard.append(drawn) if shard else None, mesh.group)  # noqa: B023  called here
            if bar is not None:
                bar.advance(len(drawn))


def _batch(
    model: "Teacher", captions: Sequence[str], jobs: Sequence["Job"], config: Mapping[str, Any]
) -> list["Sample"]:
    """The teacher's samples of some jobs, drawn together; latents in the precision of the network."""
    import torch

    from rcm.data.samples import Sample, stored

    if not jobs:
        return []
    train, texts = config["suites"]["train"], [captions[prompt] for prompt, _ in jobs]
    encoded = model.encoder.encode(texts)
    latents = model.sample(encoded, jobs, seed=train["seed"]).to(getattr(torch, config["inference"]["precision"]))
    return [
        stored(Sample(prompt * train["samples"] + number, caption, train["seed"], latent, text))
        for (prompt, number), caption, latent, text in zip(jobs, texts, latents, encoded, strict=True)
    ]
