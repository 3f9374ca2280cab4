"""Files that are made to harm, in the place of every artefact: refused in one sentence, nothing run, nothing elsewhere.

Who plants them takes the records away and mends the manifests, so that nothing but the content tells.
"""

import io
import json
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import Mini, fail, mini  # noqa: F401  fixtures
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rcm.artefact import beside, content_sha256, read_json, sha256_file, sha256_json, write_json
from rcm.cli import main

from .test_damage import (
    CHECKPOINTS,
    CODEC,
    DATA,
    PROMPTS,
    READ_BY,
    RESULTS,
    ROOT,
    SAMPLES,
    SCORES,
    SHARDS,
    STAGES,
    STUDENT,
    TEXT,
    call,
    refused,
    replaced,
    tree,  # noqa: F401  a fixture
)

pytestmark = pytest.mark.slow
SPRUNG = Path("sprung")  # made by what should never run


class Trap:
    """Unpickled, it creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (SPRUNG,)


def archive(**records: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(records, buffer)
    return buffer.getvalue()


TRAPS = {"pickle": pickle.dumps(Trap()), "archive": archive(a=Trap()), "protocol 0": pickle.dumps(Trap(), 0)}
WEIGHTS = {
    CHECKPOINTS / "transformer.pth": ["convert"],
    CODEC: ["sample student", "sample control"],
    STUDENT: ["sample student", "throughput", "precision"],
    TEXT / "report.safetensors": ["sample student", "distill"],
    TEXT / "train.safetensors": ["synthesize"],
}


def records(artefact: Path) -> list[Path]:
    return [beside(artefact, suffix) for suffix in (".prov.json", ".download.json")]


@pytest.fixture(autouse=True)
def nothing_is_sprung(tree: Path) -> Any:  # noqa: F811
    before = set(Path("..").iterdir())
    yield
    assert not SPRUNG.exists()
    assert set(Path("..").iterdir()) - before <= set(Path("..").glob("test_*"))


def test_the_traps_are_real(tree: Path) -> None:  # noqa: F811
    for trap in TRAPS.values():
        if trap is TRAPS["archive"]:
            torch.load(io.BytesIO(trap), weights_only=False)
        else:
            pickle.loads(trap)
        SPRUNG.unlink()


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize(("path", "stage"), [(path, stage) for path, stages in WEIGHTS.items() for stage in stages])
def test_a_pickle_in_place_of_weights(
    path: Path,
    stage: str,
    trap: str,
    tree: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with replaced(path, *records(path)):
        path.write_bytes(TRAPS[trap])
        refused(stage, path, tmp_path / "out", capsys)


def vouched(folder: Path) -> None:
    """Let the manifest of a DCP folder name the files as they are."""
    manifest = read_json(folder / "manifest.json")
    manifest["files"] = {name: sha256_file(folder / name) for name in manifest["files"]}
    write_json(folder / "manifest.json", manifest)


def set_trap(file: Path) -> None:
    """In place of DCP's metadata or of its tensors, which keep their length."""
    trap, size = TRAPS["archive"], file.stat().st_size
    file.write_bytes(TRAPS["pickle"] if file.name == ".metadata" else trap * (size // len(trap) + 1))


def any_object(file: Path) -> None:
    """Have DCP's metadata name one tensor an object, whose bytes DCP would unpickle."""
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata[next(iter(metadata.state_dict_metadata))] = BytesStorageMetadata()
    file.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("name", "change"), [(".metadata", set_trap), (".metadata", any_object), ("__0_0.distcp", set_trap)]
)
@pytest.mark.parametrize("stage", ["synthesize", "distill", "sample teacher", "precision", "export"])
def test_a_pickle_in_a_dcp_folder_that_vouches_for_it(
    name: str,
    change: Callable[[Path], None],
    stage: str,
    tree: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = DATA / ("rcm-0/dcp" if stage == "export" else "teacher")
    assert stage in READ_BY[str(folder)]
    with replaced(folder, *records(folder)):
        shutil.copytree(folder.with_name(f"{folder.name}.aside"), folder)
        change(folder / name)
        vouched(folder)
        refused(stage, folder, tmp_path / "out", capsys)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_pickle_in_the_state_of_a_run(
    name: str,
    tree: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    words = [*STAGES["distill"], "distillation.student_updates=2", "distillation.state_every=1"]
    with monkeypatch.context() as patch:
        patch.setattr("rcm.cli.train.save_dcp", interrupted)
        assert call(words, tmp_path / "out") == 130
    states = [path for path in (tmp_path / "out/resume").iterdir() if path.name.isdecimal()]
    assert states
    for state in states:
        set_trap(state / name)
        manifest = read_json(state / "manifest.json")
        manifest.pop("sha256")
        manifest["files"] = {file: sha256_file(state / file) for file in manifest["files"]}
        write_json(state / "manifest.json", {"sha256": sha256_json(manifest), **manifest})
    capsys.readouterr()
    status = call(words, tmp_path / "out")
    said = capsys.readouterr().err
    assert status in (1, 2) and str(states[0].parent) in said and "Traceback" not in said, said
    assert not (tmp_path / "out/dcp").exists()


# --- Shards ---------------------------------------------------------------------------------------------------------


def planted(shard: Path, change: Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes | None]]) -> None:
    """Write a shard anew, its members changed, with a manifest that vouches for it."""
    with tarfile.open(shard.with_name(f"{shard.name}.aside")) as old, tarfile.open(shard, "w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            info, content = change(member, file.read())
            if content is not None:
                info.size = len(content)
            new.addfile(info, None if content is None else io.BytesIO(content))
    manifest = read_json(beside(shard, ".json"))
    write_json(beside(shard, ".json"), manifest | {"sha256": sha256_file(shard)})


def kind(of: bytes, ending: str) -> Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes | None]]:
    def change(member: tarfile.TarInfo, content: bytes) -> tuple[tarfile.TarInfo, bytes | None]:
        if not member.name.endswith(ending):
            return member, content
        member.type, member.linkname, member.size = of, "../../../../etc/passwd", 0
        member.devmajor, member.devminor = 1, 5  # /dev/zero
        return member, None

    return change


def linked(of: bytes, ending: str) -> Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes | None]]:
    """All but the first member of a kind become links to it."""
    first: list[str] = []

    def change(member: tarfile.TarInfo, content: bytes) -> tuple[tarfile.TarInfo, bytes | None]:
        if not member.name.endswith(ending):
            return member, content
        first.append(member.name)
        if len(first) == 1:
            return member, content
        member.type, member.linkname, member.size = of, first[0], 0
        return member, None

    return change


def renamed(prefix: str) -> Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes | None]]:
    def change(member: tarfile.TarInfo, content: bytes) -> tuple[tarfile.TarInfo, bytes | None]:
        member.name = prefix + member.name
        return member, content

    return change


def exchanged(ending: str, new: bytes) -> Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes | None]]:
    return lambda member, content: (member, new if member.name.endswith(ending) else content)


def npy(header: str) -> bytes:
    padded = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded


MEMBERS = {
    f"{name} {ending}": kind(of, ending)
    for name, of in {
        "symlink": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
        "folder": tarfile.DIRTYPE,
    }.items()
    for ending in (".json", "latents.npy", "text.npy")
}
MEMBERS |= {
    "symlink inside": linked(tarfile.SYMTYPE, "latents.npy"),
    "hard link inside": linked(tarfile.LNKTYPE, "text.npy"),
}
MEMBERS |= {f"name {prefix}": renamed(prefix) for prefix in ("../../", "/", "/etc/", "..\\", "a/../../", "C:\\", "\n")}
MEMBERS |= {
    "huge shape": exchanged(
        "latents.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1, 1, 1099511627776), }")
    ),
    "shape of many digits": exchanged(
        "latents.npy", npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 5000}, 1, 1, 1), }}")
    ),
    "code as header": exchanged("latents.npy", npy("__import__('pathlib').Path('sprung').touch()")),
    "objects": exchanged(
        "latents.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1, 1), }") + pickle.dumps(Trap())
    ),
    "columns first": lambda member, content: (
        member,
        content.replace(b"'fortran_order': False", b"'fortran_order': True "),
    ),
    "nested deeply": exchanged(".json", b"[" * 100_000),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_of_a_shard(
    member: str,
    tree: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = SHARDS / "1-of-2.tar"
    manifest = beside(shard, ".json")
    with replaced(shard, *records(shard), *records(manifest)):
        held = manifest.read_bytes()
        try:
            planted(shard, MEMBERS[member])
            for stage in ("verify", "merge"):
                refused(stage, shard, tmp_path / "out", capsys)
            assert (
                main(["contact-sheet", "--data", str(shard), "--codec", str(CODEC), "--out", str(tmp_path / "x.png")])
                == 2
            )
            capsys.readouterr()
        finally:
            manifest.write_bytes(held)
    assert not (tmp_path / "x.png").exists()


# --- Headers and JSON -----------------------------------------------------------------------------------------------


def tensors(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def described(**entry: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()


HEADERS = {
    "huge shape": tensors(described(shape=[2**40, 2**20]), bytes(4)),
    "overflowing shape": tensors(described(shape=[2**32, 2**32]), bytes(4)),
    "negative shape": tensors(described(shape=[-1]), bytes(4)),
    "huge header": struct.pack("<Q", 2**62) + b"{}",
    "header of 99 MB": struct.pack("<Q", 99_000_000) + b"{}",
    "offsets backwards": tensors(described(data_offsets=[4, 0]), bytes(4)),
    "offsets beyond": tensors(described(data_offsets=[2**40, 2**40 + 4]), bytes(4)),
    "nested deeply": tensors(b'{"a":' + b"[" * 100_000),
    "nested deeply inside": tensors(json.dumps({"__metadata__": {"rcm": "[" * 100_000}}).encode()),
    "no numbers": tensors(
        json.dumps({"__metadata__": {"rcm": '{"metadata": NaN, "facts": NaN, "sha256": 1}'}}).encode()
    ),
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("path", [STUDENT, TEXT / "report.safetensors"], ids=["student", "text"])
def test_a_header_that_lies(
    path: Path,
    header: str,
    tree: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with replaced(path, *records(path)):
        path.write_bytes(HEADERS[header])
        refused("sample student", path, tmp_path / "out", capsys)


FOLDER = Path(str(SAMPLES).format(model="rcm-0-1"))
JSONS = {  # a file, the artefact that it is of, and who reads it
    SCORES[0]: (SCORES[0], "table"),
    RESULTS / "throughput/rcm-0-1.json": (RESULTS / "throughput/rcm-0-1.json", "table2"),
    RESULTS / "precision/rcm-0.json": (RESULTS / "precision/rcm-0.json", "figure_precision"),
    DATA / "rcm-0/metrics.jsonl": (DATA / "rcm-0/metrics.jsonl", "figure_training"),
    RESULTS / "measured/rcm-0-1.jsonl": (RESULTS / "measured/rcm-0-1.jsonl", "evaluate measured"),
    RESULTS / "official/rcm-0-1.jsonl": (RESULTS / "official/rcm-0-1.jsonl", "evaluate official"),
    FOLDER / "sampling.json": (FOLDER, "evaluate"),
    FOLDER / "00000/metadata.jsonl": (FOLDER, "evaluate"),
    DATA / "teacher/manifest.json": (DATA / "teacher", "sample teacher"),
    SHARDS / "1-of-2.tar.json": (SHARDS / "1-of-2.tar.json", "verify"),
    PROMPTS / "report.jsonl": (PROMPTS / "report.jsonl", "embed"),
    beside(CODEC, ".prov.json"): (CODEC, "sample control"),
    beside(CODEC, ".download.json"): (CODEC, "sample control"),
}
TEXTS = {
    "nested deeply": "[" * 100_000,
    "objects nested deeply": '{"a":' * 100_000,
    "NaN": "NaN",
    "infinity in it": '{"a": Infinity}',
    "many digits": "9" * 5000,
    "a number": "1e999",
    "a list": "[]",
    "nothing": "null",
    "no text": "\ud800",
}
FEW = "nested deeply", "NaN", "a list", "no text"


@pytest.mark.parametrize(
    ("file", "text"),
    [(file, text) for file in JSONS for text in TEXTS if file == SCORES[0] or text in FEW],
    ids=str,
)
def test_json_of_another_kind(
    file: Path,
    text: str,
    tree: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artefact, stage = JSONS[file]
    with replaced(file, *(path for path in records(artefact) if path != file)):
        file.write_bytes(f"{TEXTS[text]}\n".encode(errors="surrogatepass"))
        refused(stage, artefact, tmp_path / "out", capsys)


VALUES = ["1e999", "9" * 400, "-1e999", '"1"', "[]", "{}", "true", "NaN", "1" * 5000]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:8])
@pytest.mark.parametrize(
    ("file", "place", "stage"),
    [
        (SCORES[0], ("metrics", "shapeeval.overall", "value"), "table"),
        (SCORES[0], ("metrics", "shapeeval.overall", "low"), "report"),
        (SCORES[0], ("per_prompt", "shapeeval.overall", 0), "table"),
        (SCORES[0], ("steps",), "table"),
        (RESULTS / "throughput/rcm-0-1.json", ("fps",), "table2"),
        (RESULTS / "precision/rcm-0.json", ("errors", "float32", "output", "median", 0), "figure_precision"),
        (DATA / "rcm-0/metrics.jsonl", ("scm_loss",), "figure_training"),
    ],
    ids=["value", "bound", "by prompt", "steps", "speed", "rounding", "loss"],
)
def test_a_number_that_is_none(
    file: Path,
    place: tuple[Any, ...],
    stage: str,
    value: str,
    tree: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = json.loads(file.read_text().splitlines()[0] if file.suffix == ".jsonl" else file.read_text())
    at = content
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = "PLACE"
    with replaced(file, *records(file)):
        file.write_text(json.dumps(content).replace('"PLACE"', value) + "\n")
        refused(stage, file, tmp_path / "out", capsys)


# --- The configuration, links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system [touch sprung]",
        "!!python/object/new:pathlib.Path [sprung]",
        "${oc.decode:'!!python/object/apply:os.system [touch sprung]'}",
        "$(touch sprung)",
        "`touch sprung`",
        "${eval:__import__('os').system('touch sprung')}",
    ],
)
def test_an_override_runs_nothing(
    value: str,
    fail: Any,  # noqa: F811
    tree: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    for word in (f"suites.report.seed={value}", f"suites.report.seed='{value}'", f'suites.report.seed="{value}"'):
        fail("prompts", word, "--out", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [touch sprung]", "!!python/name:os.system", "!x y"])
def test_a_tag_in_a_configuration_file(
    value: str,
    fail: Any,  # noqa: F811
    tree: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(ROOT / "config", tmp_path / "config")
    path = tmp_path / "config/experiment/tiny-images.yaml"
    path.write_text(path.read_text() + f"\nwidth: {value}\n")
    monkeypatch.setenv("RCM_CONFIG_DIR", str(tmp_path / "config"))
    fail("prompts", "experiment=tiny-images", "--out", tmp_path / "x.jsonl")


@pytest.mark.parametrize("stage", ["synthesize", "sample control", "merge"])
def test_what_is_written_replaces_a_link_and_leaves_what_it_points_to(
    stage: str,
    tree: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Of outputs, and of all hidden names that a run may find there."""
    out, away = tmp_path / "out", tmp_path / "away"
    out.mkdir()
    away.mkdir()
    (away / "kept").write_text("kept")
    name = {"synthesize": "1-of-2.tar", "sample control": "samples", "merge": "merged"}[stage]
    target = away / "kept" if stage == "synthesize" else away
    hidden = [f".{name}.x.partial"] + (
        [f"{name}.json", f".{name}.unfinished", f".{name}.unfinished.json"] * (target != away)
    )
    for link in [name, *hidden] if stage != "merge" else hidden:
        (out / link).symlink_to(target)
    call(STAGES[stage], out)
    assert [path.name for path in away.iterdir()] == ["kept"] and (away / "kept").read_text() == "kept"


def test_a_link_to_another_sample_is_another_content(
    tree: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = FOLDER / "00000/samples/0000.png"
    with replaced(file):
        file.symlink_to((FOLDER / "00001/samples/0000.png").absolute())
        refused("evaluate", FOLDER, tmp_path / "out", capsys)


def test_a_link_in_a_download_is_found_when_what_it_points_to_changes(
    tree: Path,  # noqa: F811
    tmp_path: Path,
    fail: Any,  # noqa: F811
) -> None:
    """What was downloaded is files; a link that is put there later counts by its content."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "a.json").write_text("{}")
    words = (
        f"checkpoints.transformer.source={source}/",
        "checkpoints.transformer.sha256=null",
        "--name",
        "transformer",
    )
    assert main(["download", *words, "--out", str(out)]) == 0
    assert content_sha256(out) == read_json(beside(out, ".prov.json"))["sha256"]
    (out / "a.json").unlink()
    (tmp_path / "secret").write_text("secret")
    (out / "a.json").symlink_to(tmp_path / "secret")
    assert str(out / "a.json") in fail("download", *words, "--out", out)
    assert (tmp_path / "secret").read_text() == "secret"
