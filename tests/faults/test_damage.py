"""What lies on the disk and is not what was made: the next stage names it, in one sentence, and writes nothing.

Every kind of artefact, damaged or replaced in every way, before each stage that reads it.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import SMALL, Mini, mini  # noqa: F401  a fixture
from tests.cli.test_score import FOUND, detected, official_results

from rcm.artefact import beside, read_json, recording, write_json
from rcm.cli import main

DATA, RESULTS = Path("data/tiny/images"), Path("results/tiny/images")
CHECKPOINTS, PROMPTS, TEXT, SHARDS = (DATA / name for name in ("checkpoints", "prompts", "text", "shards"))
ROOT = Path(__file__).parents[2]
QUICK = [
    *("distillation.student_updates=1", "distillation.batch=2", "distillation.preview_every=0"),
    *("distillation.scm_only=0", "distillation.critic_warmup=0", "teacher.steps=2"),
]
SUITE = ["suite=report", "suites.report.per_task=1", "suites.report.samples=1", "evaluation.bootstrap=2"]
LENIENT = ["evaluation.oracle_at_least=0", "evaluation.floor_at_most=1"]
BIG = ["experiment=cosmos-predict2-2b-images", "suites.report.samples=2", "evaluation.bootstrap=2"]

# --- Stages, as the rules call them; their outputs stand below {out} ------------------------------------------------

CODEC, STUDENT = CHECKPOINTS / "codec.pth", DATA / "rcm-0" / "student.safetensors"
SAMPLES = DATA / "samples" / "{model}" / "report" / "1-of-1"
SCORES = [RESULTS / "scores" / f"{model}.json" for model in ("rcm-0-1", "oracle-0", "shuffled-0")]


def words(*parts: Any) -> list[str]:
    return [str(part) for part in parts]


def sample(*by: Any) -> list[str]:
    given = ("--codec", CODEC, "--prompts", PROMPTS / "report.jsonl", "--part", "1-of-1")
    return words("sample", *SMALL, *SUITE, "teacher.steps=2", *given, *by, "--out", "{out}/samples")


STAGES: dict[str, list[str]] = {
    "convert": words("convert", *SMALL, "--checkpoint", CHECKPOINTS / "transformer.pth", "--out", "{out}/teacher"),
    "convert student": words("convert", *SMALL, "--checkpoint", STUDENT.with_suffix(".pth"), "--out", "{out}/again"),
    "embed": words(
        "embed", *SMALL, "--prompts", PROMPTS / "report.jsonl", "--part", "1-of-1", "--out", "{out}/text.safetensors"
    ),
    "synthesize": words(
        *("synthesize", *SMALL, "teacher.steps=2", "--teacher", DATA / "teacher", "--prompts", PROMPTS / "train.jsonl"),
        *("--text", TEXT / "train.safetensors", "--shard", "1-of-2", "--out", "{out}/1-of-2.tar"),
    ),
    "distill": words(
        *("distill", *SMALL, *QUICK, "--teacher", DATA / "teacher", "--data", SHARDS / "1-of-2.tar"),
        *(SHARDS / "2-of-2.tar", "--codec", CODEC, "--text", TEXT / "report.safetensors", "--resume", "{out}/resume"),
        *("--out", "{out}/dcp", "--metrics", "{out}/metrics.jsonl", "--previews", "{out}/previews"),
    ),
    "verify": words("verify", "--data", SHARDS / "1-of-2.tar", SHARDS / "2-of-2.tar"),
    "merge": words(
        *("merge", "--data", SHARDS / "1-of-2.tar", SHARDS / "2-of-2.tar", "--shards", 1, "--out-dir", "{out}/merged")
    ),
    "export": words("export", *SMALL, "--student", DATA / "rcm-0/dcp", "--out", "{out}/student.safetensors"),
    "sample student": sample("--checkpoint", STUDENT, "--text", TEXT / "report.safetensors", "--steps", 1),
    "sample teacher": sample("--checkpoint", DATA / "teacher", "--steps", 2),
    "sample control": sample("--control", "codec", "--steps", 0),
    "throughput": words(
        *("throughput", *SMALL, *SUITE, "evaluation.throughput=1", "--checkpoint", STUDENT, "--codec", CODEC),
        *("--prompts", PROMPTS / "report.jsonl", "--steps", 1, "--out", "{out}/rcm-0-1.json"),
    ),
    "precision": words(
        *("precision", *SMALL, "suite=report", "evaluation.precision.times=2", "evaluation.precision.samples=1"),
        *("teacher.steps=2", "--teacher", DATA / "teacher", "--checkpoint", STUDENT),
        *("--prompts", PROMPTS / "report.jsonl", "--text", TEXT / "report.safetensors", "--out", "{out}/rcm-0.json"),
    ),
    "evaluate": words(
        *("evaluate", *SUITE, "--samples", str(SAMPLES).format(model="rcm-0-1")),
        *("--diversity", str(SAMPLES).format(model="oracle-0"), "--prompts", PROMPTS / "report.jsonl"),
        *("--out", "{out}/rcm-0-1.json", "--results", "{out}/rcm-0-1.results.jsonl"),
    ),
    "evaluate measured": words(
        *("evaluate", *BIG, "--measured", RESULTS / "measured/rcm-0-1.jsonl"),
        *("--out", "{out}/rcm-0-1.json", "--results", "{out}/rcm-0-1.results.jsonl"),
    ),
    "evaluate official": words(
        *("evaluate", *BIG, "evaluation.scorer=geneval-mmdet", "--official", RESULTS / "official/rcm-0-1.jsonl"),
        *("--out", "{out}/rcm-0-1.json", "--results", "{out}/rcm-0-1.results.jsonl"),
    ),
    "table": words(
        *("table", *LENIENT, "--name", "table1", "--scores", SCORES[0], "--controls", *SCORES[1:]),
        *("--published", ROOT / "config/published/table1.csv", "--out-dir", "{out}/tables"),
    ),
    "table2": words(
        *("table", *LENIENT, "--name", "table2", "--scores", SCORES[0], "--controls", *SCORES[1:]),
        *("--throughput", RESULTS / "throughput/rcm-0-1.json", "--published", ROOT / "config/published/table2.csv"),
        *("--out-dir", "{out}/tables"),
    ),
    "report": words(
        "report", "--scores", *SCORES, "--results", "results/tiny", "data/tiny", "--out", "{out}/page.html"
    ),
}
for _name, _inputs in {
    "figure_samples": [str(SAMPLES).format(model="rcm-0-1"), str(SAMPLES).format(model="oracle-0")],
    "figure_training": [DATA / "rcm-0/metrics.jsonl"],
    "figure_precision": [RESULTS / "precision/rcm-0.json"],
}.items():
    STAGES[_name] = words("figure", "--name", _name, "--inputs", *_inputs, "--out", "{out}/figure.png")


def call(stage: list[str], out: Path | str) -> int:
    return main([word.replace("{out}", str(out)) for word in stage])


# --- What they make of one another ----------------------------------------------------------------------------------


_BUILT: list[Path] = []


@pytest.fixture
def tree(
    mini: Mini,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The artefacts of a small project, made once, and beside each, under `other-`, another one of its kind."""
    if not _BUILT:
        folder = tmp_path_factory.mktemp("project")
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for seed in (1, 0):  # the other ones first, which then go aside
                _make(mini, seed)
                if seed:
                    for top in ("data", "results"):
                        Path(top).rename(f"other-{top}")
        _BUILT.append(folder)
    monkeypatch.chdir(_BUILT[0])
    return _BUILT[0]


def _make(mini: Mini, seed: int) -> None:  # noqa: F811
    def run(*parts: Any) -> None:
        assert main(words(*parts)) == 0

    def stage(name: str, made: str, place: Path, *more: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(STAGES, name, [word.replace(f"{{out}}/{made}", str(place)) for word in STAGES[name]])
            assert call([*STAGES[name], *more], "{out}") == 0

    for name, source in (("transformer", mini.transformer), ("codec", mini.codec)):
        place = DATA / "checkpoints" / f"{name}.pth"
        place.parent.mkdir(parents=True, exist_ok=True)
        copy = mini.folder / f"{name}-{seed}.pth"
        if seed:  # one weight is another
            from rcm.checkpoints import load_pth, save_pth

            state = load_pth(source)
            first = next(iter(sorted(state)))
            save_pth(copy, {**state, first: state[first] + 1})
        else:
            shutil.copyfile(source, copy)
        run(
            "download",
            f"checkpoints.{name}.source={copy}",
            f"checkpoints.{name}.sha256=null",
            "--name",
            name,
            "--out",
            place,
        )
    run("prompts", *SUITE, f"suites.report.seed={seed}", "--out", PROMPTS / "report.jsonl")
    run(
        "prompts",
        "suite=train",
        "suites.train.prompts=4",
        f"suites.train.seed={seed}",
        "--out",
        PROMPTS / "train.jsonl",
    )
    for suite in ("train", "report"):
        run("embed", *SMALL, "--prompts", PROMPTS / f"{suite}.jsonl", "--out", TEXT / f"{suite}.safetensors")
    stage("convert", "teacher", DATA / "teacher")
    stage("synthesize", "1-of-2.tar", SHARDS / "1-of-2.tar")
    with pytest.MonkeyPatch.context() as patch:
        second = [word.replace("1-of-2", "2-of-2") for word in STAGES["synthesize"]]
        patch.setitem(STAGES, "synthesize", second)
        stage("synthesize", "2-of-2.tar", SHARDS / "2-of-2.tar")
    distill = [word.replace("{out}", str(DATA / "rcm-0")) for word in STAGES["distill"]]
    run(*distill, f"seed={seed}")
    run(*(word.replace("{out}", str(DATA / "rcm-0")) for word in STAGES["export"]))
    stage("sample student", "samples", Path(str(SAMPLES).format(model="rcm-0-1")))
    for control in ("oracle", "shuffled"):
        by = ("--control", control, "--steps", "0")
        run(*(w.replace("{out}/samples", str(SAMPLES).format(model=f"{control}-0")) for w in sample(*by)))
    for model in ("rcm-0-1", "oracle-0", "shuffled-0"):
        given = ("--samples", str(SAMPLES).format(model=model), "--prompts", PROMPTS / "report.jsonl")
        out = ("--out", RESULTS / f"scores/{model}.json", "--results", RESULTS / f"scores/{model}.results.jsonl")
        diverse = ("--diversity", str(SAMPLES).format(model=model)) if model != "shuffled-0" else ()
        run("evaluate", *SUITE, *given, *diverse, *out)
    stage("throughput", "rcm-0-1.json", RESULTS / "throughput/rcm-0-1.json")
    stage("precision", "rcm-0.json", RESULTS / "precision/rcm-0.json")
    for kind, write in (("measured", detected), ("official", lambda path, found: official_results(path))):
        place = RESULTS / kind / "rcm-0-1.jsonl"
        place.parent.mkdir(parents=True)
        with recording(place, stage="measure", seed=seed):
            found = {name: [*classes, *(["cup"] * seed)] for name, classes in FOUND.items()}
            write(place, found)
            if kind == "official":
                place.write_text(place.read_text().replace("somewhere", f"somewhere-{seed}"))
    stage("table", "tables", Path("results/tiny/tables"))
    stage("figure_precision", "figure.png", Path("results/tiny/figures/figure_precision.png"))


# --- Damage ---------------------------------------------------------------------------------------------------------

SHARD, FOLDER, DIVERSE = SHARDS / "1-of-2.tar", *(Path(str(SAMPLES).format(model=m)) for m in ("rcm-0-1", "oracle-0"))
READ_BY: dict[str, list[str]] = {  # an artefact, or a file of one: the stages that read it
    f"{CHECKPOINTS}/transformer.pth": ["convert"],
    f"{CODEC}": ["sample student", "sample control", "distill", "throughput"],
    f"{DATA}/teacher": ["synthesize", "distill", "sample teacher", "precision"],
    f"{DATA}/rcm-0/dcp": ["export"],
    f"{STUDENT}": ["sample student", "throughput", "precision"],
    f"{STUDENT.with_suffix('.pth')}": ["convert student"],
    f"{PROMPTS}/train.jsonl": ["synthesize"],
    f"{PROMPTS}/report.jsonl": ["embed", "sample student", "throughput", "precision", "evaluate"],
    f"{TEXT}/train.safetensors": ["synthesize"],
    f"{TEXT}/report.safetensors": ["sample student", "distill", "precision"],
    f"{SHARD}": ["distill", "verify", "merge"],
    f"{SHARD}.json": ["distill", "verify", "merge"],
    f"{FOLDER}": ["evaluate", "figure_samples"],
    f"{DIVERSE}": ["evaluate"],
    f"{SCORES[0]}": ["table", "report"],
    f"{SCORES[1]}": ["table"],
    f"{DATA}/rcm-0/metrics.jsonl": ["figure_training"],
    f"{RESULTS}/throughput/rcm-0-1.json": ["table2"],
    f"{RESULTS}/precision/rcm-0.json": ["figure_precision"],
    f"{RESULTS}/measured/rcm-0-1.jsonl": ["evaluate measured"],
    f"{RESULTS}/official/rcm-0-1.jsonl": ["evaluate official"],
    "results/tiny/tables/table1.csv": ["report"],
    "results/tiny/figures/figure_precision.png": ["report"],
}
INSIDE = {
    f"{DATA}/teacher": [".metadata", "__0_0.distcp", "manifest.json"],
    f"{DATA}/rcm-0/dcp": [".metadata", "__0_0.distcp", "manifest.json"],
    f"{FOLDER}": ["00000/samples/0000.png", "00001/metadata.jsonl", "sampling.json"],
    f"{DIVERSE}": ["00000/samples/0000.png"],
}
Damage = Callable[[bytes, random.Random], bytes]


def flipped(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(content.find(b'"wall"') % len(content))  # times are no part of what metrics are
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


DAMAGES: dict[str, Damage] = {
    "half": lambda content, _: content[: len(content) // 2],
    "end": lambda content, _: content[:-2],  # the last byte of a text is a line break, which nobody misses
    "empty": lambda content, _: b"",
    "zeroed": lambda content, _: bytes(len(content)),
    "flipped 1": flipped,
    "flipped 2": flipped,
    "flipped 3": flipped,
}
FILES = [(Path(name, file), Path(name)) for name in READ_BY for file in INSIDE.get(name, [""])]
CASES = [  # in all ways before the first stage that reads it, in one before the others
    pytest.param(file, artefact, stage, damage, id=f"{file}-{damage}-{stage}".replace(" ", "_"))
    for file, artefact in FILES
    for number, stage in enumerate(READ_BY[str(artefact)])
    for damage in ([*DAMAGES, "another's"] if number == 0 else ["flipped 1"])
    if (file.name, damage) != (".metadata", "another's")  # they are equal
]
WHOLE = [
    pytest.param(
        Path(name), stage, record, id=f"{name}-{'with' if record else 'without'}_record-{stage}".replace(" ", "_")
    )
    for name in READ_BY
    for number, stage in enumerate(READ_BY[name])
    for record in ((False, True) if number == 0 else (False,))
]
# A flipped bit in these is nothing that a stage can know without the record; but it may not fall over it.
UNKNOWN = (".jsonl", ".json", ".csv", ".png", "train.safetensors")  # of the last, the tensors of other prompts


def other(path: Path) -> Path:
    """Another one of its kind; such as has the same name in another project, or stands elsewhere in this one."""
    return Path(f"other-{path}")


@contextmanager
def replaced(*paths: Path) -> Iterator[None]:
    """Whatever becomes of these in the block, they are back behind it."""
    aside = {path: path.with_name(f"{path.name}.aside") for path in paths if path.exists()}
    for path, kept in aside.items():
        path.rename(kept)
    try:
        yield
    finally:
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path, kept in aside.items():
            kept.rename(path)


def copy(source: Path, place: Path) -> None:
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, place)


def refused(stage: str, named: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence by which a stage refuses, without having written anything."""
    capsys.readouterr()
    assert call(STAGES[stage], out) in (1, 2)
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if ": note: " not in line]
    assert len(lines) == 1 and ": error: " in lines[0], said
    assert str(named) in lines[0], said
    assert not out.exists() or not [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "artefact", "stage", "damage"), CASES)
def test_damage_is_named_by_the_next_stage(
    file: Path, artefact: Path, stage: str, damage: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, chance = file.read_bytes(), random.Random(f"{file} {damage}")
    damaged = other(file).read_bytes() if damage == "another's" else DAMAGES[damage](content, chance)
    assert damaged != content
    with replaced(file):
        file.write_bytes(damaged)
        refused(stage, artefact, tmp_path / "out", capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("artefact", "stage", "record"), WHOLE)
def test_another_artefact_in_its_place_is_named(
    artefact: Path, stage: str, record: bool, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the record of its own, and with that of an artefact that stands elsewhere in the project."""
    own = beside(artefact, ".prov.json")
    with replaced(artefact, own) if record else replaced(artefact):
        copy(other(artefact), artefact)
        if record:
            elsewhere = artefact.parent / "elsewhere" / artefact.name
            write_json(own, {**read_json(beside(other(artefact), ".prov.json")), "artefact": str(elsewhere)})
        refused(stage, artefact, tmp_path / "out", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["half", "empty", "zeroed", "flipped 1"])
@pytest.mark.parametrize(("file", "artefact"), FILES, ids=[str(file) for file, _ in FILES])
def test_a_damaged_file_without_a_record_is_named_or_taken(
    file: Path, artefact: Path, damage: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, content = READ_BY[str(artefact)][0], file.read_bytes()
    records = [beside(artefact, ".prov.json"), beside(artefact, ".download.json")]
    with replaced(file, *records):
        file.write_bytes(DAMAGES[damage](content, random.Random(f"{file} {damage}")))
        if damage == "flipped 1" and str(file).endswith(UNKNOWN):
            assert call(STAGES[stage], tmp_path / "out") in (0, 1, 2)
        else:
            refused(stage, artefact, tmp_path / "out", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["evaluate", "figure_samples"])
def test_what_viewers_leave_in_a_folder_is_no_damage(stage: str, tree: Path, tmp_path: Path) -> None:
    left = [FOLDER / ".DS_Store", FOLDER / "00000" / "Thumbs.db", FOLDER / "00000/samples/.nfs000000000001"]
    with replaced(*left):
        for file in left:
            file.write_text("a viewer")
        assert call(STAGES[stage], tmp_path / "out") == 0
