"""Downloads arrive whole and verified, go on where they stopped, and say what to do without a network."""

import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcm.artefact import UserError, content_sha256, sha256_folder
from rcm.checkpoints import download, transfer, verify
from rcm.checkpoints.origins import find

downloading = importlib.import_module("rcm.checkpoints.download")  # the function has its name
CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
FLIPPED = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])


class Server(ThreadingHTTPServer):
    """Serves `content` at any path; see the attributes for how."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = CONTENT, '"1"'
        self.cut = len(CONTENT)  # bytes of an answer before it hangs up
        self.ranges, self.length, self.status = True, True, 200
        self.more = 0  # bytes beyond the length that it promised
        self.hold: threading.Event | None = None  # what it waits for in the middle of an answer
        self.requested: list[tuple[int, int] | None] = []  # the range of each answer but for the first byte's
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/checkpoint.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, content = self.server, self.server.content
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if server.status != 200:
            self.send_error(server.status)
            return
        start, stop = (int(asked[1]), int(asked[2] or len(content) - 1) + 1) if asked else (0, len(content))
        if asked and server.ranges and start >= len(content):
            self.send_error(416)
            return
        partial = asked is not None and server.ranges
        span = content[start:stop] if partial else content
        if (start, stop) != (0, 1):
            server.requested.append((start, stop) if partial else None)
        self.send_response(206 if partial else 200)
        self.send_header("ETag", server.etag)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        if server.length:
            self.send_header("Content-Length", str(len(span) + server.more))
        self.end_headers()
        try:
            half = min(server.cut, len(span)) // 2
            self.wfile.write(span[:half])
            if server.hold is not None and (start, stop) != (0, 1):
                server.hold.wait(20)
            self.wfile.write(span[half : server.cut])
            server.sent += len(span[: server.cut])
        except ConnectionError:  # the client has enough
            pass

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(transfer, "DELAY", 0.001)
    monkeypatch.setattr(transfer, "PART", 800_000)  # four parts
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "RCM_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    with serving(server):
        yield server


PARTS = [(0, 800_000), (800_000, 1_600_000), (1_600_000, 2_400_000), (2_400_000, 3_000_000)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def manifest(out: Path) -> dict[str, Any]:
    return json.loads(out.with_name(out.name + ".download.json").read_text())


def test_http_in_parallel_parts(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "x.pth"
    download(server.url, out, SHA.upper())
    assert out.read_bytes() == CONTENT
    assert sorted(server.requested) == PARTS
    assert names(out.parent) == ["x.pth", "x.pth.download.json"]
    known = {"source": server.url, "revision": None, "sha256": SHA}
    assert manifest(out) == known | {"files": {"": {"size": len(CONTENT), "sha256": SHA}}}
    download(server.url, out, SHA)
    assert len(server.requested) == 4  # it is there already


def test_parts_run_at_once(server: Server, tmp_path: Path) -> None:
    """Each answer waits until all parts were asked for."""
    server.hold = threading.Event()
    thread = threading.Thread(target=download, args=(server.url, tmp_path / "x.pth", SHA))
    thread.start()
    while len(server.requested) < 4 and thread.is_alive():
        time.sleep(0.01)
    server.hold.set()
    thread.join()
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("moment", ["transfer", "hashing"])
def test_who_comes_second_waits(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    """Without ranges a second transfer would empty the file that the first one hashes or renames."""
    server.ranges, out = False, tmp_path / "x.pth"
    reached, go_on, hashed = threading.Event(), threading.Event(), downloading._hashed

    def slowly(file: Path) -> dict[str, Any]:
        found = hashed(file)
        reached.set()
        go_on.wait(20)
        return found

    if moment == "transfer":
        server.hold = go_on
    else:
        monkeypatch.setattr(downloading, "_hashed", slowly)
    threads = [threading.Thread(target=download, args=(server.url, out)) for _ in range(2)]
    threads[0].start()
    while not (reached.is_set() or (server.hold and server.requested)):
        time.sleep(0.01)
    threads[1].start()
    said = ""
    while "x.pth is being downloaded by another process; waiting" not in said and threads[1].is_alive():
        said += capsys.readouterr().err
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join()
    assert server.requested == [None] and out.read_bytes() == CONTENT and verify(out) == SHA
    assert names(tmp_path) == ["x.pth", "x.pth.download.json"]


def test_a_lock_that_was_removed_is_no_lock(tmp_path: Path) -> None:
    """Of three that want it, the last one opens the lock's file after the first has removed it."""
    inside: list[str] = []

    def work(name: str) -> None:
        with downloading._alone(tmp_path / "x"):
            inside.append(name)
            assert inside == [name]
            time.sleep(0.002)
            inside.remove(name)
            done.append(name)

    done: list[str] = []
    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(12)]
    for thread in threads:
        thread.start()
        time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert len(done) == 12 and names(tmp_path) == []


@pytest.mark.parametrize("length", [True, False])
def test_a_server_without_ranges(server: Server, tmp_path: Path, length: bool) -> None:
    server.ranges, server.length = False, length
    download(server.url, tmp_path / "x.pth", SHA)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT
    assert server.requested == [None]


def test_without_ranges_a_lost_connection_begins_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut = False, 1_200_000
    with pytest.raises(UserError, match="lost after 1200000 of 3000000 bytes"):
        download(server.url, tmp_path / "x.pth", SHA)
    assert len(server.requested) == transfer.TRIES
    server.cut = len(CONTENT)
    download(server.url, tmp_path / "x.pth", SHA)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


def test_lost_connections_are_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.cut = 300_000
    download(server.url, tmp_path / "x.pth", SHA)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT
    assert {(0, 800_000), (300_000, 800_000), (600_000, 800_000)} < set(server.requested)
    assert server.sent <= len(CONTENT) + 2  # no byte twice


def test_a_later_call_goes_on(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TRIES", 1)
    server.cut = 100_000
    with pytest.raises(UserError, match=r"the connection was lost.*run again to go on"):
        download(server.url, tmp_path / "x.pth", SHA)
    assert names(tmp_path) == [".x.pth.download", ".x.pth.download.parts"]
    server.cut, server.sent = len(CONTENT), 0
    download(server.url, tmp_path / "x.pth", SHA)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT
    assert server.sent <= len(CONTENT) - 100_000 + 1
    assert names(tmp_path) == ["x.pth", "x.pth.download.json"]


def wait_for_halves(server: Server, folder: Path) -> None:
    """Until half of each part is in the journal."""
    journal = folder / ".x.pth.download.parts"
    halves = {f"{part} {(stop - start) // 2}" for part, (start, stop) in enumerate(PARTS)}
    while not journal.exists() or not halves <= set(journal.read_text().splitlines()):
        time.sleep(0.01)


def test_a_killed_process_goes_on(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle of all parts, Ctrl-C a little later: what had arrived is not fetched again."""
    monkeypatch.setattr(transfer, "_CHUNK", 50_000)
    server.hold, out = threading.Event(), tmp_path / "x.pth"
    settings = f"transfer.PART, transfer._CHUNK, transfer._NOTED = {transfer.PART}, {transfer._CHUNK}, 50_000"
    code = (
        f"from rcm.checkpoints import transfer, download; {settings}; download({server.url!r}, {str(out)!r}, {SHA!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    wait_for_halves(server, tmp_path)
    process.kill()
    process.wait()
    assert server.requested.sort() is None and server.requested == PARTS and not out.exists()

    def interrupt() -> None:
        while len(server.requested) < 8:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        hold.set()

    hold = server.hold = threading.Event()
    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        download(server.url, out, SHA)
    signal.signal(signal.SIGINT, before)
    thread.join()
    middles = [(start + (stop - start) // 2, stop) for start, stop in PARTS]
    assert sorted(server.requested[4:]) == middles and not out.exists()
    download(server.url, out, SHA)
    assert out.read_bytes() == CONTENT and names(tmp_path) == ["x.pth", "x.pth.download.json"]


@pytest.mark.parametrize(
    "left", ["a torn journal", "a damaged journal", "another file", "another version", "damage", "no partial file"]
)
def test_whatever_was_left_behind(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    out, partial, journal = (tmp_path / name for name in ("x.pth", ".x.pth.download", ".x.pth.download.parts"))
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "TRIES", 1)
        server.cut = 700_000
        with pytest.raises(UserError):
            download(server.url, out, SHA)
        server.cut = len(CONTENT)
    if left == "a torn journal":
        journal.write_bytes(journal.read_bytes() + b"0 9")
        with monkeypatch.context() as patch:  # what is appended to it is read once more
            patch.setattr(transfer, "TRIES", 1)
            server.cut = 50_000
            with pytest.raises(UserError):
                download(server.url, out, SHA)
            server.cut = len(CONTENT)
    elif left == "a damaged journal":
        journal.write_bytes(journal.read_bytes() + b"0 90 400\n\0\0\n")
    elif left == "another file":
        partial.write_bytes(b"something")
        journal.write_bytes(b"else")
    elif left == "another version":
        server.etag = '"2"'
    elif left == "damage":
        with partial.open("r+b") as file:
            file.write(b"damage")
    else:
        partial.unlink()
    download(server.url, out, SHA)
    assert out.read_bytes() == CONTENT and names(tmp_path) == ["x.pth", "x.pth.download.json"]


def test_the_journal_never_says_more_than_is_on_the_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line comes after an fsync of the file, which was given all its bytes by then."""
    monkeypatch.setattr(transfer, "_NOTED", 100_000)
    monkeypatch.setattr(transfer, "_CHUNK", 50_000)
    monkeypatch.setattr(transfer, "THREADS", 1)
    partial, synced, noted = tmp_path / "x", set[tuple[int, int]](), list[tuple[int, int]]()
    fsync, note = os.fsync, transfer._Transfer._note

    def sync(descriptor: int) -> None:
        content = partial.read_bytes()
        synced.update(
            (part, count - start)
            for part, (start, stop) in enumerate(PARTS)
            for count in range(start, stop + 1, 50_000)
            if content[start:count] == CONTENT[start:count]
        )
        fsync(descriptor)

    def noting(self: transfer._Transfer, part: int, file: Any) -> int:
        count = note(self, part, file)
        assert (part, count) in synced
        noted.append((part, count))
        return count

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(transfer._Transfer, "_note", noting)
    transfer.transfer(find(server.url).files[""], partial, lambda count: None)
    lines = transfer.journal_of(partial).read_text().splitlines()[1:]
    assert [tuple(map(int, line.split())) for line in lines] == noted and len(noted) >= 4 * 7


def test_a_file_that_changes_while_it_is_fetched(server: Server, tmp_path: Path) -> None:
    remote = find(server.url).files[""]
    server.etag = '"2"'
    with pytest.raises(UserError, match="has changed while it was fetched"):
        transfer.transfer(remote, tmp_path / "x", lambda count: None)


def test_signatures_are_neither_said_nor_recorded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a new signature is no new source."""
    out, signed = tmp_path / "x.pth", f"{server.url}?X-Amz-Signature=secret&part=1"
    for status in (404, 503):
        server.status = status
        with pytest.raises(UserError, match=re.escape(server.url)) as caught:
            download(signed, out)
        assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="is no address: write its blanks") as caught:
        download(f"{server.url}?secret=1 2", out)
    assert "secret" not in str(caught.value)
    server.status = 200
    download(signed, out)
    assert manifest(out)["source"] == server.url and "secret" not in Path(f"{out}.download.json").read_text()
    asked = len(server.requested)
    download(f"{server.url}?X-Amz-Signature=another", out)
    assert len(server.requested) == asked == 4
    with pytest.raises(UserError, match=r"the address at 127\.0\.0\.1 holds a user or a password") as caught:
        download(server.url.replace("//", "//me:secret@"), out)
    assert "secret" not in str(caught.value)
    out.unlink()
    monkeypatch.setenv("RCM_OFFLINE", "1")
    with pytest.raises(UserError, match="switched off") as caught:
        download(signed, out)
    assert "secret" not in str(caught.value)


def test_wrong_content_never_appears(server: Server, tmp_path: Path) -> None:
    server.content = FLIPPED
    with pytest.raises(UserError, match=f"expected {SHA}"):
        download(server.url, tmp_path / "x.pth", SHA)
    assert names(tmp_path) == []


def test_a_server_that_promises_more_than_it_sends(server: Server, tmp_path: Path) -> None:
    server.ranges, server.more = False, 10
    with pytest.raises(UserError, match="lost after 3000000 of 3000010 bytes"):
        download(server.url, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize(("status", "said"), [(404, "the server says 404"), (401, "says 401"), (503, "503")])
def test_refusals(server: Server, tmp_path: Path, status: int, said: str) -> None:
    server.status = status
    with pytest.raises(UserError, match=said):
        download(server.url, tmp_path / "x.pth", SHA)
    assert names(tmp_path) == []


def test_empty_file(server: Server, tmp_path: Path) -> None:
    server.content = b""
    download(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b""


def test_a_disk_without_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"needs 0\.00 GB more at .*make room"):
        download(server.url, tmp_path / "x.pth", SHA)


def test_a_folder_needs_room_for_all_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in "ab":
        (source / name).write_bytes(CONTENT)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5_000_000}))
    with pytest.raises(UserError, match=r"needs 0\.01 GB more at .*, where there are 0\.01 GB; make room"):
        download(f"{source}/", out)
    assert names(tmp_path) == ["source"]  # before the first byte
    (tmp_path / ".out.download").mkdir()
    (tmp_path / ".out.download" / "a").write_bytes(CONTENT)
    download(f"{source}/", out)  # half of it was there


def test_a_disk_that_fills_is_no_fault_of_the_network(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Iterator[None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer._Transfer, "_attempt", full)
    with pytest.raises(OSError, match="No space left"):
        download(server.url, tmp_path / "x.pth", SHA)


# --- What is there, and what has become of it


def test_the_first_download_is_recorded_and_later_changes_are_found(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "x.pth"
    download(server.url, out)
    assert manifest(out)["sha256"] == SHA and verify(out) == SHA
    out.write_bytes(FLIPPED)
    for use in (lambda: download(server.url, out), lambda: verify(out), lambda: verify(out, whole=False)):
        with pytest.raises(UserError, match=r"x\.pth has changed since it was downloaded.*remove .*x\.pth to fetch it"):
            use()
    out.unlink()
    download(server.url, out)
    assert out.read_bytes() == CONTENT
    server.content = FLIPPED
    download(server.url, out, hashlib.sha256(FLIPPED).hexdigest())  # the configuration now means another file
    assert out.read_bytes() == FLIPPED


def test_the_first_digits_of_a_hash(server: Server, tmp_path: Path) -> None:
    out, few = tmp_path / "x.pth", SHA[:8]
    wrong = few[:7] + ("0" if few[7] != "0" else "1")
    with pytest.raises(UserError, match=f"has SHA-256 {SHA}, expected {wrong}"):
        download(server.url, out, wrong)
    assert names(tmp_path) == []
    download(server.url, out, few.upper())
    assert manifest(out)["sha256"] == SHA
    asked = len(server.requested)
    for known in (few, SHA[:20], SHA, None):
        download(server.url, out, known)
    assert len(server.requested) == asked
    (tmp_path / "x.pth.download.json").unlink()  # as if put there by hand
    download(server.url, out, few)
    assert len(server.requested) == asked and manifest(out)["sha256"] == SHA


def test_of_the_first_digits_the_first_download_notes_the_rest(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file may begin with the same eight; the names of the two stand in for such a pair."""
    out, other = tmp_path / "x.pth", SHA[:8] + hashlib.sha256(FLIPPED).hexdigest()[8:]
    download(server.url, out, SHA[:8])
    out.unlink()
    sha256_file = downloading.sha256_file
    alike = lambda path: other if (found := sha256_file(path)) != SHA else found  # noqa: E731
    monkeypatch.setattr(downloading, "sha256_file", alike)
    server.content = FLIPPED
    with pytest.raises(UserError, match=f"has SHA-256 {other}, expected {SHA}"):
        download(server.url, out, SHA[:8])
    assert names(tmp_path) == ["x.pth.download.json"]
    download(server.url, tmp_path / "new.pth", SHA[:8])  # of which nothing is known
    assert manifest(tmp_path / "new.pth")["sha256"] == other


def test_verify_what_was_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    assert verify(tmp_path / "x") == SHA and verify(tmp_path / "x", whole=False) is None
    whole = {"source": "x", "sha256": SHA, "files": {"": {"size": len(CONTENT), "sha256": SHA}}}
    torn = ({}, whole | {"sha256": None}, whole | {"source": 1}, whole | {"files": {"": {"size": 1, "sha256": None}}})
    for content in torn:
        (tmp_path / "x.download.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"x\.download\.json is damaged"):
            verify(tmp_path / "x")


def test_what_was_put_there_by_hand_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(CONTENT)
    download(server.url, tmp_path / "x.pth", SHA)
    assert server.requested == [] and manifest(tmp_path / "x.pth")["sha256"] == SHA


def test_without_a_network_it_says_what_to_put_where(server: Server, tmp_path: Path) -> None:
    out, url = tmp_path / "x.pth", server.url
    server.server_close()  # nobody answers
    with pytest.raises(
        UserError, match=rf"cannot reach .*put the file {url} with SHA-256 {SHA} at {re.escape(str(out))}"
    ):
        download(url, out, SHA)


def test_offline(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.pth"
    monkeypatch.setenv("RCM_OFFLINE", "1")
    with pytest.raises(UserError, match=rf"switched off.*put the file {server.url} with SHA-256 {SHA} at {out}"):
        download(server.url, out, SHA)
    assert server.requested == []
    out.write_bytes(FLIPPED)
    with pytest.raises(UserError, match=f"expected {SHA}"):
        download(server.url, out, SHA)
    out.write_bytes(CONTENT)
    download(server.url, out, SHA)  # done as told
    out.unlink()
    with pytest.raises(UserError, match=rf"{out} \(3000000 bytes, SHA-256 {SHA}\)"):  # known from the manifest
        download(server.url, out)
    download(str(Path(__file__)), tmp_path / "test.py")  # paths need no network
    few = tmp_path / "few.pth"
    with pytest.raises(UserError, match=rf"with SHA-256 {SHA[:8]}\.\.\. at {few}"):
        download(server.url, few, SHA[:8])
    few.write_bytes(FLIPPED)
    with pytest.raises(UserError, match=f"expected {SHA[:8]};"):
        download(server.url, few, SHA[:8])
    few.write_bytes(CONTENT)
    download(server.url, few, SHA[:8])
    assert manifest(few)["sha256"] == SHA


# --- Paths


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "with space.pth"
    source.write_bytes(CONTENT)
    for number, name in enumerate(["with space.pth", str(source), source.as_uri()]):
        download(name, f"{number}.pth", SHA)
        assert Path(f"{number}.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_source_leaves_the_old_file(tmp_path: Path, damage: str) -> None:
    source, out = tmp_path / "source.pth", tmp_path / "x.pth"
    source.write_bytes({"truncated": CONTENT[:-5], "flipped": FLIPPED, "empty": b""}[damage])
    out.write_bytes(b"old")
    with pytest.raises(UserError, match=re.escape(str(source))):
        download(str(source), out, SHA)
    assert out.read_bytes() == b"old"


def test_folders(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    (source / "a.json").write_text("{}")
    (source / "deep" / "b").write_bytes(CONTENT)
    with pytest.raises(UserError, match="trailing slash"):
        download(str(source), out)
    digest = sha256_folder(source)
    with pytest.raises(UserError, match="expected 0000"):
        download(f"{source}/", out, "0" * 64)
    download(f"{source}/", tmp_path / "few", digest[:16])
    assert manifest(tmp_path / "few")["sha256"] == digest
    download(f"{source}/", out, digest)
    assert sha256_folder(out) == digest == content_sha256(out) == manifest(out)["sha256"] == verify(out)
    assert names(tmp_path) == ["few", "few.download.json", "out", "out.download.json", "source"]
    (out / "deep" / "b").unlink()
    with pytest.raises(UserError, match=r"deep/b is missing since it was downloaded"):
        download(f"{source}/", out, digest)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"mine is there already"):
        download(f"{source}/", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth does not exist"):
        download(str(tmp_path / "absent.pth"), tmp_path / "x", SHA)
    for address in ("ftp://example.org/x.pth", "s3://bucket", "hf://owner/x"):
        with pytest.raises(UserError, match=address.partition(":")[0]):
            download(address, tmp_path / "x", SHA)
    for wrong in ("", "abc", SHA[:7], SHA + "0", "z" * 64):
        with pytest.raises(UserError, match="64 hexadecimal digits"):
            download("x.pth", tmp_path / "x", wrong)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("module", "source"), [("boto3", "s3://b/x"), ("huggingface_hub", "hf://a/b/x")])
def test_without_the_extra_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the package {module}: install it with `pip install -e \.\[models\]`"):
        download(source, tmp_path / "x")
