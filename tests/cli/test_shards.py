"""From prompt files to shards, through interruptions, and what can be done with shards afterwards."""

import io
import json
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rcm.text
from rcm.artefact import read_json, sha256_file
from rcm.cli import main
from rcm.cli.config import compose
from rcm.cli.models import codec
from rcm.codecs import to_pixels
from rcm.data.samples import sample_sha256
from rcm.data.shards import Sample, part_indices, read_shards, write_shard

from .conftest import SMALL, Mini, Run

FEW = [*SMALL, "teacher.steps=2", "inference.batch=2", "suites.train.samples=2"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four prompts; each is sampled twice."""
    path = tmp_path_factory.mktemp("prompts") / "train.jsonl"
    lines = ("a red star", "a blue square", "a red star", "nothing")
    path.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def words(mini: Mini, prompts: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The command line that synthesises everything into a folder of the test."""

    def of(folder: str) -> list[str]:
        files = ["--teacher", mini.transformer, "--prompts", prompts, "--out", tmp_path / folder / "1-of-1.tar"]
        return ["synthesize", *FEW, *map(str, files), "--shard", "1-of-1"]

    return of


Words = Callable[[str], list[str]]


# --- Prompts


def test_prompts_of_a_file(run: Run, fail: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "mine.txt", tmp_path / "prompts.jsonl"
    source.write_text("a cat\n\na dog\na cat\n")
    run("prompts", "--source", source, "--out", out)
    assert out.read_text() == '{"prompt": "a cat"}\n{"prompt": "a dog"}\n{"prompt": "a cat"}\n'
    record = read_json(f"{out}.prov.json")
    assert [entry["sha256"] for entry in record["inputs"]] == [sha256_file(source)]
    run("prompts", "suite=train", "suites.train.prompts=2", "--source", source, "--out", out)
    assert len(out.read_text().splitlines()) == 2
    source.write_bytes(b"a cat\n\xff\n")
    assert f"{source}, line 2: not UTF-8" in fail("prompts", "--source", source, "--out", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()
    assert "name it with --source" in fail("prompts", "experiment=wan2.1-1.3b-clips", "--out", tmp_path / "x.jsonl")


# --- Synthesis


def drawn(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[list[tuple[int, int]]]:
    """The batches of jobs that the teacher draws from now on; the one of number `fail_at` interrupts it."""
    from rcm.cli.models import Teacher

    batches: list[list[tuple[int, int]]] = []
    plain = Teacher.sample

    def counted(self: Teacher, text: torch.Tensor, jobs: list[tuple[int, int]], **options: int) -> torch.Tensor:
        if len(batches) == fail_at:
            raise KeyboardInterrupt
        batches.append(jobs)
        return plain(self, text, jobs, **options)

    monkeypatch.setattr(Teacher, "sample", counted)
    return batches


def test_an_interrupted_synthesis_goes_on(
    words: Words, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(*words("whole"))
    whole, broken = (tmp_path / name / "1-of-1.tar" for name in ("whole", "broken"))
    with monkeypatch.context() as patch:
        drawn(patch, fail_at=3)
        assert main(words("broken")) == 130
    assert not broken.exists()
    with monkeypatch.context() as patch:
        batches = drawn(patch)
        said = run(*words("broken"))
    assert "behind its first 6 samples" in said and batches == [[(3, 0), (3, 1)]]
    assert broken.read_bytes() == whole.read_bytes()
    assert read_json(f"{broken}.json") == read_json(f"{whole}.json")
    assert {path.name for path in broken.parent.iterdir()} == {path.name for path in whole.parent.iterdir()}

    with monkeypatch.context() as patch:  # under another seed nothing of it is kept
        drawn(patch, fail_at=3)
        assert main([*words("broken"), "suites.train.seed=9"]) == 130
    with monkeypatch.context() as patch:
        batches = drawn(patch)
        assert "with another seed; it is begun anew" in run(*words("broken"))
    assert len(batches) == 4 and broken.read_bytes() == whole.read_bytes()


def test_a_killed_synthesis_goes_on(words: Words, run: Run, tmp_path: Path) -> None:
    """Its third batch is half written when the process is killed."""
    code = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
import rcm.data.unfinished as module
from rcm.cli import main
count, plain = 0, module.write_sample
def write(*arguments):
    global count
    count += 1
    if count == 6: os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments)
module.write_sample = write
main(sys.argv[1:])
"""
    ended = subprocess.run([sys.executable, "-c", code, *words("broken")], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert "behind its first 4 samples" in run(*words("broken"))
    run(*words("whole"))
    whole, broken = (tmp_path / name / "1-of-1.tar" for name in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()


def test_manifest_and_parts(words: Words, run: Run, prompts: Path, mini: Mini, tmp_path: Path) -> None:
    run(*words("whole"))
    whole = read_shards([tmp_path / "whole" / "1-of-1.tar"])
    parts = [tmp_path / "parts" / f"{k}-of-3.tar" for k in (1, 2, 3)]
    for path in parts:
        run(*words("whole")[:-2], "--shard", path.stem, "--out", path)
    data = read_shards(parts)
    for sample, other in zip(data.samples, whole.samples, strict=True):  # batches of another size may round otherwise
        assert (sample.index, sample.prompt, sample.seed) == (other.index, other.prompt, other.seed)
        torch.testing.assert_close(sample.latents_CTHW, other.latents_CTHW, rtol=1e-5, atol=1e-5)
    assert [sample.prompt for sample in data.samples][:4] == ["a red star"] * 2 + ["a blue square"] * 2
    manifest = read_json(f"{parts[1]}.json")
    assert manifest["count"] == 2 and manifest["part"] == "2-of-3" and manifest["sha256"] == sha256_file(parts[1])
    assert manifest["prompts_sha256"] == sha256_file(prompts) and manifest["samples_per_prompt"] == 2
    assert manifest["teacher_sha256"] == sha256_file(mini.transformer) and manifest["sampler"]["steps"] == 2
    assert manifest["text"]["kind"] == "words" and manifest["seed"] == 1
    assert [line["index"] for line in manifest["samples"]] == [2, 3]
    assert [line["sha256"] for line in manifest["samples"]] == [sample_sha256(data.samples[i]) for i in (2, 3)]


def test_texts_that_were_encoded_before(words: Words, run: Run, fail: Run, tmp_path: Path) -> None:
    run(*words("whole"))
    encoder = rcm.text.build(compose(FEW)["text"])
    texts, file = ["", "a red star", "a blue square", "nothing"], tmp_path / "text.safetensors"
    rcm.text.Embeddings.write(file, texts, encoder.encode(texts), tokens=encoder.tokens, encoder={"name": "mine"})
    run(*words("before"), "--text", file)
    whole, before = (tmp_path / name / "1-of-1.tar" for name in ("whole", "before"))
    assert before.read_bytes() == whole.read_bytes()
    assert read_json(f"{before}.json")["text"] == {"name": "mine"}
    rcm.text.Embeddings.write(file, texts[:3], encoder.encode(texts[:3]), tokens=encoder.tokens, encoder={})
    assert "no embedding of the prompt 'nothing'" in fail(*words("other"), "--text", file)


def test_latents_have_the_precision_of_the_network(words: Words, run: Run, tmp_path: Path) -> None:
    run(*words("half"), "inference.precision=bfloat16")
    (sample, *_) = read_shards([tmp_path / "half" / "1-of-1.tar"]).samples
    assert sample.latents_CTHW.dtype == torch.bfloat16 and sample.text_LD.dtype == torch.float32


def test_prompts_that_are_cut_are_told(words: Words, run: Run, prompts: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(prompts.read_text() + json.dumps({"prompt": "a red star " * 20}) + "\n")
    said = run(*words("long"), "--prompts", long)
    assert "1 of 5 prompts (number 5 is the first) are longer than 12 tokens and cut there" in said


# --- Shards


def sample(index: int, latents: torch.Tensor | None = None) -> Sample:
    generator = torch.Generator().manual_seed(index)
    made = torch.randn(24, 3, 3, 3, generator=generator) / 2 if latents is None else latents
    return Sample(index, f"prompt <{index}>", 40 + index, made, torch.randn(2, 4, generator=generator))


def write_set(folder: Path, samples: list[Sample], parts: int = 2, **facts: str) -> list[Path]:
    paths = [folder / f"{number}-of-{parts}.tar" for number in range(1, parts + 1)]
    for path in paths:
        chosen = [samples[index] for index in part_indices(path.stem, len(samples))]
        write_shard(path, chosen, {"part": path.stem, "teacher_sha256": "t", **facts})
    return paths


def test_verify_says_what_a_set_is(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = write_set(tmp_path, [sample(index) for index in range(5)])
    assert main(["verify", "--samples", "--data", *map(str, paths)]) == 0
    said = {line[:20].strip(): line[20:] for line in capsys.readouterr().out.splitlines()}
    assert said["samples"].startswith("5 in 2 shards, ") and said["seed"] == "40 ... 44"
    assert said["latents"] == "24 x 3 x 3 x 3, float32" and said["words"] == "4 numbers each, float32"
    assert said["teacher_sha256"] == "t" and said["checked"].startswith("5 samples, 5 of them")


@pytest.mark.parametrize(
    ("latents", "said"),
    [
        (torch.full((24, 3, 3, 3), float("nan")), "sample 1: its latents hold NaN"),
        (torch.zeros(24, 3, 3, 3).index_fill(1, torch.tensor(2), float("inf")), "sample 1: its latents are infinite"),
        (torch.full((24, 3, 3, 3), 0.25), "sample 1: its latents are the same number everywhere"),
    ],
)
def test_verify_finds_what_are_no_latents(
    latents: torch.Tensor, said: str, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = write_set(tmp_path, [sample(0), sample(1, latents), sample(2)])
    run("verify", "--data", *paths)
    assert main(["verify", "--samples", "--data", *map(str, paths)]) == 2
    assert f"1 of 3 samples are no samples of a teacher ({said})" in capsys.readouterr().err.splitlines()[-1]


def test_verify_finds_damage(fail: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = write_set(tmp_path, [sample(index) for index in range(3)])
    manifest = read_json(f"{paths[1]}.json")
    manifest["samples"][0]["sha256"] = "0" * 64
    Path(f"{paths[1]}.json").write_text(json.dumps(manifest))
    assert main(["verify", "--samples", "--data", *map(str, paths)]) == 2
    assert "rcm verify: error: sample 1 is not the one" in capsys.readouterr().err
    content = bytearray(paths[0].read_bytes())
    content[2000] ^= 1
    paths[0].write_bytes(content)
    assert f"{paths[0]} is damaged" in fail("verify", "--data", *paths)
    assert "is given twice" in fail("verify", "--data", paths[1], paths[1])


def test_merge(run: Run, fail: Run, tmp_path: Path) -> None:
    one = write_set(tmp_path / "one", [sample(index) for index in range(3)])
    two = write_set(tmp_path / "two", [sample(index) for index in range(2)], parts=1, teacher_sha256="another")
    merge = ("merge", "--data", *one, *two, "--shards", 2, "--out-dir", tmp_path / "both")
    assert "teacher_sha256 differs; give --mixed" in fail(*merge)
    run(*merge, "--mixed")
    shards = sorted((tmp_path / "both").glob("*.tar"))
    wanted = [*map(sample, range(3)), *(replace(sample(index), index=3 + index) for index in range(2))]
    assert [sample_sha256(s) for s in read_shards(shards).samples] == [sample_sha256(s) for s in wanted]
    record = read_json(f"{shards[0]}.prov.json")
    assert record["stage"] == "merge" and [entry["sha256"] for entry in record["inputs"]] == [
        sha256_file(path) for path in (*one, *two)
    ]
    assert "holds something already" in fail(*merge, "--mixed")


def test_adopt(run: Run, fail: Run, tmp_path: Path) -> None:
    folder = tmp_path / "Some_data_set"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"shard_{shard:06d}.tar", "w") as tar:
            for key in (2 * shard, 2 * shard + 1):
                for name, value in (
                    ("latent.pt", torch.full((2, 1, 2, 2), key / 4, dtype=torch.bfloat16)),
                    ("embed.pt", torch.ones(3, 4, dtype=torch.bfloat16)),
                ):
                    buffer = io.BytesIO()
                    torch.save(value, buffer)
                    add(tar, f"{key:09d}.{name}", buffer.getvalue())
                add(tar, f"{key:09d}.prompt.txt", f"prompt {key}".encode())
            add(tar, "000000009.prompt.txt", b"torn")
    tars = sorted(folder.glob("*.tar"))
    for part in ("1-of-2", "2-of-2"):
        said = run("adopt", "--data", *tars, "--shard", part, "--seed", 3, "--out-dir", tmp_path / "new")
        assert "2 samples lack members and are left out" in said
    data = read_shards(sorted((tmp_path / "new").glob("*.tar")))
    assert data.manifest == {"adopted": "Some_data_set", "seed": 3}
    assert [(s.prompt, s.seed, float(s.latents_CTHW.max())) for s in data.samples] == [
        (f"prompt {key}", 3 + key, key / 4) for key in range(4)
    ]
    record = read_json(tmp_path / "new" / "2-of-2.tar.prov.json")
    assert [entry["sha256"] for entry in record["inputs"]] == [sha256_file(tars[1])]
    assert "nowhere.tar does not exist" in fail("adopt", "--data", "nowhere.tar", "--out-dir", tmp_path / "x")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_contact_sheet(mini: Mini, run: Run, fail: Run, tmp_path: Path) -> None:
    """Every other of nine clips, whose first and fifth frames of nine stand beside one another, enlarged four times."""
    paths = write_set(tmp_path, [sample(index) for index in range(9)])
    common = ("contact-sheet", "--data", *paths, "--codec", mini.codec, "--count", 5, "--out")
    run(*common, tmp_path / "sheet.png")
    run(*common, tmp_path / "sheet.html")
    sheet = np.array(Image.open(tmp_path / "sheet.png"), dtype=int)
    decoder = codec(compose()["codec"], mini.codec)
    width = 2 * 192 + 4
    for number, index in enumerate((0, 2, 4, 6)):  # in the first row
        frames = to_pixels(decoder.decode(sample(index).latents_CTHW[None]))[0]
        for k, frame in enumerate((frames[0], frames[4])):
            left = 28 + number * (width + 28) + 196 * k
            shown = sheet[56 : 56 + 192, left : left + 192]
            assert np.abs(shown - frame.repeat(4, axis=0).repeat(4, axis=1)).max() <= 1
    page = (tmp_path / "sheet.html").read_text()
    assert re.findall(r"prompt &lt;(\d)&gt;", page) == ["0", "2", "4", "6", "8"]
    assert re.findall(r"seed (\d+)", page) == ["40", "42", "44", "46", "48"] and page.count("<img") == 10
    assert "<script" not in page and "http" not in page
    assert "must be .png or .html" in fail(*common, tmp_path / "sheet.gif")
    wide = write_set(tmp_path / "wide", [sample(0, torch.zeros(16, 1, 2, 2))], parts=1)
    said = fail("contact-sheet", "--data", *wide, "--codec", mini.codec, "--out", tmp_path / "wide.png")
    assert "latents of 16 channels, but the codec has 24" in said and not (tmp_path / "wide.png").exists()
