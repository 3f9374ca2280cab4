"""The stage `precision`: how much bfloat16 rounds in a network and in its tangent."""

from argparse import Namespace

from rcm.artefact import UserError, recording, write_json
from rcm.cli.config import compose
from rcm.cli.models import latent_shape, noise_of, student, teacher
from rcm.cli.progress import Progress
from rcm.data.prompt_files import read_prompt_file
from rcm.evaluation.precision import middles, rounding_errors


def precision(arguments: Namespace) -> None:
    """Measure the rounding errors of a student or of the teacher, on samples of the teacher that noise is added to."""
    config = compose(arguments.overrides)
    settings, seed = config["evaluation"]["precision"], config["suites"][config["suite"]]["seed"]
    sections = ("frames", "height", "width", "network", "codec", "text", "teacher")
    numbers = {key: config[key] for key in sections} | {"precision": settings}
    given = (arguments.checkpoint, arguments.teacher, arguments.prompts, arguments.text)
    inputs = [path for path in dict.fromkeys(given) if path is not None]
    with recording(arguments.out, stage="precision", inputs=inputs, config=numbers, seed=seed):
        guide = teacher(config, arguments.teacher, arguments.text)
        of_teacher = arguments.checkpoint.is_dir()
        path, text = arguments.checkpoint, arguments.text
        measured = teacher(config, path, text) if of_teacher else student(path, text)
        shape, made = latent_shape(config), latent_shape(measured.settings)
        if made != shape:
            raise UserError(f"{arguments.checkpoint} makes latents of shape {made}, but the experiment {shape}")
        captions = [caption["prompt"] for caption in read_prompt_file(arguments.prompts)]
        apart = max(1, len(captions) // settings["samples"])  # so that every task has its share
        jobs = [(prompt, 0) for prompt in range(0, len(captions), apart)][: settings["samples"]]
        encoded = guide.encoder.encode([captions[prompt] for prompt, _ in jobs])
        times = middles(settings["times"])
        # F_c + s (F_c - F_u) is F_u + (s + 1) (F_c - F_u)
        scale = config["teacher"]["guidance"] + (config["teacher"]["guidance_form"] == "conditional")
        with Progress("precision", len(times), "times") as progress:
            errors = rounding_errors(
                measured.network,
                guide.network,
                guide.sample(encoded, jobs, seed=seed),
                noise_of(jobs, shape, seed=seed, step=1),
                encoded,
                guide.encoder.encode([config["teacher"]["negative_prompt"]]),
                guidance=scale,
                times=times,
                advance=progress.advance,
            )
        write_json(arguments.out, {"model": arguments.out.stem, "samples": len(jobs), "times": times, "errors": errors})
