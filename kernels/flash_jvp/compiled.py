"""What the compiler makes of the shipped tiles, without a GPU: registers, stack, shared memory, tensor-core products.

`python -m flash_jvp.compiled` runs the launchers of `fused` on a driver that compiles for a named card and launches
nothing, so that what is compiled is what a call on that card would compile. The exit status is 1 if a kernel keeps more
bytes on the stack than allowed (spilled registers), needs more shared memory than the card has, or multiplies 16-bit
matrices on CUDA cores.
"""

import argparse
import collections
import concurrent.futures
import itertools
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_jvp import tuning
from flash_jvp.tuning import DIMS

SHARED_KIB = {
    80: 163,
    86: 99,
    87: 163,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    120: 99,
}  # CUDA programming guide, per block
ARCHS = (80, 86, 90, 100, 120)
STACK = 16  # bytes a thread in 16-bit types
MORE_STACK = {  # what the compiler leaves in the best tiles that were found, by card, kernel and D
    (80, "backward_keys", 64): 40,
    (90, "forward_jvp", 128): 40,
    (90, "forward_tq", 256): 32,
    (90, "backward_keys", 256): 24,
    (120, "backward_keys", 128): 24,
}
STACK_32, STACK_32_256 = 32, 512  # float32; no tile is smaller than 16×16, and at D = 256 its rows are in registers


class Case(NamedTuple):
    """One kernel for one card."""

    arch: int
    kernel: str  # of tuning.KERNELS
    dtype: str
    d: int
    causal: bool = False

    @property
    def stack(self) -> int:
        """Bytes of stack that are allowed."""
        if self.dtype == "float32":
            return STACK_32_256 if self.d == 256 else STACK_32
        return MORE_STACK.get((self.arch, self.kernel, self.d), STACK)


@dataclass(frozen=True)
class Figures:
    """Registers and stack bytes per thread, bytes of shared memory per block, instructions in the text."""

    registers: int
    stack: int
    shared: int
    tensor_core: int
    multiply_add: int

    def complaints(self, case: Case, stack: int | None = None) -> list[str]:
        """What is wrong with it, in words; `stack`: bytes allowed, if not those of the case."""
        found = []
        allowed = case.stack if stack is None else stack
        if self.stack > allowed:
            found.append(f"{self.stack} bytes of stack, allowed {allowed}")
        if self.shared > SHARED_KIB[case.arch] * 1024:
            found.append(f"{self.shared / 1024:.0f} KiB of shared memory, the card has {SHARED_KIB[case.arch]}")
        if case.dtype != "float32" and (self.tensor_core == 0 or self.multiply_add > 1000):
            found.append("products on CUDA cores")
        return found


class Machine:
    """A Triton driver for a card that is not there: kernels are compiled for it and kept, launches do nothing."""

    _numbers = itertools.count()

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.device = next(self._numbers)  # Triton keeps the loaded kernels of each device: none is known to this one
        self.kernels: list[tuple[bytes, int]] = []  # machine code, bytes of shared memory
        self.utils = types.SimpleNamespace(get_device_properties=self._properties, load_binary=self._load)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None

    def _properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}  # `complaints` compares

    def _load(self, name: str, code: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        self.kernels.append((code, shared))
        return None, None, 0, 0, 1024


def call(kernel: str, dtype: torch.dtype, d: int, causal: bool, queries: int = 256, keys: int = 192) -> None:
    """Calls the launcher that runs the kernel, on tensors that hold nothing."""
    from flash_jvp import fused
    from flash_jvp.plain import lse_dtype

    def empty(length: int) -> Tensor:
        return torch.empty(2, length, 2, d, dtype=dtype).transpose(1, 2)

    q, k, v = empty(queries), empty(keys), empty(keys)
    if kernel.startswith("backward"):
        fused.backward(q, q, k, v, q, q.new_empty(q.shape[:3], dtype=lse_dtype(q)), 1.0, causal)
    else:
        tq = None if kernel == "forward" else empty(queries)
        tk, tv = (empty(keys), empty(keys)) if kernel == "forward_jvp" else (None, None)
        fused.forward(q, k, v, tq, tk, tv, 1.0, causal)


def compile_case(case: Case) -> Figures:
    """Compiles it and reads the result. Raises what the compiler raises."""
    import triton

    machine = Machine(case.arch)
    triton.runtime.driver.set_active(machine)
    call(case.kernel, getattr(torch, case.dtype), case.d, case.causal)
    return read(*machine.kernels[1 if case.kernel == "backward_keys" else 0])


def read(code: bytes, shared: int) -> Figures:
    """Figures of machine code, by the disassembler that ships with Triton."""
    usage = _cuobjdump("-res-usage", code)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    count = collections.Counter(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|FFMA2?)\b", _cuobjdump("-sass", code)))
    plain = count.pop("FFMA", 0) + count.pop("FFMA2", 0)
    return Figures(registers, stack, shared, count.total(), plain)


def _cuobjdump(option: str, code: bytes) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cases(archs: Iterable[int], dims: Iterable[int], dtypes: Iterable[str]) -> list[Case]:
    """All kernels for these, without a mask and causal."""
    settings = itertools.product(archs, dtypes, dims, tuning.KERNELS, (False, True))
    return [Case(arch, kernel, dtype, d, causal) for arch, dtype, d, kernel, causal in settings]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_jvp.compiled",
        description="Compile the fused kernels for cards that are not there and check registers and shared memory.",
    )
    parser.add_argument(
        "--arch", nargs="+", metavar="N", type=int, choices=SHARED_KIB, default=ARCHS, help=f"default {ARCHS}"
    )
    parser.add_argument(
        "--dim", nargs="+", metavar="N", type=int, choices=DIMS, default=DIMS, help=f"D, default {DIMS}"
    )
    parser.add_argument("--dtype", nargs="+", default=("bfloat16", "float32"), help="default bfloat16 float32")
    parser.add_argument("--stack", type=int, metavar="BYTES", help=f"allowed, default {STACK} and a few exceptions")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, default 1")
    options = parser.parse_args(arguments)
    try:
        import triton
    except ImportError:
        print("flash_jvp.compiled: Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    if triton.knobs.runtime.interpret:
        print(
            "flash_jvp.compiled: TRITON_INTERPRET is set: unset it, the interpreter compiles nothing", file=sys.stderr
        )
        return 2

    todo = cases(options.arch, options.dim, options.dtype)
    print(f"Triton {triton.__version__}")
    print(f"{'card':<7}{'dtype':<10}{'D':>4}  {'kernel':<24}{'M×N, warps, stages':<20}registers  stack  shared KiB")
    bad = 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for case, future in [(case, pool.submit(compile_case, case)) for case in todo]:
            tile = tuning.shipped(case.kernel, case.arch, getattr(torch, case.dtype).itemsize, case.d)
            kernel = case.kernel + " causal" * case.causal
            print(f"sm_{case.arch:<4}{case.dtype:<10}{case.d:>4}  {kernel:<24}{tile!s:<20}", end="")
            try:
                figures = future.result()
            except Exception as error:  # of the compiler: one line of the table, not the end of it
                bad += 1
                print(f"not compiled: {error}")
                continue
            wrong = "; ".join(figures.complaints(case, options.stack))
            bad += bool(wrong)
            print(f"{figures.registers:>9}{figures.stack:>7}{figures.shared / 1024:>12.1f}  {wrong}", flush=True)
    print(f"{len(todo)} kernels, {bad} with something wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
