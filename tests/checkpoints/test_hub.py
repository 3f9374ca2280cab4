"""Downloads from the Hugging Face Hub: its own client talks to a small Hub on this machine."""

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest

from rcm.artefact import UserError
from rcm.checkpoints import download, transfer, verify
from rcm.checkpoints.origins import is_folder
from rcm.cli.config import config_dir, several

from .test_download import CONTENT, FLIPPED, SHA, manifest, names, serving

COMMIT = "a" * 40
SMALL = b'{"model_type": "t5"}'
GIT = {SMALL: "d83c89006dd40c57abad393ea15cb4a18cdef566"}  # as `git hash-object` has it
TOKEN = "hf_of_this_test"


class Hub(ThreadingHTTPServer):
    """One repository, `lab/model`, at one commit; what is large is stored elsewhere, as on the Hub."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {
            "big.safetensors": CONTENT,
            "config.json": SMALL,
            "text/tokenizer.json": SMALL,
            "text/w.bin": CONTENT,
        }
        self.gated = False
        self.requested: list[tuple[str, str, str | None, str | None]] = []  # method, path, range, authorization

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def entry(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": GIT.get(content, "0" * 40)}
        if len(content) > 1000:
            entry["lfs"] = {"oid": SHA, "size": len(content), "pointerSize": 134}
        return entry


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.say(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        path, server = unquote(self.path.partition("?")[0]), self.server
        server.requested.append((self.command, path, self.headers["Range"], self.headers["Authorization"]))
        if path.startswith("/storage/"):
            self.send_content(server.files[path.removeprefix("/storage/")])
            return
        if not re.match(r"/(api/models/)?lab/model(/|$)", path):
            self.refuse(401, "RepoNotFound")  # so that it does not tell what is private
        elif info := re.fullmatch(r"/api/models/lab/model(/revision/(.*))?", path):
            if info[2] not in (None, "main", "v1", COMMIT):
                self.refuse(404, "RevisionNotFound")
            else:
                body = {"_id": "1", "id": "lab/model", "sha": COMMIT, "tags": [], "siblings": []}
                self.say(200, json.dumps(body).encode(), Content_Type="application/json")
        elif path.startswith(f"/api/models/lab/model/paths-info/{COMMIT}"):
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            found = [server.entry(name) for name in asked["paths"] if name in server.files]
            self.say(200, json.dumps(found).encode(), Content_Type="application/json")
        elif tree := re.fullmatch(f"/api/models/lab/model/tree/{COMMIT}/?(.*)", path):
            found = [server.entry(name) for name in server.files if name.startswith(f"{tree[1]}/" if tree[1] else "")]
            if found:
                self.say(200, json.dumps(found).encode(), Content_Type="application/json")
            else:
                self.refuse(404, "EntryNotFound")
        elif file := re.fullmatch(f"/lab/model/resolve/{COMMIT}/(.*)", path):
            self.resolve(file[1])
        else:
            self.refuse(404, "EntryNotFound")

    do_POST = do_HEAD = do_GET

    def resolve(self, name: str) -> None:
        if self.server.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.refuse(403 if self.headers["Authorization"] else 401, "GatedRepo")
            return
        content = self.server.files[name]
        if len(content) <= 1000:
            self.send_content(content)
            return
        elsewhere = f"http://localhost:{self.server.server_port}/storage/{name}"  # another host by name
        self.say(302, Location=elsewhere, X_Linked_Etag=f'"{SHA}"', X_Linked_Size=str(len(content)))

    def send_content(self, content: bytes) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if span is None:
            self.say(200, content, ETag='"1"')
            return
        start, stop = int(span[1]), int(span[2]) + 1
        self.say(206, content[start:stop], ETag='"1"', Content_Range=f"bytes {start}-{stop - 1}/{len(content)}")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(transfer, "DELAY", 0.001)
    monkeypatch.setattr(transfer, "PART", 800_000)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "RCM_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with serving(hub):
        yield hub


def test_a_file(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    download("hf://lab/model@v1/big.safetensors", out)
    assert out.read_bytes() == CONTENT
    assert manifest(out) == {
        "source": "hf://lab/model@v1/big.safetensors",
        "revision": COMMIT,
        "sha256": SHA,
        "files": {"": {"size": len(CONTENT), "sha256": SHA}},
    }
    assert len([span for _, path, span, _ in hub.requested if path.startswith("/storage/") and span]) == 4
    asked = len(hub.requested)
    download("hf://lab/model@v1/big.safetensors", out)
    assert len(hub.requested) == asked


def test_the_hubs_record_is_compared(hub: Hub, tmp_path: Path) -> None:
    hub.files["big.safetensors"] = FLIPPED
    with pytest.raises(UserError, match=rf"hf://lab/model/big\.safetensors has SHA-256 .*expected {SHA}"):
        download("hf://lab/model/big.safetensors", tmp_path / "x")
    hub.files["config.json"] = SMALL.replace(b"5", b"6")
    with pytest.raises(UserError, match=r"config\.json is .* to git, expected 0000"):
        download("hf://lab/model/config.json", tmp_path / "x")
    with pytest.raises(UserError, match="expected 0000"):  # the caller's own comes first
        download("hf://lab/model/big.safetensors", tmp_path / "x", "0" * 64)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["big.safetensors", "config.json", "text/tokenizer.json", "text/w.bin"]),
        ("text/", ["tokenizer.json", "w.bin"]),
        ("*.json", ["config.json"]),
        ("text/*.json", ["tokenizer.json"]),
        ("[cm]*", ["config.json"]),
        ("[!c]*", ["big.safetensors"]),
        ("*.[js]*", ["big.safetensors", "config.json"]),
        ("t[a-e]xt/*.[!j]*", ["text/w.bin"]),
        ("text/[tw]*", ["tokenizer.json", "w.bin"]),
        ("text/?.*", ["w.bin"]),
    ],
)
def test_folders_and_patterns(hub: Hub, tmp_path: Path, pattern: str, expected: list[str]) -> None:
    out = tmp_path / "out"
    download(f"hf://lab/model/{pattern}", out)
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == expected == sorted(manifest(out)["files"])
    assert verify(out) == manifest(out)["sha256"]
    assert all(path.read_bytes() in (SMALL, CONTENT) for path in out.rglob("*") if path.is_file())
    assert names(tmp_path) == ["out", "out.download.json"]


def test_the_pipeline_and_the_download_agree_on_folders() -> None:
    """The one has no need of PyTorch, so each has its own rule."""
    texts = (path.read_text(encoding="utf-8") for path in config_dir().rglob("*.yaml"))
    sources = {source for text in texts for source in re.findall(r"^ *source: (\S+)", text, re.MULTILINE)}
    assert len(sources) > 20 and any("[" in source for source in sources)
    assert [source for source in sources if several(source) != is_folder(source)] == []


def test_a_gated_repository(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = True
    for token in (None, "hf_of_a_stranger"):  # 401 and 403
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            UserError, match=rf"lab/model is gated: accept its licence at {hub.url}/lab/model and set HF_"
        ):
            download("hf://lab/model/big.safetensors", tmp_path / "x")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    download("hf://lab/model/big.safetensors", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert {who for _, path, _, who in hub.requested if path.startswith("/storage/")} == {None}  # not told to others


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://lab/other/x", "no repository lab/other.*check the name, or set HF_TOKEN"),
        ("hf://lab/model@v9/config.json", "no such revision as hf://lab/model@v9"),
        ("hf://lab/model/absent.pth", r"lab/model has no absent\.pth at a{40}"),
        ("hf://lab/model/absent/", "no such file as hf://lab/model/absent/"),
        ("hf://lab/model/*.pth", r"lab/model has no \*\.pth"),
        ("hf://lab/model/[ab]ig.safetensors", r"lab/model has no \[ab\]ig\.safetensors at"),  # no *: the name of a file
        ("hf://lab/model/[xyz]*", r"lab/model has no \[xyz\]\* at"),
        ("hf://lab/-..-/x", "no address on the Hub"),
        ("hf://model/x", "expected hf://OWNER/REPO/PATH"),
    ],
)
def test_what_is_not_there(hub: Hub, tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        download(source, tmp_path / "x")
    assert names(tmp_path) == []


def test_nobody_answers(hub: Hub, tmp_path: Path) -> None:
    hub.server_close()
    with pytest.raises(
        UserError, match=r"cannot reach hf://lab/model/x .*put the file hf://lab/model/x at .*and run again"
    ):
        download("hf://lab/model/x", tmp_path / "x")


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=rf"put the files of hf://lab/model/text/, .* into the folder {out} and run again"
    ):
        download("hf://lab/model/text/", out)
    out.mkdir()
    (out / "tokenizer.json").write_bytes(SMALL)
    download("hf://lab/model/text/", out)
    assert hub.requested == [] and list(manifest(out)["files"]) == ["tokenizer.json"]


def test_offline_a_folder_lacks_what_its_index_names(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCM_OFFLINE", "1")
    out, source = tmp_path / "out", "hf://lab/model@v1/unet/diffusion*"
    with pytest.raises(UserError, match=rf"put the files of .*, which {hub.url}/lab/model/tree/v1/unet lists, into"):
        download(source, out)
    parts = [f"diffusion-{k}-of-3.safetensors" for k in (1, 2, 3)]
    out.mkdir()
    (out / "diffusion.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("abc", parts, strict=True))})
    )
    (out / parts[1]).touch()
    with pytest.raises(
        UserError, match=rf"lacks {parts[0]}, {parts[2]}, which diffusion\.safetensors\.index\.json names"
    ):
        download(source, out)
    assert names(tmp_path) == ["out"]
    for part in parts:
        (out / part).touch()
    download(source, out)


def test_folder_that_was_put_there_by_hand(hub: Hub, tmp_path: Path) -> None:
    """The Hub names SHA-256 of what is large and git's names of the rest: they are compared, and nothing is fetched."""
    fetched = ("/storage/", f"/lab/model/resolve/{COMMIT}/text/tok")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "w.bin").write_bytes(CONTENT)
    (tmp_path / "out" / "tokenizer.json").write_bytes(SMALL.replace(b"5", b"6"))
    with pytest.raises(UserError, match="out is there already and is not what hf://lab/model/text/ holds"):
        download("hf://lab/model/text/", tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_bytes(SMALL)
    with pytest.raises(UserError, match="out is there already"):  # another folder is meant
        download("hf://lab/model/text/", tmp_path / "out", "0" * 64)
    download("hf://lab/model/text/", tmp_path / "out")
    assert not [path for method, path, _, _ in hub.requested if method == "GET" and path.startswith(fetched)]
    assert manifest(tmp_path / "out")["revision"] == COMMIT
