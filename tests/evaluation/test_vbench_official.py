"""What runs VBench's own code, with a package of the same interface in its place."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rcm.evaluation import vbench

SCRIPT = Path(__file__).parents[2] / "workflow" / "scripts" / "vbench_official.py"
INFO = [
    {"prompt_en": "a red car", "dimension": ["color"]},
    {"prompt_en": "still [life]-2", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a dog", "dimension": ["subject_consistency", "dynamic_degree"]},
]
VIDEOS = [
    f"{name}-{i}.mp4" for name, count in (("a red car", 5), ("still [life]-2", 7), ("a dog", 5)) for i in range(count)
]
CODE = """
import json, os
from pathlib import Path

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.info, self.out = device, full_info_dir, output_path
        os.makedirs(output_path, exist_ok=True)

    def evaluate(self, videos_path, name, dimension_list, mode, **options):
        assert mode == "vbench_standard" and not options
        names = os.listdir(videos_path)
        assert {Path(name).suffix for name in names} == {".mp4"}
        entries = []
        for entry in json.load(open(self.info)):
            if dimension_list[0] in entry["dimension"]:
                for i in range(5):
                    video = f"{entry['prompt_en']}-{i}.mp4"
                    if video in names:
                        value = float(open(os.path.join(videos_path, video)).read())
                        entries.append({"video_path": os.path.join(videos_path, video), "video_results": value})
        if dimension_list[0] == "dynamic_degree":
            raise RuntimeError("no RAFT")
        seen = [e for e in entries if e["video_results"] > 0]
        if dimension_list[0] == "color":
            entries = seen
        score = sum(e["video_results"] for e in entries) / len(entries)
        json.dump({dimension_list[0]: [score, entries]}, open(f"{self.out}/{name}_eval_results.json", "w"))
"""
FILTER = """
import glob, json, os, shutil
DEVICE = "cuda"

def static_filter(args):
    assert DEVICE == "cpu" and args.filter_scope == "temporal_flickering" and "dropout" not in args
    assert args.model.endswith("/cache/raft_model/models/raft-things.pth")
    kept = {"still [life]-2": {"static_path": []}, "another": {"static_path": []}}
    for path in sorted(glob.glob(os.path.join(args.videos_path, "*.mp4"))):
        if "still" in path and float(open(path).read()) > 0.69 and len(kept["still [life]-2"]["static_path"]) < 5:
            kept["still [life]-2"]["static_path"].append(path)
    os.makedirs(args.result_path + "/filtered_videos")
    json.dump(kept, open(os.path.join(args.result_path, args.store_name), "w"))
    for prompt, entry in kept.items():
        for i, path in enumerate(entry["static_path"]):
            shutil.copy(path, f"{args.result_path}/filtered_videos/{prompt}-{i}.mp4")
"""
LONG = """
import json, os
from pathlib import Path

class VBenchLong:
    def __init__(self, device, full_info_dir, output_path):
        self.out = output_path
        os.makedirs(output_path, exist_ok=True)

    def evaluate(self, videos_path, name, dimension_list, mode, **options):
        assert mode == "long_vbench_standard" and options["static_filter_flag"] and options["w_clip2clip"] == 0
        Path(videos_path, "0clips").mkdir(exist_ok=True)
        first = os.listdir(videos_path)[0]
        entries = [{"video_path": f"x/{first[:-4]}_000.mp4", "video_results": 0.5}]
        json.dump({dimension_list[0]: [0.5, entries, entries]}, open(f"{self.out}/{name}_eval_results.json", "w"))
"""


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vbench_official", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of VBench's interface, found first, and forgotten afterwards."""
    root = tmp_path / "site"
    for name, text in {
        "vbench/__init__.py": CODE,
        "vbench/utils.py": f"CACHE_DIR = {str(root / 'cache')!r}\ndef init_submodules(names): assert len(names) == 1",
        "vbench/cli/__init__.py": "",
        "vbench/cli/static_filter.py": FILTER,
        "vbench2_beta_long/__init__.py": LONG,
        "vbench2_beta_long/configs/clip_length_mix.yaml": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(root)
    yield root
    for name in [name for name in sys.modules if name.split(".")[0] in ("vbench", "vbench2_beta_long")]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Videos whose content is their value."""
    samples = tmp_path / "samples"
    samples.mkdir()
    for number, name in enumerate(VIDEOS):
        (samples / name).write_text(str(0.5 + number / 40))
    (samples / "grid.png").write_text("not a video")
    (tmp_path / "info.json").write_text(json.dumps(INFO))
    return samples


@pytest.fixture
def run(script: ModuleType, code: Path, folder: Path, tmp_path: Path) -> Callable[..., Any]:
    def ran(*dimensions: str, more: tuple[str, ...] = (), samples: Path = folder) -> Any:
        options = [
            "--samples",
            str(samples),
            "--info",
            str(tmp_path / "info.json"),
            "--out",
            str(tmp_path / "out.json"),
        ]
        options += ["--device", "cpu", "--still-samples", "7", *more]
        options += ["--dimensions", *dimensions] if dimensions else []
        status = script.main(options)
        assert not list(tmp_path.glob(".out*"))  # nothing is left behind
        return json.loads((tmp_path / "out.json").read_text()) if status == 0 else None

    return ran


def test_results_are_what_the_code_says_and_are_read_back(run: Callable[..., Any], tmp_path: Path) -> None:
    found = run("color", "subject_consistency")
    assert found["results"]["color"][0] == pytest.approx(0.55)
    assert found["results"]["subject_consistency"][0] == pytest.approx(0.5 + 14 / 40)
    assert (found["official"], found["version"], found["gpus"], found["device"]) == ("vbench", "1", 1, "CPU")
    assert (found["missing"], found["failed"]) == ([], {})
    assert "torch" in found["versions"]
    read = vbench.read_official(tmp_path / "out.json", "vbench")
    assert read.scores == {name: entry[0] for name, entry in found["results"].items()}
    assert read.videos["color"]["a red car"] == pytest.approx({i: 0.5 + i / 40 for i in range(5)})


def test_flicker_is_of_those_that_stand_still_under_new_numbers(run: Callable[..., Any], folder: Path) -> None:
    """Sample i is worth .625 + i / 40; those of .7 and more stand still here."""
    found = run("temporal_flickering", "subject_consistency")
    assert found["static"] == {"still [life]-2": [3, 4, 5, 6], "another": []}
    score, videos = found["results"]["temporal_flickering"]
    assert score == pytest.approx((0.7 + 0.725 + 0.75 + 0.775) / 4)
    assert [Path(entry["video_path"]).name for entry in videos] == [f"still [life]-2-{i}.mp4" for i in range(4)]
    for i in range(7):
        (folder / f"still [life]-2-{i}.mp4").write_text("0.1")
    found = run("temporal_flickering", "subject_consistency")
    assert found["failed"] == {"temporal_flickering": "every video of its prompts moves"}


def test_a_dimension_that_fails_is_named_and_the_others_stay(
    run: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(5):
        (folder / f"a red car-{i}.mp4").write_text("0")
    dimensions, kept = ("color", "dynamic_degree", "subject_consistency"), ("--kept", str(folder.parent / "kept"))
    assert run(*dimensions, more=kept) is None
    assert "dynamic_degree failed, see above; what the other dimensions gave is kept" in capsys.readouterr().err
    (finished,) = (folder.parent / "kept").glob("*.json")
    known = json.loads(finished.read_text())
    finished.write_text(json.dumps({**known, "result": [0.75, known["result"][1]]}))
    found = run(*dimensions, more=(*kept, "--allow-missing"))
    assert found["results"]["subject_consistency"][0] == 0.75  # not judged again
    (folder / "a dog-0.mp4").write_text("0.5")  # other videos
    found = run(*dimensions, more=(*kept, "--allow-missing"))
    assert found["results"]["subject_consistency"][0] != 0.75
    assert found["failed"] == {"color": "no video shows any of its objects", "dynamic_degree": "RuntimeError: no RAFT"}
    assert list(found["results"]) == ["subject_consistency"]
    assert "dynamic_degree failed: RuntimeError: no RAFT" in capsys.readouterr().err


def test_nothing_is_written_where_every_dimension_fails(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("dynamic_degree") is None
    assert "every dimension failed" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_missing_videos_are_refused_or_named(
    run: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a dog-3.mp4").unlink()
    (folder / "still [life]-2-6.mp4").unlink()
    assert run() is None
    assert "2 of 17 videos are missing" in (said := capsys.readouterr().err)
    assert "the first still [life]-2-6.mp4" in said
    found = run("subject_consistency", more=("--allow-missing",))
    assert found["missing"] == ["a dog-3.mp4"]
    assert len(found["results"]["subject_consistency"][1]) == 4


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda samples: (samples / "a dog-0.mp4").write_bytes(b""), "1 videos in .* are empty, the first a dog-0.mp4"),
        (lambda samples: (samples.parent / "info.json").write_text("{"), "expected VBench_full_info.json"),
        (lambda samples: (samples.parent / "info.json").write_text('["x"]'), "expected VBench_full_info.json"),
    ],
)
def test_bad_input_is_named(
    run: Callable[..., Any],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], Any],
    words: str,
) -> None:
    spoil(folder)
    assert run("subject_consistency") is None
    assert re.search(words, capsys.readouterr().err)


def test_other_refusals(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("colour") is None
    assert "VBench has no dimension colour" in capsys.readouterr().err
    assert run("color", samples=tmp_path / "nothing") is None
    assert "no folder of samples" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run("color") is None
    assert "WORLD_SIZE is 8" in capsys.readouterr().err


def test_vbench_long_sees_files_before_its_own_folders(run: Callable[..., Any], code: Path, tmp_path: Path) -> None:
    found = run("color", more=("--protocol", "vbench-long"))
    assert found["official"] == "vbench-long"
    assert found["results"]["color"][1][0]["video_path"] == "x/a red car-0_000.mp4"
    assert vbench.read_official(tmp_path / "out.json", "vbench-long").videos["color"] == {"a red car": {0: 0.5}}


def test_vbench_long_without_its_configuration_is_refused(
    run: Callable[..., Any], code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code / "vbench2_beta_long/configs/clip_length_mix.yaml").unlink()
    (code / "vbench2_beta_long/configs").rmdir()
    assert run("color", more=("--protocol", "vbench-long")) is None
    assert "needs an editable installation" in capsys.readouterr().err


def test_dimensions_are_those_of_the_scores(script: ModuleType) -> None:
    assert script.DIMENSIONS == vbench.DIMENSIONS
    assert script.FORMAT == vbench.FORMAT


def test_what_snakemake_installs_is_pinned() -> None:
    import yaml

    environment = yaml.safe_load((SCRIPT.parents[1] / "envs" / "vbench.yaml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert all("==" in requirement for requirement in pip)
    assert {"numpy==1.26.4", "transformers==4.33.2", "tokenizers==0.13.3", "timm==1.0.12", "decord==0.6.0"} <= set(pip)
    text = (SCRIPT.parents[1] / "envs" / "vbench.post-deploy.sh").read_text()
    assert "45e79ec" in text
    assert "detectron2@fd27788985af0f4ca800bca563acdb700bb890e2" in text
