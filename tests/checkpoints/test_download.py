"""Downloads arrive whole and verified, go on where they stopped, and say what to do without a network."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcm.artefact import UserError
from rcm.checkpoints import download

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `cut` bytes at a time before it hangs up; with or without ranges; or an error."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.ranges, self.status = CONTENT, len(CONTENT), True, 200
        self.requested: list[str | None] = []  # the Range of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/checkpoint.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked, content, server = self.headers.get("Range"), self.server.content, self.server
        server.requested.append(asked)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + server.cut])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_http(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "x.pth"
    download(server.url, SHA.upper(), out)
    assert out.read_bytes() == CONTENT
    assert names(out.parent) == ["x.pth"]
    download(server.url, SHA, out)
    assert len(server.requested) == 1  # it is there already


def test_lost_connection_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.cut = 1_200_000
    download(server.url, SHA, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").read_bytes() == CONTENT
    assert server.requested == [None, "bytes=1200000-", "bytes=2400000-"]


def test_a_later_call_goes_on(server: Server, tmp_path: Path) -> None:
    server.cut = 500_000
    with pytest.raises(UserError, match="connection lost after 1500000 of 3000000 bytes"):
        download(server.url, SHA, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
    server.cut = len(CONTENT)
    download(server.url, SHA, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").read_bytes() == CONTENT
    assert server.requested[-1] == "bytes=1500000-"
    assert names(tmp_path) == ["x.pth"]


def test_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / f".x.pth.{SHA[:8]}.download").write_bytes(CONTENT[:1000])
    download(server.url, SHA, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"something else", CONTENT, CONTENT + b"more"], ids=["other", "complete", "too much"])
def test_whatever_was_left_behind(server: Server, tmp_path: Path, left: bytes) -> None:
    (tmp_path / f".x.pth.{SHA[:8]}.download").write_bytes(left)
    download(server.url, SHA, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").read_bytes() == CONTENT
    assert names(tmp_path) == ["x.pth"]


def test_wrong_content_never_appears(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(UserError, match=f"expected {SHA}"):
        download(server.url, SHA, tmp_path / "x.pth")
    assert names(tmp_path) == []


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, 3)])
def test_refusals(server: Server, tmp_path: Path, status: int, requests: int) -> None:
    server.status = status
    with pytest.raises(UserError, match=str(status)):
        download(server.url, SHA, tmp_path / "x.pth")
    assert len(server.requested) == requests
    assert not (tmp_path / "x.pth").exists()


def test_without_a_network_it_says_what_to_put_where(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "x.pth"
    url = server.url
    server.server_close()  # nobody answers
    with pytest.raises(UserError, match=f"put the file with SHA-256 {SHA} at {re.escape(str(out))}"):
        download(url, SHA, out)
    out.write_bytes(CONTENT)
    download(url, SHA, out)  # done as told


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "with space.pth"
    source.write_bytes(CONTENT)
    for number, name in enumerate(["with space.pth", str(source), source.as_uri()]):
        download(name, SHA, f"{number}.pth")
        assert Path(f"{number}.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_source_leaves_the_old_file(tmp_path: Path, damage: str) -> None:
    source, out = tmp_path / "source.pth", tmp_path / "x.pth"
    flipped = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    source.write_bytes({"truncated": CONTENT[:-5], "flipped": flipped, "empty": b""}[damage])
    out.write_bytes(b"old")
    with pytest.raises(UserError, match=re.escape(str(source))):
        download(str(source), SHA, out)
    assert out.read_bytes() == b"old"


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth does not exist"):
        download(str(tmp_path / "absent.pth"), SHA, tmp_path / "x")
    with pytest.raises(UserError, match="ftp://"):
        download("ftp://example.org/x.pth", SHA, tmp_path / "x")
    for wrong in ("", "abc", "z" * 64):
        with pytest.raises(UserError, match="64 hexadecimal digits"):
            download("x.pth", wrong, tmp_path / "x")
