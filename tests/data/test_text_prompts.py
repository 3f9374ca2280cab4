"""Prompts with a text in them."""

from collections import Counter

import pytest

from rcm.artefact import UserError
from rcm.data.text_prompts import CARRIERS, TEXTS, text_prompts


def test_a_prompt_quotes_its_text_and_names_a_carrier() -> None:
    for media, medium in (("images", "photo"), ("clips", "video")):
        for item in text_prompts(3, 50, media):
            before, text, after = item["prompt"].split('"')
            assert (text, after) == (item["text"], "")
            assert before.removeprefix(f"a {medium} of ").removesuffix(" that says ") in CARRIERS


def test_every_combination_comes_once_texts_and_carriers_in_turn() -> None:
    total = len(CARRIERS) * len(TEXTS)
    every = text_prompts(0, total)
    assert len({item["prompt"] for item in every}) == total
    first = every[: len(TEXTS)]
    assert {item["text"] for item in first} == set(TEXTS)
    uses = Counter(item["prompt"].split(" that says")[0] for item in first).values()
    assert max(uses) - min(uses) <= 1
    with pytest.raises(UserError, match=rf"{total + 1} prompts .* there are {total}: set suites.text.prompts"):
        text_prompts(0, total + 1)


def test_the_seed_decides_and_a_larger_number_only_adds() -> None:
    assert text_prompts(5, 40) == text_prompts(5, 40) == text_prompts(5, 90)[:40]
    assert text_prompts(5, 40) != text_prompts(6, 40)
    assert text_prompts(5, 0) == []


def test_texts_are_short_distinct_and_of_three_sorts() -> None:
    assert len({text.casefold() for text in TEXTS}) == len(TEXTS)
    assert len(set(CARRIERS)) == len(CARRIERS)
    assert all(1 <= len(text.split()) <= 3 and 4 <= len(text) <= 20 and text.isascii() for text in TEXTS)
    assert all('"' not in text and "/" not in text for text in TEXTS)  # the quotes are the prompt's
    sorts = Counter("number" if any(map(str.isdigit, t)) else "upper" if t.isupper() else "lower" for t in TEXTS)
    assert min(sorts.values()) >= 15
