"""Prompts that ask for a written text: something that carries writing, and what is written on it.

Texts are short and common, so that a wrong letter is the model's and not the reader's: all of them, rendered in an
ordinary font, are read back without a mistake by the reader of `rcm.evaluation.small_text`.
"""

import numpy as np

from rcm.artefact import UserError
from rcm.data.prompts import Metadata

CARRIERS = (
    *("a shop sign", "a street sign", "a neon sign", "a wooden door sign", "a road sign", "a T-shirt", "a coffee mug"),
    *("a book cover", "a chalkboard", "a birthday cake", "a film poster", "a newspaper headline", "a whiteboard"),
    *("a train station display", "a paper note", "a cereal box"),
)
TEXTS = (
    # capitals
    *("OPEN LATE", "CLOSED TODAY", "FRESH BREAD", "COFFEE BAR", "NO PARKING", "WELCOME HOME", "GRAND OPENING"),
    *("BIG SALE", "KEEP LEFT", "THANK YOU", "HELLO WORLD", "GOOD MORNING", "BOOK SHOP", "MARKET STREET"),
    *("PLEASE WAIT HERE", "STAFF ONLY", "FLOWER GARDEN", "TRAIN STATION", "NIGHT FERRY", "LOST AND FOUND"),
    *("EXIT", "LIBRARY", "BAKERY", "MUSEUM", "ORCHESTRA", "WINTER", "DANGER", "QUIET"),
    # lower case
    *("fresh fish", "happy birthday", "see you soon", "home made soup", "green tea", "wet paint", "good luck"),
    *("free coffee", "blue ocean", "summer school", "the last train", "made with love", "open every day"),
    *("garden party", "ice cream", "slow down", "never give up", "jazz club", "warm bread"),
    *("orange", "tomorrow", "breakfast", "adventure", "mountain", "lemonade", "bicycle"),
    # numbers and times
    *("11:44 AM", "7:30 PM", "9:15 AM", "24 hours", "Route 66", "Room 128", "Gate 17", "Platform 9", "Bus 42"),
    *("1984", "2026", "50 percent off", "3 for 2", "Floor 12", "Chapter 5", "10 miles"),
)


def text_prompts(seed: int, number: int, media: str = "images") -> list[Metadata]:
    """The first `number` prompts of an order drawn from the seed, each `{"prompt", "text"}`, no two of them alike.

    No text recurs before all of them have been used, and carriers take turns. `media` is images (photos) or clips
    (videos). A number beyond that of all combinations is a UserError.
    """
    if number > len(CARRIERS) * len(TEXTS):
        raise UserError(
            f"{number} prompts with a text in them are wanted, but there are {len(CARRIERS) * len(TEXTS)}: "
            "set suites.text.prompts to at most that"
        )
    rng = np.random.default_rng(seed)
    texts, carriers = rng.permutation(len(TEXTS)), rng.permutation(len(CARRIERS))
    medium = "photo" if media == "images" else "video"
    drawn = []
    for k in range(number):
        turn, place = divmod(k, len(TEXTS))
        text, carrier = TEXTS[texts[place]], CARRIERS[carriers[(place + turn) % len(CARRIERS)]]
        drawn.append({"prompt": f'a {medium} of {carrier} that says "{text}"', "text": text})
    return drawn
