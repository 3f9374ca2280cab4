"""A profiler's trace of some iterations, on demand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from rcm.artefact import atomic_file


class Profiler:
    """Traces the iterations from the first to the last of `span` into `path`, to be opened in chrome://tracing.

    Use it as a context: a run that ends within the span leaves the trace of the iterations until then.
    """

    def __init__(self, span: Sequence[int] | None, path: Path):
        self.span, self.path = span, path
        self._running: profile | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._export()

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """What is run inside is one iteration."""
        if self.span and self._running is None and self.span[0] <= iteration <= self.span[1]:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = profile(activities=kinds, record_shapes=True, profile_memory=True)
            self._running.start()
        yield
        if self.span and iteration == self.span[1]:
            self._export()

    def _export(self) -> None:
        if self._running is None:
            return
        self._running.stop()
        with atomic_file(self.path) as temporary:
            self._running.export_chrome_trace(str(temporary))
        self._running = None
