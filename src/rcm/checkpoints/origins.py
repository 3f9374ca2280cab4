"""Where checkpoints come from: paths, HTTP(S), S3 and the Hugging Face Hub, each as files to be transferred."""

import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.client import InvalidURL
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from rcm.artefact import UserError, reason
from rcm.checkpoints.transfer import Remote, Stream

_TIMEOUT = 30  # seconds without a byte
_WEB = "http", "https"


@dataclass(frozen=True)
class Origin:
    """What a source is: one file, under "", or those of a folder by their path in it."""

    files: dict[str, Remote]
    revision: str | None = None  # the Hub's commit


def find(source: str) -> Origin:
    """What is at `source`, by the forms that `rcm.checkpoints.download` lists; UserError where there is nothing."""
    kinds = {"": _path, "file": _path, "http": _http, "https": _http, "s3": _s3, "hf": _hub}
    if scheme_of(source) not in kinds:
        raise UserError(
            f"cannot download from {source!r}: expected a path or a file://, http://, https://, s3:// or hf:// address"
        )
    origin = kinds[scheme_of(source)](source)
    if outside := [name for name in origin.files if ".." in Path(name).parts or Path(name).is_absolute()]:
        raise UserError(
            f"{source} has the file {outside[0]!r}, which would lie outside of the folder; it is not fetched"
        )
    return origin


def scheme_of(source: str) -> str:
    return urllib.parse.urlsplit(source).scheme


def is_folder(source: str) -> bool:
    """Whether a source means several files: a trailing slash, except over HTTP, or a pattern with a * on the Hub."""
    scheme = scheme_of(source)
    return (source.endswith("/") and scheme not in _WEB) or (scheme == "hf" and "*" in source)


def public(source: str) -> str:
    """A source as it may be said and recorded: an HTTP address without its query, which may be a signature."""
    parts = urllib.parse.urlsplit(source)
    if parts.scheme in _WEB and "@" in parts.netloc:
        raise UserError(
            f"the address at {parts.hostname} holds a user or a password, with which nothing is fetched; expected one "
            "without, or with a signature as its query"
        )
    return source if parts.scheme not in _WEB else parts._replace(query="", fragment="").geturl()


def page_of(source: str) -> str:
    """Where people read which files a folder or pattern on the Hub holds."""
    repo, revision, path = _on_the_hub(source)
    return "/".join(filter(None, (_endpoint(), repo, "tree", revision or "main", _folder_of(path))))


def _needed(module: str) -> ModuleType:
    try:
        return __import__(module)
    except ImportError as error:
        raise UserError(
            f"this source needs the package {module}: install it with `pip install -e .[models]`"
        ) from error


# --- Paths -----------------------------------------------------------------------------------------------------------


def _path(source: str) -> Origin:
    parts = urllib.parse.urlsplit(source)
    path = Path(urllib.request.url2pathname(parts.path)) if parts.scheme == "file" else Path(source)
    if is_folder(source) and path.is_dir():
        found = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
        return Origin({name: _local(file) for name, file in found.items()})
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file, or a trailing slash for all files in it")
    if not path.is_file():
        raise UserError(f"{path} does not exist; put the file there or name another source")
    return Origin({"": _local(path)})


def _local(path: Path) -> Remote:
    @contextmanager
    def read(start: int, stop: int | None) -> Iterator[Stream]:
        with path.open("rb") as file:
            file.seek(start)
            yield _Bounded(file, None if stop is None else stop - start)

    status = path.stat()
    return Remote(str(path), read, status.st_size, version=str(status.st_mtime_ns))


@dataclass
class _Bounded:
    """At most `left` bytes of a stream."""

    stream: Stream
    left: int | None

    def read(self, size: int, /) -> bytes:
        chunk = self.stream.read(size if self.left is None else min(size, self.left))
        self.left = None if self.left is None else self.left - len(chunk)
        return chunk


# --- HTTP ------------------------------------------------------------------------------------------------------------

_AGAIN = (408, 429)  # statuses below 500 that pass


def _http(url: str) -> Origin:
    address = public(url)

    @contextmanager
    def read(start: int, stop: int | None) -> Iterator[Stream]:
        span = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if ranges else {}
        with _get(url, address, span) as response:
            if span and (response.status != 206 or _version(response) != version):
                raise UserError(f"{address} has changed while it was fetched; run again to fetch it anew")
            yield _Bounded(response, None if stop is None else stop - start)

    with _get(url, address, {"Range": "bytes=0-0"}) as response:  # HEAD is refused where addresses are signed
        ranges, version = response.status == 206, _version(response)
        span, length = response.headers.get("Content-Range", ""), response.headers.get("Content-Length")
    if response.status == 416:
        size: int | None = 0
    elif ranges:
        size = int(total) if (total := span.rpartition("/")[2]).isdecimal() else None
    else:
        size = int(length) if length else None
    ranges = ranges and size is not None
    return Origin({"": Remote(address, read, size, ranges, version)})


def _version(response: Any) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


@contextmanager
def _get(url: str, address: str, span: dict[str, str], headers: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The answer to a GET; `headers` go to the URL's host alone, not where that redirects to."""
    request = urllib.request.Request(url, headers={"User-Agent": "rcm", "Accept-Encoding": "identity", **span})
    for name, value in (headers or {}).items():
        request.add_unredirected_header(name, value)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and span.get("Range") == "bytes=0-0":  # an empty file
            with error:
                yield error
            return
        if error.code < 500 and error.code not in _AGAIN:
            raise UserError(f"cannot fetch {address}: the server says {error.code} {error.reason}") from error
        raise
    except InvalidURL:  # its message says the query
        raise UserError(f"{address} is no address: write its blanks and other characters as %20 and so on") from None
    with response:
        yield response


# --- S3 --------------------------------------------------------------------------------------------------------------


def _s3(source: str) -> Origin:
    boto3 = _needed("boto3")
    from botocore import exceptions
    from botocore.config import Config

    passing = exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError
    bucket, _, key = source.removeprefix("s3://").partition("/")
    if not bucket or not (key or is_folder(source)):
        raise UserError(f"{source!r} is no address in S3: expected s3://BUCKET/KEY")

    @contextmanager
    def explained() -> Iterator[None]:
        try:
            yield
        except exceptions.ClientError as error:
            code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status >= 500 or status in _AGAIN:
                raise ConnectionError(reason(error)) from error
            raise UserError(f"cannot fetch {source}: {_S3_REASONS.get(code, reason(error))}") from error
        except passing as error:
            raise ConnectionError(reason(error)) from error
        except exceptions.BotoCoreError as error:
            raise UserError(f"cannot fetch {source}: {_S3_REASONS.get(type(error).__name__, reason(error))}") from error

    with explained():
        client = boto3.session.Session().client(
            "s3", config=Config(connect_timeout=_TIMEOUT, read_timeout=_TIMEOUT, max_pool_connections=16)
        )
        if not is_folder(source):
            files = {"": key}
        else:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
            found = [item["Key"] for page in pages for item in page.get("Contents", [])]
            files = {name.removeprefix(key): name for name in found if not name.endswith("/")}
            if not files:
                raise UserError(f"cannot fetch {source}: {_S3_REASONS['NoSuchKey']}")

    def remote(key: str) -> Remote:
        with explained():
            try:
                head = client.head_object(Bucket=bucket, Key=key)
            except exceptions.ClientError as error:
                if error.response["Error"]["Code"] != "404":
                    raise
                client.get_object(Bucket=bucket, Key=key)["Body"].close()  # its answer says whether key or bucket lack
                raise

        @contextmanager
        def read(start: int, stop: int | None) -> Iterator[Stream]:
            with explained():
                assert stop is not None
                span = f"bytes={start}-{stop - 1}"
                body = client.get_object(Bucket=bucket, Key=key, Range=span, IfMatch=head["ETag"])["Body"]
                with closing(body):
                    yield body

        return Remote(f"s3://{bucket}/{key}", read, head["ContentLength"], version=head["ETag"])

    return Origin({name: remote(key) for name, key in files.items()})


_S3_REASONS = {
    "NoSuchBucket": "there is no such bucket; check its name, and AWS_ENDPOINT_URL",
    "NoSuchKey": "there is no such key in the bucket; check its name",
    "403": "access is denied; check the name and the rights of your credentials",
    "AccessDenied": "access is denied; check the name and the rights of your credentials",
    "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "PreconditionFailed": "it has changed while it was fetched; run again to fetch it anew",
    "412": "it has changed while it was fetched; run again to fetch it anew",
    "NoCredentialsError": "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": "the credentials are incomplete; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "there is no such profile; check AWS_PROFILE",
}


# --- The Hugging Face Hub --------------------------------------------------------------------------------------------

_HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.*)")


def _on_the_hub(source: str) -> tuple[str, str | None, str]:
    """Repository, revision and path."""
    match = _HUB.fullmatch(source)
    if match is None:
        raise UserError(
            f"{source!r} is no address on the Hub: expected hf://OWNER/REPO/PATH or hf://OWNER/REPO@REVISION/PATH"
        )
    return match[1], match[2], match[3]


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _folder_of(path: str) -> str:
    """The folder of a path, of a pattern that above which all is literal."""
    literal = re.split(r"[*?[]", path, maxsplit=1)[0] if "*" in path else path
    return str(PurePosixPath(literal + "x").parent).removeprefix(".")


def _matches(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern, folder by folder: *, ?, [abc] and [!abc] stand for no slash."""
    names, patterns = path.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def _hub(source: str) -> Origin:
    """Names, commit and hashes by the Hub's own client; its files by ranges of HTTP, which resume, as that does not."""
    repo, revision, path = _on_the_hub(source)
    _needed("huggingface_hub")
    from huggingface_hub import HfApi, RepoFile, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers

    endpoint = _endpoint()
    api = HfApi(endpoint=endpoint)
    with _explained(source, repo, f"{endpoint}/{repo}"):
        commit = api.model_info(repo, revision=revision).sha
        if not is_folder(source):
            entries = dict(zip([""], api.get_paths_info(repo, [path], revision=commit), strict=False))
        else:
            folder = _folder_of(path)
            tree = api.list_repo_tree(repo, folder or None, recursive=True, revision=commit)
            entries = {str(PurePosixPath(entry.path).relative_to(folder or ".")): entry for entry in tree}
            if "*" in path:
                entries = {name: entry for name, entry in entries.items() if _matches(entry.path, path)}
        files = {name: entry for name, entry in entries.items() if isinstance(entry, RepoFile)}
        if not files:
            raise UserError(
                f"{repo} has no {path or 'files'} at {revision or commit}; see {endpoint}/{repo}/tree/{commit}"
            )
        urls = {name: hf_hub_url(repo, e.path, revision=commit, endpoint=endpoint) for name, e in files.items()}
        get_hf_file_metadata(next(iter(urls.values())), endpoint=endpoint)  # whether the licence lets us

    def remote(name: str) -> Remote:
        entry = files[name]

        @contextmanager
        def read(start: int, stop: int | None) -> Iterator[Stream]:
            with _explained(source, repo, f"{endpoint}/{repo}"):
                span = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
                with _get(urls[name], f"hf://{repo}/{entry.path}", span, build_hf_headers()) as response:
                    if start and response.status != 206:
                        raise UserError(f"{endpoint} does not send parts of {entry.path}; try again later")
                    yield _Bounded(response, None if stop is None else stop - start)

        digest, blob = (entry.lfs.sha256, None) if entry.lfs else (None, entry.blob_id)
        large = blob is None  # what is not comes in one piece
        return Remote(f"hf://{repo}/{entry.path}", read, entry.size, large, entry.blob_id, digest, blob)

    return Origin({name: remote(name) for name in sorted(files)}, commit)


@contextmanager
def _explained(source: str, repo: str, page: str) -> Iterator[None]:
    """Errors of the Hub's client as sentences."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repo} is gated: accept its licence at {page} and set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no repository {repo} at {page}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo} has no such revision as {source} names; see {page}") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{repo} has no such file as {source} names; see {page}/tree/main") from error
    except errors.HFValidationError as error:
        raise UserError(f"{source!r} is no address on the Hub: {reason(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("httpx") and not isinstance(error, OSError):
            raise ConnectionError(reason(error)) from error
        raise
