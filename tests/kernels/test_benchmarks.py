"""The benchmarks: the baseline is correct, wrong results get no time, and memory is what is claimed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import flash_jvp
from benchmarks import speed

BENCHMARKS = Path(speed.__file__).parent
IN_THE_INTERPRETER = """
import sys, torch
from benchmarks import accuracy, baseline
for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
    for queries, keys, size in ((63, 65, 16), (127, 64, 64), (1, 200, 32)):
        shapes = (2, 3, queries, size), (2, 3, keys, size)
        primals, tangents = accuracy.random_inputs(*shapes, torch.Generator().manual_seed(keys))
        for given in ("qkv", "q"):
            some = [t.to(dtype) if name in given else None for name, t in zip("qkv", tangents)]
            results = baseline.attention_jvp(*(x.to(dtype) for x in primals), *some)
            double = ([x if x is None else x.to(dtype).double() for x in xs] for xs in (primals, some))
            exact = accuracy.plain_jvp(*double)
            for x, y in zip(results, exact):
                assert (x - y).norm() < bound * y.norm(), (dtype, queries, keys, given)
"""


def test_the_baseline_kernel_is_correct_in_the_interpreter() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    subprocess.run([sys.executable, "-c", IN_THE_INTERPRETER], env=environment, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU selection is for machines without CUDA")
def test_the_cpu_selection_runs_checks_and_writes_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--quick", "--json", str(tmp_path / "speed.json")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "none of them speaks for a GPU" in output
    written = json.loads((tmp_path / "speed.json").read_text())
    assert [figure["note"] for figure in written["figures"] if figure["note"]] == []
    for figure in written["figures"]:
        assert figure["ms"] > 0
        assert figure["runs"] >= 10
        assert 0 < figure["error"] < 1e-5
        operations = figure["ms"] * figure["tflops"] * 1e9
        if figure["shape"] == "cross, zero tk and tv (1,2,100->40,16)":
            assert operations == pytest.approx(8 * 2 * 100 * 40 * 16)
    assert [goal["reached"] for goal in written["goals"]] == [None] * 4


Spoil = Callable[[Tensor], Tensor]
SHAPE = speed.Shape("small", 3, 200, 96, 16)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda x: x.index_fill(2, torch.arange(50, 200), 0), id="a quarter of the rows"),
        pytest.param(lambda x: x.index_fill(2, torch.tensor([199]), torch.nan), id="last row not written"),
        pytest.param(lambda x: x.index_fill(1, torch.tensor([2]), 0), id="a head is missing"),
        pytest.param(lambda x: x * 1.2, id="scale"),
    ],
)
@pytest.mark.parametrize("result", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_result_is_called_wrong_and_has_no_time(spoil: Spoil, result: int, dtype: torch.dtype) -> None:
    def run(inputs: speed.Inputs) -> tuple[Tensor, ...]:
        outputs = list(speed.with_flash_jvp(inputs, "torch"))
        outputs[result] = spoil(outputs[result])
        return tuple(outputs)

    sample = speed.Sample(SHAPE, "cpu", dtype)
    right = speed.Entry(SHAPE, "right", "jvp", lambda inputs: speed.with_flash_jvp(inputs, "torch"), [[1.0]])
    wrong = speed.Entry(SHAPE, "wrong", "jvp", run, [[1.0]])
    right.check(sample)
    wrong.check(sample)
    assert (right.note, right.ms) == ("", 1.0)
    assert (wrong.note, wrong.ms) == ("WRONG", None)


@pytest.mark.parametrize("result", [0, 1, 2])
def test_a_wrong_gradient_is_called_wrong(result: int) -> None:
    def run(inputs: speed.Inputs) -> tuple[Tensor, ...]:
        outputs = list(speed.with_gradient(inputs, "torch"))
        outputs[result] = outputs[result].index_fill(2, torch.arange(48, 96), 0)
        return tuple(outputs)

    sample = speed.Sample(SHAPE, "cpu", torch.float32)
    right = speed.Entry(SHAPE, "right", "gradient", lambda inputs: speed.with_gradient(inputs, "torch"))
    wrong = speed.Entry(SHAPE, "wrong", "gradient", run)
    right.check(sample)
    wrong.check(sample)
    assert (right.note, wrong.note) == ("", "WRONG")


def test_a_variant_that_fails_is_noted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(inputs: speed.Inputs) -> tuple[Tensor, Tensor]:
        raise AssertionError("broken in it\nand more")

    monkeypatch.setitem(speed.VARIANTS, "broken", fails)
    entries = speed.measure(SHAPE, ["broken", "flash_jvp torch"], "cpu", torch.float32, seconds=0)
    assert entries[0].note == "failed: AssertionError: broken in it"
    assert entries[1].ms


def test_goals_are_reached_not_reached_or_not_measured() -> None:
    first, cross = speed.GPU_SHAPES[0], speed.GPU_SHAPES[4:]
    figures = {(first, "flash_jvp triton"): 40.0, (first, "three accumulators"): 50.0}
    figures |= {(cross[0], "flash_jvp triton"): 0.5, (cross[1], "flash_jvp triton"): 1.0}
    entries = [speed.Entry(shape, name, "jvp", lambda inputs: (), [[ms]]) for (shape, name), ms in figures.items()]
    goals = speed.goals(entries, 790.0, {})
    assert [goal["reached"] for goal in goals] == [False, True, True, None]
    assert goals[1]["value"] == pytest.approx(12 * 12 * 32_760**2 * 128 / 40e-3 / 790e12)


def peak_bytes(backend: str, length: int) -> int:
    """The largest sum of live allocations while one head of `length` positions is attended to."""
    tensors = [torch.randn(1, 1, length, 16) for _ in range(6)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        flash_jvp.attention_jvp(*tensors, backend=backend)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_peak_memory_grows_linearly_with_the_length() -> None:
    """From 1k to 8k positions; that of the whole score matrix fourfold with each doubling."""
    peaks = [peak_bytes("torch", 1024 * n) for n in (1, 2, 4, 8)]
    assert all(1.5 < b / a < 2.2 for a, b in pairwise(peaks)), peaks
    whole = [peak_bytes("math", 1024 * n) for n in (1, 2, 4)]
    assert all(3.5 < b / a < 4.2 for a, b in pairwise(whole)), whole
    assert peaks[0] > 1024 * 16 * 4  # the measurement sees at least the output
