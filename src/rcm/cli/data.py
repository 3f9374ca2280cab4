"""Stages that make the data set: prompts, synthesize."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rcm.artefact import content_sha256, recording, sha256_file, write_text
from rcm.cli.config import compose
from rcm.cli.progress import Progress

if TYPE_CHECKING:
    from rcm.cli.models import Job, Teacher
    from rcm.data.shards import Sample


def prompts(arguments: Namespace) -> None:
    """Draw the captions of a suite and write them as JSON lines."""
    from rcm.data.prompts import VOCABULARIES, evaluation_suite, to_jsonl, training_suite

    config = compose(arguments.overrides)
    name, suite, common = config["suite"], config["suites"][config["suite"]], config["prompts"]
    vocabulary = VOCABULARIES[common["vocabulary"]]
    options = {"seed": suite["seed"], "media": config["media"], "still": common["still"]}
    numbers = {"suite": name, "media": config["media"], "prompts": common, **suite}
    with recording(arguments.out, stage="prompts", config=numbers, seed=suite["seed"]):
        if name == "train":
            drawn = training_suite(vocabulary, number=suite["prompts"], weights=suite["weights"], **options)
        else:
            drawn = evaluation_suite(vocabulary, per_task=suite["per_task"], **options)
        write_text(arguments.out, to_jsonl(drawn))


def synthesize(arguments: Namespace) -> None:
    """Let the teacher sample the prompts of one part and write them as a shard."""
    from rcm.cli.models import jobs_of, teacher
    from rcm.data.prompts import read_prompts
    from rcm.data.shards import write_shard

    config = compose(arguments.overrides)
    seed, inputs = config["suites"]["train"]["seed"], [arguments.teacher, arguments.prompts]
    numbers = {key: config[key] for key in ("network", "text", "teacher", "frames")} | {"shard": arguments.shard}
    with recording(arguments.out, stage="synthesize", inputs=inputs, config=numbers, seed=seed):
        captions = [item["prompt"] for item in read_prompts(arguments.prompts)]
        jobs = jobs_of(arguments.shard, len(captions), config["suites"]["train"]["samples"])
        model = teacher(config, arguments.teacher)
        manifest = {
            "part": arguments.shard,
            "prompts_sha256": sha256_file(arguments.prompts),
            "teacher_sha256": content_sha256(arguments.teacher),
            "sampler": dict(config["teacher"]),
            "text": dict(config["text"]),
            "seed": seed,
        }
        write_shard(arguments.out, _samples(model, captions, jobs, config), manifest)


def _samples(
    model: "Teacher", captions: Sequence[str], jobs: Sequence["Job"], config: Mapping[str, Any]
) -> Iterator["Sample"]:
    """The teacher's samples of all jobs, drawn in batches."""
    from rcm.data.shards import Sample

    train, batch = config["suites"]["train"], config["evaluation"]["batch"]
    with Progress("synthesize", len(jobs), "samples") as progress:
        for start in range(0, len(jobs), batch):
            chosen = jobs[start : start + batch]
            texts = [captions[prompt] for prompt, _ in chosen]
            encoded = model.encoder.encode(texts)
            latents = model.sample(encoded, chosen, seed=train["seed"])
            for (prompt, number), caption, latent, text in zip(chosen, texts, latents, encoded, strict=True):
                yield Sample(prompt * train["samples"] + number, caption, train["seed"], latent, text)
            progress.advance(len(chosen))
