"""The stage `generate`: a prompt in, a picture or a clip out."""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence

import torch

from rcm.artefact import UserError, atomic_file
from rcm.cli.models import codec, student
from rcm.cli.pictures import check_suffix, encode, enlarged
from rcm.codecs import to_pixels
from rcm.data import world
from rcm.text import WordEncoder

# words of the captions that the tiny networks were trained on
KNOWN = {
    *world.SHAPES,
    *world.COLORS,
    *world.DIRECTIONS,
    *(word for phrase in world.RELATIONS for word in phrase.split()),
}


@torch.no_grad()
def generate(arguments: Namespace) -> None:
    """Sample one picture or clip and write it in the format that the suffix names."""
    suffix = check_suffix(arguments.out)
    prompt = checked_prompt(arguments.prompt)
    for path in (arguments.checkpoint, arguments.codec):
        if not path.exists():
            raise UserError(
                f"{path} does not exist: run `make tables` first, or name another with --checkpoint and --codec"
            )
    model = student(arguments.checkpoint)
    model.times(arguments.steps)
    decoder = codec(model.settings["codec"], arguments.codec)
    latents = model.sample(model.encoder.encode([prompt]), [(0, 0)], steps=arguments.steps, seed=arguments.seed)
    frames = to_pixels(decoder.decode(latents))[0]
    shown = frames if suffix == ".npy" else enlarged(frames)
    with atomic_file(arguments.out) as path:
        path.write_bytes(encode(shown, suffix))
    count, height, width, _ = frames.shape
    factor = shown.shape[1] // height
    print(
        f"wrote {arguments.out}: {f'{count} frames of ' if count > 1 else ''}{width} x {height} pixels"
        + (f", enlarged {factor} times" if factor > 1 else "")
    )
    for remark in remarks(prompt, model.encoder):
        print(f"rcm generate: note: {remark}", file=sys.stderr)


def checked_prompt(prompt: str) -> str:
    """The prompt, if it is text; UserError for bytes that are not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not valid UTF-8 text") from error
    return prompt


def remarks(prompt: str, encoder: object) -> Sequence[str]:
    """What a person should know about how a prompt is understood."""
    words = re.findall(r"\w+", prompt.lower())
    if not words:
        return ["the prompt has no words, so the student shows what it likes"]
    found = []
    if isinstance(encoder, WordEncoder):
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
