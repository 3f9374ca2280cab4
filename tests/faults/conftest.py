"""One server of stages in miniature for all tests of faults that ask for it."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rcm.cli import config

from .miniature import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("faults"))
    yield server
    server.close()


@functools.cache
def composed(overrides: tuple[str, ...], folder: Path, plain: Any = config._composed) -> dict[str, Any]:
    """What takes most of the time of a stage that refuses."""
    return plain(list(overrides))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        config, "_composed", lambda overrides: copy.deepcopy(composed(tuple(overrides), config.config_dir()))
    )
