"""One server of stages in miniature for all tests of faults that ask for it."""

from collections.abc import Iterator

import pytest

from .miniature import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("faults"))
    yield server
    server.close()
