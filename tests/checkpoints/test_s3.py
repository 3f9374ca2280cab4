"""Downloads from S3: boto3 talks to moto's server on this machine."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from rcm.artefact import UserError
from rcm.checkpoints import download, transfer

from .test_download import CONTENT, SHA, manifest, names


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(transfer, "DELAY", 0.001)
    monkeypatch.setattr(transfer, "PART", 800_000)
    for name in ("http_proxy", "HTTP_PROXY", "AWS_PROFILE", "RCM_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    for key, content in (("wan/x.pth", CONTENT), ("wan/deep/config.json", b"{}"), ("wanton", b"")):
        client.put_object(Bucket="models", Key=key, Body=content)
    return "s3://models"


def test_a_file_in_parts(bucket: str, tmp_path: Path) -> None:
    download(f"{bucket}/wan/x.pth", tmp_path / "x.pth", SHA)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT
    assert names(tmp_path) == ["x.pth", "x.pth.download.json"]
    download(f"{bucket}/wanton", tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_folder(bucket: str, tmp_path: Path) -> None:
    download(f"{bucket}/wan/", tmp_path / "wan")
    assert (tmp_path / "wan" / "x.pth").read_bytes() == CONTENT
    known = {name: entry["sha256"] for name, entry in manifest(tmp_path / "wan")["files"].items()}
    assert known == {"x.pth": SHA, "deep/config.json": hashlib.sha256(b"{}").hexdigest()}


def test_it_goes_on_unless_the_file_has_changed(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of the first call break off in the middle."""
    read, counts = transfer._Transfer._attempt, list[int]()

    def broken(self: transfer._Transfer, part: int) -> None:
        self.done[part] < 100_000 and read(self, part)
        raise KeyboardInterrupt

    for change in (False, True):
        out = tmp_path / f"{change}.pth"
        with monkeypatch.context() as patch:
            patch.setattr(transfer._Transfer, "_attempt", broken)
            with pytest.raises(KeyboardInterrupt):
                download(f"{bucket}/wan/x.pth", out)
        if change:
            boto3.client("s3").put_object(Bucket="models", Key="wan/x.pth", Body=CONTENT[::-1])
        with monkeypatch.context() as patch:
            patch.setattr(
                transfer._Transfer, "_attempt", lambda self, part: (counts.append(self.done[part]), read(self, part))
            )
            download(f"{bucket}/wan/x.pth", out)
        assert out.read_bytes() == (CONTENT[::-1] if change else CONTENT)
        assert any(counts) is not change
        counts.clear()


def test_a_file_that_changes_while_it_is_fetched(bucket: str, tmp_path: Path) -> None:
    from rcm.checkpoints.origins import find

    remote = find(f"{bucket}/wan/x.pth").files[""]
    boto3.client("s3").put_object(Bucket="models", Key="wan/x.pth", Body=CONTENT[:-1] + b"!")
    with pytest.raises(UserError, match="has changed while it was fetched"):
        transfer.transfer(remote, tmp_path / "x", lambda count: None)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("s3://models/absent.pth", "there is no such key"),
        ("s3://models/absent/", "there is no such key"),
        ("s3://nobodys/x.pth", "there is no such bucket"),
        ("s3://nobodys/x/", "there is no such bucket"),
        ("s3://models", r"expected s3://BUCKET/KEY"),
        ("s3://?/x", "s3://"),
    ],
)
def test_what_is_not_there(bucket: str, tmp_path: Path, key: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        download(key, tmp_path / "x")
    assert names(tmp_path) == []


def test_without_credentials(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        download(f"{bucket}/wan/x.pth", tmp_path / "x")
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(UserError, match="no such profile; check AWS_PROFILE"):
        download(f"{bucket}/wan/x.pth", tmp_path / "x")


def test_nobody_answers(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=rf"cannot reach {bucket}/wan/x\.pth .*without a network, put the file"):
        download(f"{bucket}/wan/x.pth", tmp_path / "x")
