"""The accuracy grid's own judgement, and the fast part of the grid for each backend."""

import os
from itertools import combinations, groupby, product

import pytest
import torch
from torch import Tensor

from benchmarks import accuracy
from benchmarks.accuracy import Case, Problem, Reference

SHORT = [length for length in accuracy.LENGTHS if length < 999]
SIZES = [*product(SHORT, SHORT), (1, 999), (999, 127), (65, 1000), (1000, 999)]
MISTAKES = ["no rowsum", "no rescale", "no tk", "last row", "not finite"]


def failures(cases: list[Case], backends: list[str]) -> dict[str, dict[str, float]]:
    """What is outside the bound; the backends share the references."""
    found = {}
    for problem, group in groupby(cases, key=lambda case: case.problem):
        reference = Reference(problem, "cpu")
        for case, backend in product(group, backends):
            errors = reference.excess(case.tangents, accuracy.run(case, reference, backend))
            if max(errors.values()) > 1:
                found[f"{backend}: {case}"] = errors
    return found


def test_every_pair_of_settings_is_within_the_bound() -> None:
    cases = accuracy.every_pair(accuracy.axes(accuracy.DTYPES))
    assert len(cases) >= 64
    assert failures(cases, ["math", "torch", "auto"]) == {}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter, on a CPU")
def test_triton_is_within_the_bound_in_the_interpreter() -> None:
    """In float32 and float16: the interpreter's bfloat16 product is wrong. Lengths of one tile and of two."""
    pytest.importorskip("triton")
    cases = accuracy.every_pair([(15, 65), (15, 127), (16, 128), *accuracy.axes(("float32", "float16"))[3:]])
    assert failures(cases, ["triton"]) == {}


def test_the_covering_cases_hold_every_pair() -> None:
    axes = accuracy.axes(accuracy.DTYPES)
    settings = [(*vars(case.problem).values(), case.tangents, case.strided) for case in accuracy.every_pair(axes)]
    for (i, x), (j, y) in combinations(enumerate(axes), 2):
        assert {(setting[i], setting[j]) for setting in settings} == set(product(x, y))


def test_the_grid_holds_every_combination() -> None:
    cases = accuracy.every_case(accuracy.axes(accuracy.DTYPES))
    assert len(set(cases)) == 8 * 8 * 3 * 3 * 2 * 3 * 2 * 8 * 2
    problems = [problem for problem, _ in groupby(cases, key=lambda case: case.problem)]
    assert len(problems) == len(set(problems))  # no reference is computed twice


@pytest.mark.parametrize("logits", [80, -80])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_row_maxima_of_the_logits(logits: int, causal: bool, size: int) -> None:
    reference = Reference(Problem(65, 127, size, "bfloat16", causal, logits, grouped=False), "cpu")
    q, k, _ = (x.double() for x in reference.primals)
    s = q @ k.mT / size**0.5
    if causal:
        s[..., torch.arange(127) > torch.arange(65)[:, None]] = -torch.inf
    assert (s.amax(-1) - logits).abs().max() < 2


def wrong(reference: Reference, mistake: str) -> dict[str, Tensor]:
    """o and to with all tangents in float64 arithmetic, over tiles of 64 keys, with one mistake; rounded once."""
    (q, k, v), (tq, tk, tv) = ([x.double() for x in xs] for xs in (reference.primals, reference.tangents.values()))
    scale, tile = q.shape[-1] ** -0.5, 64
    m = torch.full((*q.shape[:3], 1), -torch.inf, dtype=torch.float64)
    sum_p, sum_h, o, g = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(q), torch.zeros_like(q)
    for start in range(0, k.shape[2], tile):
        block = slice(start, start + tile)
        s = q @ k[:, :, block].mT * scale
        ts = (tq @ k[:, :, block].mT + q @ tk[:, :, block].mT) * scale
        if mistake == "no tk":
            ts = tq @ k[:, :, block].mT * scale
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        rescale, p = torch.exp(m - m_new), torch.exp(s - m_new)
        m, h = m_new, p * ts
        sum_p = sum_p * rescale + p.sum(-1, keepdim=True)
        sum_h = sum_h * rescale + h.sum(-1, keepdim=True)
        o = o * rescale + p @ v[:, :, block]
        g = g * (1 if mistake == "no rescale" else rescale) + h @ v[:, :, block] + p @ tv[:, :, block]
    o = o / sum_p
    to = g / sum_p - (0 if mistake == "no rowsum" else sum_h / sum_p * o)
    if mistake == "last row":
        to[:, :, -1] = 0
    if mistake == "not finite":
        to[0, 0, 0, 0] = torch.nan
    return {name: x.to(reference.primals[0].dtype) for name, x in (("o", o), ("to", to))}


@pytest.fixture(scope="module")
def references() -> list[Reference]:
    problems = product(SIZES, accuracy.DTYPES)
    return [
        Reference(Problem(*size, 16, dtype, causal=False, logits=0, grouped=False), "cpu") for size, dtype in problems
    ]


def test_the_judge_accepts_what_is_right(references: list[Reference]) -> None:
    errors = {str(x.problem): max(x.excess("qkv", wrong(x, "nothing")).values()) for x in references}
    assert {problem: error for problem, error in errors.items() if error > 0.5} == {}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_judge_refuses_what_is_wrong(references: list[Reference], mistake: str) -> None:
    for reference in references:
        problem = reference.problem
        if mistake == "no rescale" and problem.keys < 127:  # one tile, or hardly more than one: no new maximum there
            continue
        if mistake == "no tk" and problem.keys == 1:  # the softmax of one key is constant
            continue
        if mistake == "last row" and problem.dtype == "bfloat16":  # one row of 1,000 may hide in its rounding
            continue
        assert reference.excess("qkv", wrong(reference, mistake))["to"] > 1, str(problem)
