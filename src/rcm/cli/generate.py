"""The stage `generate`: prompts in, pictures or clips out.

Sample s of the prompt p of a file (both from 0) has the noise of the job (p, s), so that the samples of a table come
again under the suite's seed. Big parts are in memory one after another: the text encoder, the image encoder, then codec
and network; clips are decoded piece by piece while they are written.
"""

import json
import math
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rcm
import rcm.text
import rcm.vision
from rcm.artefact import atomic_file, stated_sha256
from rcm.cli.images import fitted, whole
from rcm.cli.models import (
    Job,
    Student,
    Teacher,
    bare_text_encoder,
    clock,
    codec,
    device_name,
    device_of,
    filled,
    jobs_of,
    network,
)
from rcm.cli.orders import Order, ordered
from rcm.cli.pictures import check_suffix, enlarged, frame_rate, grid, make_room, write
from rcm.cli.progress import Progress
from rcm.codecs import to_pixels
from rcm.conditioning import Experts, first_frame_condition
from rcm.data import world
from rcm.networks import Conditioned
from rcm.text import WordEncoder

# words of the captions that the tiny networks were trained on
KNOWN = {
    *world.SHAPES,
    *world.COLORS,
    *world.DIRECTIONS,
    *(word for phrase in world.RELATIONS for word in phrase.split()),
}
_NOTED = 5_000  # characters of a prompt in a comment: a film's is an argument of ffmpeg, which may have 128 KiB
_GRID = 2 * 2**30  # bytes of all frames, beyond which there is no grid

Draw = Callable[[Job], Tensor]  # latents (1, C, T, H, W) of a job
Seconds = tuple[float, float]  # of sampling, of decoding


@torch.no_grad()
def generate(arguments: Namespace) -> None:
    """Sample every prompt as often as asked for, and write the samples in the format that the suffix names.

    Several samples are numbered along the rows of a grid, a row a prompt, which is written under the name itself.
    """
    suffix = check_suffix(arguments.out)
    order = ordered(arguments)
    jobs = jobs_of("1-of-1", len(order.prompts), order.samples)
    make_room(arguments.out)
    texts = encoded(order)
    decoder = codec(order.settings["codec"], order.files["codec"], device=order.placed["device"])
    draw = drawing(order, opened(order, decoder), texts)

    facts, rate, factor = described(order), frame_rate(order.settings["codec"]), 1 if suffix == ".npy" else zoom(order)
    in_grid = 1 < len(jobs) <= _GRID // (3 * math.prod(order.size) * order.settings["frames"] * factor**2)
    kept: list[np.ndarray] = []  # the samples of the grid
    timed: list[Seconds] = []
    if arguments.benchmark:
        measured(order, decoder, draw, jobs[0])  # the first run chooses kernels and fills caches
    for number, job in enumerate(jobs):
        pieces: Iterable[np.ndarray]
        if arguments.benchmark:
            pieces, seconds = measured(order, decoder, draw, job)
            timed.append(seconds)
        else:
            pieces = decoded(order, decoder, draw(job))
        pieces = (enlarged(piece, factor) for piece in pieces)
        if in_grid:
            kept.append(np.concatenate(list(pieces)))
            pieces = kept[-1:]
        path = arguments.out.with_stem(f"{arguments.out.stem}-{number}") if len(jobs) > 1 else arguments.out
        about = facts | {"prompt": order.prompts[job[0]][:_NOTED], "job": job}
        with atomic_file(path) as temporary:
            write(temporary, pieces, rate=rate, comment=json.dumps(about))
        print(f"wrote {path}: {in_words(order, factor)}")
    if in_grid:
        sheet = grid(np.stack(kept).reshape(len(order.prompts), order.samples, *kept[0].shape))
        about = facts | {"prompts": [prompt[: _NOTED // len(order.prompts)] for prompt in order.prompts]}
        with atomic_file(arguments.out) as temporary:
            write(temporary, [sheet], rate=rate, comment=json.dumps(about))
        print(f"wrote {arguments.out}: these in a grid of {len(order.prompts)} x {order.samples}")
    elif len(jobs) > 1:
        note(f"{len(jobs)} samples are too many for a grid")
    if timed:
        print(report(order, timed))
    if order.settings["text"]["kind"] == "words":
        for remark in remarks(order):
            note(remark)


# --- Text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Texts with their encodings (tokens, width), in the place of the encoder, which is gone."""

    known: Mapping[str, Tensor]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(B, tokens, width)."""
        return torch.stack([self.known[prompt] for prompt in prompts])


def encoded(order: Order) -> Encoded:
    """Encode all texts of an order; those that are too long are named."""
    encoder = text_encoder(order)
    if not isinstance(encoder, WordEncoder):  # of which `remarks` speaks
        for number in encoder.cut(order.texts):
            note(f"longer than {encoder.tokens} tokens, the rest is cut: {json.dumps(order.texts[number][:60])} ...")
    known = {}
    with Progress("encode", len(order.texts), "prompts", patient=True) as progress:
        for text in order.texts:
            known[text] = encoder.encode([text])[0].cpu()
            progress.advance()
    return Encoded(known)


def text_encoder(order: Order) -> Any:
    """The text encoder of the model, or texts that were encoded before."""
    if "embeddings" in order.files:
        return rcm.text.Embeddings(order.files["embeddings"])
    if "text" not in order.files:
        return rcm.text.build(order.settings["text"])
    encoder = bare_text_encoder(order.settings["text"], order.files["tokenizer"])
    return filled(encoder, order.files["text"], order.placed)


def remarks(order: Order) -> list[str]:
    """What a person should know about how the tiny model understands the prompts."""
    encoder = WordEncoder(**{key: value for key, value in order.settings["text"].items() if key != "kind"})
    return list(dict.fromkeys(remark for prompt in order.prompts for remark in _remarks(prompt, encoder)))


def _remarks(prompt: str, encoder: WordEncoder) -> list[str]:
    words = re.findall(r"\w+", prompt.lower())
    if not words:
        return ["the prompt has no words, so the student shows what it likes"]
    found = []
    everything = WordEncoder(tokens=sys.maxsize, width=encoder.width, window=encoder.window, decay=encoder.decay)
    count = len(everything.words(prompt))
    if count > encoder.tokens:
        found.append(f"the prompt is long: only its first {encoder.tokens} of {count} words are used")
    if not any(word.removesuffix("s") in KNOWN or word in KNOWN for word in words):
        found.append(
            f"the tiny model knows only shapes ({', '.join(world.SHAPES)}) and colours ({', '.join(world.COLORS)}); "
            "none of them is in the prompt, so expect anything"
        )
    return found


def note(text: str) -> None:
    """Say something that is no error."""
    print(f"rcm generate: note: {text}", file=sys.stderr)


# --- Network and codec -----------------------------------------------------------------------------------------------


def opened(order: Order, encoder: Any) -> nn.Module:
    """The network of an order, with its other expert and with the first frame where it has them.

    `encoder` is the codec. The image encoder is gone before the network is loaded.
    """
    conditions: dict[str, Tensor] = {}
    if order.image is not None:
        device = device_of(order.placed["device"])
        first = fitted(order.image, order.size).to(device)
        conditions["condition_BCTHW"] = first_frame_condition(encoder, first, order.settings["frames"])
        if "vision" in order.files:
            with torch.device("meta"):
                vision = rcm.vision.build(order.settings.get("vision", "clip-vit-huge-14"))
            vision = filled(vision, order.files["vision"], order.placed)
            conditions["image_BLD"] = vision.encode(whole(order.image).to(device))
            del vision
    built = network(order.settings["network"], order.files["checkpoint"], **order.placed)
    if "second" in order.files:
        placed = {**order.placed, "device": "cpu"} if waits(built, order.placed["device"]) else order.placed
        second = network(order.settings["network"], order.files["second"], **placed)
        built = Experts(built, second, order.settings["boundary"])
    return Conditioned(built, **conditions) if conditions else built


def waits(expert: nn.Module, device: str) -> bool:
    """Whether there is no room for another expert beside one on a GPU, and half as much for what is computed."""
    if device != "cuda":
        return False
    torch.cuda.empty_cache()  # of the encoders before
    return torch.cuda.mem_get_info()[0] < 1.5 * sum(parameter.nbytes for parameter in expert.parameters())


def drawing(order: Order, built: nn.Module, texts: Encoded) -> Draw:
    """What draws the latents of a job; every call of the network is a step of a progress bar."""
    settings = order.settings
    if order.of_teacher:
        sample: Callable[..., Tensor] = Teacher(built, texts, settings, settings["teacher"]).sample
    else:
        sample = partial(Student(built, texts, settings).sample, steps=order.steps)
    last_is_free = order.of_teacher and settings["teacher"]["sampler"] == "cosmos"
    calls = order.steps - 1 if last_is_free else order.steps

    def draw(job: Job) -> Tensor:
        with Progress("sample", calls, "steps", patient=True) as progress:
            counting = built.register_forward_hook(lambda *_: progress.advance())
            try:
                return sample(texts.encode([order.prompts[job[0]]]), [job], seed=order.seed)
            finally:
                counting.remove()

    return draw


def decoded(order: Order, decoder: Any, latents_BCTHW: Tensor) -> Iterator[np.ndarray]:
    """The pieces of a sample, uint8 (t, H, W, 3), one after another."""
    with Progress("decode", order.settings["frames"], "frames", patient=True) as progress:
        for video in decoder.frames(latents_BCTHW):
            piece = to_pixels(video)[0]
            yield piece
            progress.advance(len(piece))


# --- What is said and noted ------------------------------------------------------------------------------------------


def described(order: Order) -> dict[str, Any]:
    """What files made by an order say of it, beside the prompt."""
    settings, section = order.settings, "teacher" if order.of_teacher else "sampler"
    sampling = {key: value[:_NOTED] if isinstance(value, str) else value for key, value in settings[section].items()}
    return {
        "made_by": f"rcm {rcm.__version__}, torch {torch.__version__}",
        "files": {
            name: {"name": path.name, "sha256": stated_sha256(path)}
            for name, path in order.files.items()
            if name in ("checkpoint", "second", "image")
        },
        section: {**sampling, "steps": order.steps},
        **({"times": settings["times"]} if "times" in settings else {}),
        **({"boundary": settings["boundary"]} if "second" in order.files else {}),
        **{key: settings[key] for key in ("width", "height", "frames")},
        "seed": order.seed,
        **order.placed,
    }


def zoom(order: Order) -> int:
    """How often small frames are enlarged for people to look at: to at most about 384 pixels."""
    return max(1, 384 // max(order.size))


def in_words(order: Order, factor: int) -> str:
    """What a file holds."""
    (width, height), count = order.size, order.settings["frames"]
    frames = f"{count} frames of " if count > 1 else ""
    return f"{frames}{width} x {height} pixels" + (f", enlarged {factor} times" if factor > 1 else "")


def measured(order: Order, decoder: Any, draw: Draw, job: Job) -> tuple[list[np.ndarray], Seconds]:
    """The frames of a job, and the seconds that sampling and decoding took."""

    now = partial(clock, torch.device(order.placed["device"]))
    start = now()
    latents = draw(job)
    between = now()
    pieces = list(decoded(order, decoder, latents))
    return pieces, (between - start, now() - between)


def report(order: Order, timed: Sequence[Seconds]) -> str:
    """The mean of the timed samples, in the terms of the paper's table 2."""
    sampling, decoding = (sum(seconds) / len(timed) for seconds in zip(*timed, strict=True))
    total, frames = sampling + decoding, order.settings["frames"]
    device = device_name(torch.device(order.placed["device"]))
    return (
        f"benchmark: {total:.3g} s a sample, {frames / total:.3g} frames per second: {sampling:.3g} s for "
        f"{order.steps} steps, {decoding:.3g} s for decoding; batch 1, {device}, {order.placed['precision']}, the mean "
        f"of {len(timed)} after one to warm up; the codec is in float32, encoders, loading and writing are not counted"
    )
