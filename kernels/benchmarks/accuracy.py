"""The accuracy grid of flash_jvp: each result against float64 `torch.func.jvp` or `autograd` of plain attention.

    python kernels/benchmarks/accuracy.py --backend torch             # every combination
    python kernels/benchmarks/accuracy.py --backend triton --quick    # every pair of settings at least once

x passes where ‖x - ref‖ ≤ 2·‖naive - ref‖ + 4·eps·(‖ref‖ + ‖v‖ + ‖tv‖), for gradients with + ‖dO‖: eps is that of the
dtype, naive the same computation done plainly in that precision. So that a few wrong rows do not drown in the whole,
the largest norm of a row has to stay within four times the bound as well. NaN and Inf fail.
"""

import argparse
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache, cached_property, partial
from itertools import combinations, groupby, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import flash_jvp

LENGTHS = (1, 15, 63, 64, 65, 127, 999, 1000)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Attend = Callable[..., Tensor]
TANGENTS = ("", "q", "k", "v", "qk", "qv", "kv", "qkv")  # those present; with none the gradients are checked as well
LOGITS = (0, 80, -80)  # row maximum after scaling; 0: as random inputs have it


@dataclass(frozen=True)
class Problem:
    """What fixes the inputs, and so the reference that its cases share."""

    queries: int
    keys: int
    size: int
    dtype: str
    causal: bool
    logits: int
    grouped: bool

    def __str__(self) -> str:
        flags = [f"logits{self.logits:+}"] * bool(self.logits) + ["causal"] * self.causal + ["grouped"] * self.grouped
        return " ".join([f"{self.queries}x{self.keys}", f"D{self.size}", self.dtype, *flags])


@dataclass(frozen=True)
class Case:
    problem: Problem
    tangents: str
    strided: bool

    def __str__(self) -> str:
        return f"{self.problem} tangents={self.tangents or 'none'}{' strided' * self.strided}"


def every_case(axes: Sequence[tuple[Any, ...]]) -> list[Case]:
    return [Case(Problem(*setting[:-2]), *setting[-2:]) for setting in product(*axes)]


def every_pair(axes: Sequence[tuple[Any, ...]]) -> list[Case]:
    """Cases that hold every pair of two axes' values at least once, chosen greedily and the same every time."""
    pairs = [((i, a), (j, b)) for (i, x), (j, y) in combinations(enumerate(axes), 2) for a in x for b in y]
    missing = dict.fromkeys(pairs)  # a set that keeps its order
    cases: list[Case] = []

    def gain(chosen: dict[int, Any], axis: int, value: Any) -> int:
        return sum(tuple(sorted([(i, x), (axis, value)], key=lambda p: p[0])) in missing for i, x in chosen.items())

    while missing:
        chosen = dict(next(iter(missing)))
        for axis, values in enumerate(axes):
            if axis not in chosen:
                shift = len(cases) % len(values)  # ties go round, for a varied filling
                chosen[axis] = max(values[shift:] + values[:shift], key=partial(gain, chosen, axis))
        setting = sorted(chosen.items())
        for pair in combinations(setting, 2):
            missing.pop(pair, None)
        *problem, tangents, strided = (value for _, value in setting)
        cases.append(Case(Problem(*problem), tangents, strided))
    return sorted(cases, key=lambda case: astuple(case.problem))


def axes(dtypes: Iterable[str], longest: int = max(LENGTHS)) -> list[tuple[Any, ...]]:
    lengths = tuple(s for s in LENGTHS if s <= longest)
    return [
        lengths,
        lengths,
        (16, 64, 128),
        tuple(dtypes),
        (False, True),
        LOGITS,
        (False, True),
        TANGENTS,
        (False, True),
    ]


@cache
def _masked(queries: int, keys: int, device: str) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)


def shared(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values with a head for each query head."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    s = q @ shared(k, q).mT * q.shape[-1] ** -0.5
    return s.masked_fill(_masked(*s.shape[2:], str(s.device)), -torch.inf) if causal else s


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attention as its formula has it; query head h reads key head h // (Hq // Hkv)."""
    return torch.softmax(scores(q, k, causal), dim=-1) @ shared(v, q)


def plain_jvp(
    primals: Sequence[Tensor], tangents: Sequence[Tensor | None], causal: bool = False
) -> tuple[Tensor, Tensor]:
    """`torch.func.jvp` of plain attention along the tangents that are given."""
    given = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def attend(*moved: Tensor) -> Tensor:
        inputs = dict(enumerate(primals)) | dict(zip(given, moved, strict=True))
        return plain(inputs[0], inputs[1], inputs[2], causal)

    o, to, *_ = torch.func.jvp(attend, tuple(primals[i] for i in given), tuple(tangents[i] for i in given))
    return o, to


def random_inputs(
    q_shape: Sequence[int], kv_shape: Sequence[int], generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and their tangents in float32, such that each term of the derivative counts at every length.

    Logits of standard deviation 2 (few keys share a row), values that are not centred, tangents partly along their
    primals: else rowsum(H) ∘ O falls with the number of keys below the rounding of the lower precisions.
    """
    q, k, v, *noise = (
        torch.randn(*shape, generator=generator, device=generator.device) for shape in (q_shape, kv_shape, kv_shape) * 2
    )
    primals = [2 * q, k, v + 1]
    return primals, [0.5 * x + tangent for x, tangent in zip(primals, noise, strict=True)]


def norms(x: Tensor) -> Tensor:
    """‖x‖ and the largest ‖row‖."""
    rows = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return torch.stack([torch.linalg.vector_norm(rows), rows.max()])


class Reference:
    """Inputs of a problem, and the exact and naive answers to it, each computed once and when asked for."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem = problem
        dtype = DTYPES[problem.dtype]
        heads = 1 if problem.queries * problem.keys > 500_000 else 2  # where the time goes one suffices
        batch = heads * max(1, 8 // min(problem.queries, problem.keys))  # else few rows are naively right by luck
        q_shape = (batch, heads * (1 + problem.grouped), problem.queries, problem.size)
        kv_shape = (batch, heads, problem.keys, problem.size)
        generator = torch.Generator(device).manual_seed(zlib.crc32(str(problem).encode()))
        (q, k, v), tangents = random_inputs(q_shape, kv_shape, generator)
        if problem.logits:
            q, k = _shifted(q, k, problem.logits, problem.causal)
        self.primals = [x.to(dtype) for x in (q, k, v)]
        self.tangents = dict(zip("qkv", (x.to(dtype) for x in tangents), strict=True))
        self._answers: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self.eps = torch.finfo(dtype).eps
        self.gradient = torch.randn(q_shape, generator=generator, device=device).to(dtype)
        if problem.logits:
            maxima = scores(self.primals[0].double(), self.primals[1].double(), problem.causal).amax(-1)
            assert (maxima - problem.logits).abs().max() < 2, "row maxima are not what the case says"

    def given(self, tangents: str) -> list[Tensor | None]:
        return [self.tangents[name] if name in tangents else None for name in "qkv"]

    def answers(self, tangents: str) -> dict[str, tuple[Tensor, Tensor]]:
        """The exact o and to, or o and gradients where there are no tangents, each with the bound of its errors."""
        if tangents not in self._answers:
            exact, naive = self._sum(self._exact, tangents), self._naive(tangents)
            size = norms(self.primals[2]) + (norms(self.tangents["v"]) if "v" in tangents else 0)
            self._answers[tangents] = {}
            for name, x in exact.items():
                slack = 4 * self.eps * (size + norms(self.gradient) if name.startswith("d") else size)
                self._answers[tangents][name] = x, bound(x, naive[name], self.eps, slack)
        return self._answers[tangents]

    @cached_property
    def _exact(self) -> dict[str, dict[str, Tensor]]:
        """Results along each tangent alone, and the gradients under "": the derivative is linear in the tangents."""
        primals = [x.double() for x in self.primals]
        alone = {name: [None if t is None else t.double() for t in self.given(name)] for name in "qkv"}
        return self._terms(primals, alone) | {
            "": gradients(plain, primals, self.gradient.double(), self.problem.causal)
        }

    def _terms(self, primals: list[Tensor], alone: dict[str, list[Tensor | None]]) -> dict[str, dict[str, Tensor]]:
        results = {name: plain_jvp(primals, tangents, self.problem.causal) for name, tangents in alone.items()}
        return {name: {"o": o, "to": to} for name, (o, to) in results.items()}

    def _naive(self, tangents: str) -> dict[str, Tensor]:
        if not tangents:
            return gradients(plain, self.primals, self.gradient, self.problem.causal)
        return dict(zip(("o", "to"), plain_jvp(self.primals, self.given(tangents), self.problem.causal), strict=True))

    def _sum(self, terms: dict[str, dict[str, Tensor]], tangents: str) -> dict[str, Tensor]:
        if not tangents:
            return terms[""]
        to = terms[tangents[0]]["to"]
        for name in tangents[1:]:
            to = to + terms[name]["to"]
        return {"o": terms[tangents[0]]["o"], "to": to}

    def excess(self, tangents: str, results: dict[str, Tensor]) -> dict[str, float]:
        """The error of each result as a multiple of its bound; infinite where it has NaN or Inf."""
        answers, dtype = self.answers(tangents), self.primals[0].dtype
        return {name: excess(x, *answers[name]) if x.dtype == dtype else math.inf for name, x in results.items()}


def bound(exact: Tensor, naive: Tensor, eps: float, slack: Tensor | float = 0.0) -> Tensor:
    """2·‖naive - exact‖ + 4·eps·‖exact‖ + slack, for each of the two norms."""
    return 2 * norms(naive - exact) + 4 * eps * norms(exact) + slack


def excess(x: Tensor, exact: Tensor, bound: Tensor) -> float:
    """The error of x as a multiple of its bound, the worse of the two norms."""
    if x.shape != exact.shape:
        return math.inf
    whole, row = (norms(x - exact) / bound).tolist()
    return max(whole, row / 4) if math.isfinite(whole + row) else math.inf


def gradients(attend: Attend, primals: Sequence[Tensor], gradient: Tensor, causal: bool) -> dict[str, Tensor]:
    """o, and the gradients of its product with `gradient`."""
    leaves = [x.detach().requires_grad_() for x in primals]
    o = attend(*leaves, causal=causal)
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, gradient), strict=True))}


def _shifted(q: Tensor, k: Tensor, maximum: int, causal: bool) -> tuple[Tensor, Tensor]:
    """q and k moved along one direction, as in trained networks: the largest logit of each row becomes `maximum`."""
    q = q / 2 + maximum / (1.5 * q.shape[-1] ** 0.5)
    k = k + 1.5  # with more, the gradient of q is ill-conditioned: FlashAttention's takes rowsum(dO ∘ O) of a rounded O
    return q * (maximum / scores(q, k, causal).amax(-1, keepdim=True)), k


def strided(x: Tensor) -> Tensor:
    """The same values as every second channel of a (B, S, H, 2 D) tensor: no stride is that of a contiguous one."""
    batch, heads, length, size = x.shape
    wide = torch.full((batch, length, heads, size, 2), torch.nan, dtype=x.dtype, device=x.device)
    view = wide[..., 0].transpose(1, 2)
    return view.copy_(x)


def run(case: Case, reference: Reference, backend: str) -> dict[str, Tensor]:
    """What flash_jvp gives for the case."""
    layout = strided if case.strided else torch.clone
    primals = [layout(x) for x in reference.primals]
    causal = case.problem.causal
    if not case.tangents:
        attend = partial(flash_jvp.attention, backend=backend)
        return gradients(attend, primals, layout(reference.gradient), causal)
    tangents = [None if t is None else layout(t) for t in reference.given(case.tangents)]
    o, to = flash_jvp.attention_jvp(*primals, *tangents, causal=causal, backend=backend)
    return {"o": o, "to": to}


def judge(cases: Iterable[Case], backend: str, device: str) -> Iterator[tuple[Case, dict[str, float]]]:
    """Each case with the error of its results as a multiple of the bound; those of one problem follow one another."""
    for problem, group in groupby(cases, key=lambda case: case.problem):
        reference = Reference(problem, device)
        for case in group:
            yield case, reference.excess(case.tangents, run(case, reference, backend))


def counted(items: Iterable[Any], total: int) -> Iterable[Any]:
    """The items, with a progress bar on a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _counted(items, total)
    return tqdm(items, total=total, unit="case", disable=None)


def _counted(items: Iterable[Any], total: int) -> Iterator[Any]:
    for n, item in enumerate(items, 1):
        yield item
        if n % 1000 == 0:
            print(f"{n} of {total} cases", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", choices=("auto", "math", "torch", "triton"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: cuda if there is one (here: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="default: all three")
    parser.add_argument("--quick", action="store_true", help="only a set of cases that holds every pair of settings")
    parser.add_argument("--max-length", type=int, default=max(LENGTHS), metavar="S", help="leave longer ones out")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_float32_matmul_precision("highest")  # no TF32, in the kernel and in what it is compared with
    settings = axes(options.dtype, options.max_length)
    cases = every_pair(settings) if options.quick else every_case(settings)
    failed, worst, began = 0, (0.0, "no case"), time.perf_counter()
    for case, excesses in counted(judge(cases, options.backend, options.device), len(cases)):
        name = max(excesses, key=excesses.__getitem__)
        worst = max(worst, (excesses[name], f"{name} of {case}"))
        for result, error in excesses.items():
            if error > 1:
                failed += 1
                print(f"{error:9.3g} x bound: {result} of {case}", flush=True)
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    print(
        f"{len(cases)} cases of backend {options.backend} on {where} (torch {torch.__version__}) in "
        f"{time.perf_counter() - began:.0f} s: {failed} results outside the bound; "
        f"worst error / bound {worst[0]:.3f}, {worst[1]}"
    )
    return bool(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:  # flash_jvp refuses, with a sentence for the user
        sys.exit(str(error))
