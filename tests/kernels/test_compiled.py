"""Shipped tiles compiled ahead of time for cards that are not there, and the compilations that new lengths cause.

`python -m flash_jvp.compiled` does it for all of them, in a quarter of an hour or more: here are those of the models.

All of it runs in other processes: this one may have Triton's interpreter on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing can be compiled")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is there on Linux only")

KERNELS = Path(__file__).parents[2] / "kernels"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(KERNELS)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_spills_at_the_size_of_the_video_models_are_within_their_bounds(arch: int) -> None:
    result = run("-m", "flash_jvp.compiled", "--arch", str(arch), "--dim", "128", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "10 kernels, 0 with something wrong" in result.stdout


def test_too_many_bytes_of_stack_are_a_failure() -> None:
    options = ["--arch", "90", "--dim", "16", "--dtype", "bfloat16", "--stack", "-1"]
    result = run("-m", "flash_jvp.compiled", *options)
    assert result.returncode == 1, result.stderr
    assert "bytes of stack, allowed -1" in result.stdout


SPECIALISATIONS = """
import json, torch, triton
from flash_jvp import compiled, tuning
triton.runtime.driver.set_active(compiled.Machine(90))
keys = set()
def seen(*, key, **_):
    keys.add(key)
    return True  # known: nothing is compiled
triton.knobs.runtime.jit_cache_hook = seen
counts = {}
for kernel in tuning.KERNELS:
    keys.clear()
    for length in (1, 2, 15, 16, 17, 64, 999, 1000, 1024, 4080, 32760):
        for other in (1, 16, length):
            compiled.call(kernel, torch.bfloat16, 64, False, length, other)
    counts[kernel] = len(keys)
print(json.dumps(counts))
"""


def test_a_new_length_compiles_nothing() -> None:
    """One key of Triton's cache for all lengths, also 1 and multiples of 16, which Triton would specialise."""
    result = run("-c", SPECIALISATIONS)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    # A backward call launches both of its kernels.
    assert counts == {"forward": 1, "forward_tq": 1, "forward_jvp": 1, "backward_queries": 2, "backward_keys": 2}


def test_the_interpreter_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(KERNELS)}
    command = [sys.executable, "-m", "flash_jvp.compiled"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
    assert "Traceback" not in result.stderr
