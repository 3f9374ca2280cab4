"""workflow/scripts/geneval_official.py around stand-ins for the evaluator, mmdet and the GPU."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from rcm.data.prompts import COCO, counting, single_object

ROOT = Path(__file__).parents[2]

EVALUATOR = '''
"""Takes the options of GenEval's evaluator; an image is correct if its first pixel is green."""
import argparse, json, os, sys
from pathlib import Path
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("imagedir")
parser.add_argument("--outfile")
parser.add_argument("--model-config")
parser.add_argument("--model-path")
args = parser.parse_args()
assert len((Path(__file__).parent / "object_names.txt").read_text().splitlines()) == 80
weights = Path(args.model_path) / "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"
assert weights.read_bytes() == b"weights" and Path(args.model_config).is_file()
lines = []
for folder in sorted(os.listdir(args.imagedir), reverse=True):
    metadata = json.loads((Path(args.imagedir) / folder / "metadata.jsonl").read_text())
    for name in os.listdir(os.path.join(args.imagedir, folder, "samples")):
        path = os.path.join(args.imagedir, folder, "samples", name)
        lines.append({
            "filename": path, "tag": metadata["tag"], "prompt": metadata["prompt"],
            "correct": Image.open(path).getpixel((0, 0)) == (0, 255, 0), "reason": "",
            "metadata": json.dumps(metadata), "details": "{}",
        })
if os.environ.get("FAIL"):
    sys.exit("CUDA error")
with open(args.outfile, "w") as file:
    file.writelines(json.dumps(line) + "\\n" for line in lines[int(os.environ.get("LOSE", 0)):])
'''


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = ROOT / "workflow" / "scripts" / "geneval_official.py"
    spec = importlib.util.spec_from_file_location("geneval_official", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "device_name", lambda: "Tesla V100")
    monkeypatch.setattr(module, "CLIP", Path("/nowhere/ViT-L-14.pt"))
    return module


def write_samples(root: Path, *greens: bool) -> Path:
    for index, green in enumerate(greens):
        folder = root / f"{index:05d}" / "samples"
        folder.mkdir(parents=True)
        metadata = single_object("cat") if index % 2 else counting("dog", 3)
        (folder.parent / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
        for number in range(2):
            Image.new("RGB", (4, 4), (0, 255, 0) if green else (255, 0, 0)).save(folder / f"{number:04d}.png")
    return root


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Options for the stand-ins."""
    evaluator, config, weights = tmp_path / "evaluate.py", tmp_path / "config.py", tmp_path / "weights.pth"
    evaluator.write_text(EVALUATOR)
    (tmp_path / "object_names.txt").write_text("".join(f"{name}\n" for name in COCO.classes))
    config.write_text("")
    weights.write_bytes(b"weights")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (evaluator, weights)]
    return [
        *("--evaluator", str(evaluator), "--evaluator-sha256", digests[0], "--config", str(config)),
        *("--checkpoint", str(weights), "--checkpoint-sha256", digests[1][:8]),
    ]


def test_results_follow_a_line_that_says_how_they_were_reached(
    script: ModuleType, given: list[str], tmp_path: Path
) -> None:
    samples, known = write_samples(tmp_path / "s", True, False), write_samples(tmp_path / "k", True, True, True, False)
    out = tmp_path / "new" / "out.jsonl"
    options = ["--known", str(known), "--known-at-least", "0.75"]
    assert script.main([*given, *options, "--samples", str(samples), "--out", str(out)]) == 0
    header, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert header["official"] == "geneval-mmdet" and header["version"] == "1"
    assert header["device"] == "Tesla V100"
    assert header["models"] == {
        "evaluator": hashlib.sha256(EVALUATOR.encode()).hexdigest(),
        "detector": hashlib.sha256(b"weights").hexdigest(),
    }
    assert header["known"]["score"] == 0.75 and header["known"]["facts"] == 8
    assert header["known"]["failed"] == ["a photo of a cat"] * 2
    assert header["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert header["versions"]["torch"]
    assert [line["filename"] for line in lines] == [
        *("00000/samples/0000.png", "00000/samples/0001.png"),
        *("00001/samples/0000.png", "00001/samples/0001.png"),
    ]
    assert [line["correct"] for line in lines] == [True, True, False, False]
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_the_results_can_be_scored(script: ModuleType, given: list[str], tmp_path: Path) -> None:
    from rcm.evaluation.geneval_scores import from_results

    out = tmp_path / "out.jsonl"
    samples = write_samples(tmp_path / "s", True, False, False)
    assert script.main([*given, "--samples", str(samples), "--out", str(out)]) == 0
    scores = from_results(out, model="rcm", steps=4, resamples=10).scores
    assert scores["metrics"]["geneval.counting"]["value"] == 0.5
    assert scores["metrics"]["geneval.overall"]["value"] == 0.25  # and none of the single objects
    assert scores["evaluator"]["device"] == "Tesla V100" and scores["evaluator"]["known"] is None


def refusal(script: ModuleType, capsys: pytest.CaptureFixture[str], out: Path, *options: str) -> str:
    assert script.main([*options, "--out", str(out)]) == 1
    assert not out.exists()
    return capsys.readouterr().err


def test_untrusted_on_known_images_is_refused(
    script: ModuleType, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, known = write_samples(tmp_path / "s", True), write_samples(tmp_path / "k", True, False)
    options = [*given, "--samples", str(samples), "--known", str(known)]
    said = refusal(script, capsys, tmp_path / "out.jsonl", *options)
    assert "fails 2 of 4 known images, such as 'a photo of a cat': 0.50 are correct, at least 0.8 are needed" in said


@pytest.mark.parametrize(
    ("option", "name"), [("--evaluator-sha256", "evaluate.py"), ("--checkpoint-sha256", "weights")]
)
def test_other_files_than_the_pinned_are_refused(
    script: ModuleType,
    given: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
) -> None:
    options = [*given, option, "0123456789abcdef", "--samples", str(write_samples(tmp_path / "s", True))]
    said = refusal(script, capsys, tmp_path / "out.jsonl", *options)
    assert name in said and "expected 0123456789abcdef: it is another version, or damaged" in said


def test_the_default_is_the_pinned_evaluator(
    script: ModuleType, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = given.index("--evaluator-sha256")
    options = [*given[:place], *given[place + 2 :], "--samples", str(write_samples(tmp_path / "s", True))]
    said = refusal(script, capsys, tmp_path / "out.jsonl", *options)
    assert "expected c0fdeb8315f7d3ed72b56f466652afba5216f854109c6eeea339f9982474ea46" in said


def test_names_of_other_classes_are_refused(
    script: ModuleType, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "object_names.txt").write_text("cat\n" * 80)
    options = [*given, "--samples", str(write_samples(tmp_path / "s", True))]
    assert "object_names.txt has the SHA-256" in refusal(script, capsys, tmp_path / "out.jsonl", *options)


@pytest.mark.parametrize(
    ("variable", "says"), [("FAIL", "failed on"), ("LOSE", "gave 3 results for 4 images")], ids=["fail", "lose"]
)
def test_an_evaluator_that_fails_or_loses_images_is_refused(
    script: ModuleType,
    given: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    says: str,
) -> None:
    monkeypatch.setenv(variable, "1")
    options = [*given, "--samples", str(write_samples(tmp_path / "s", True, True))]
    assert says in refusal(script, capsys, tmp_path / "out.jsonl", *options)


def test_broken_samples_are_named(
    script: ModuleType, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, out = tmp_path / "s", tmp_path / "out.jsonl"
    options = [*given, "--samples", str(samples)]
    assert f"no folder of samples {samples}" in refusal(script, capsys, out, *options)
    samples.mkdir()
    assert "expected folders such as 00000/samples" in refusal(script, capsys, out, *options)
    write_samples(samples, True, True)
    (samples / "00001" / "samples" / "0001.png").write_bytes(b"")
    assert "00001/samples/0001.png is empty" in refusal(script, capsys, out, *options)
    for path in (samples / "00001" / "samples").iterdir():
        path.unlink()
    assert "no samples such as 0000.png" in refusal(script, capsys, out, *options)
    (samples / "00001" / "metadata.jsonl").unlink()
    assert "metadata.jsonl is missing" in refusal(script, capsys, out, *options)


def test_a_download_is_checked_and_kept(script: ModuleType, tmp_path: Path) -> None:
    source, cache = tmp_path / "file.txt", tmp_path / "cache"
    source.write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    with pytest.raises(script.Refused, match="another version, or damaged"):
        script.fetched(source.as_uri(), "00", cache, "--evaluator")
    assert list(cache.iterdir()) == []
    found = script.fetched(source.as_uri(), digest, cache, "--evaluator")
    source.unlink()
    assert script.fetched(source.as_uri(), digest, cache, "--evaluator") == found
    assert found.read_bytes() == b"content"
    with pytest.raises(script.Refused, match=r"cannot fetch .*; fetch it elsewhere and name it by --checkpoint"):
        script.fetched((tmp_path / "none.pth").as_uri(), "00", cache, "--checkpoint")


class Cuda:
    """Stands for `torch` on a machine with one card."""

    __version__ = "1.12.1+cu113"

    def __init__(self, name: str, capability: tuple[int, int] | None):
        self.name, self.capability, self.cuda = name, capability, self

    def is_available(self) -> bool:
        return self.capability is not None

    def get_device_name(self) -> str:
        return self.name

    def get_device_capability(self) -> tuple[int, int] | None:
        return self.capability

    def get_arch_list(self) -> list[str]:
        return ["sm_37", "sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86"]


@pytest.mark.parametrize(
    ("name", "capability", "says"),
    [
        ("V100", (7, 0), None),
        ("A100", (8, 0), None),
        ("L4", (8, 9), None),
        ("H100", (9, 0), r"PyTorch 1.12.1\+cu113 has no code for the H100 \(sm_90\)"),
        ("none", None, "needs a GPU"),
    ],
)
def test_a_card_that_pytorch_has_no_code_for_is_refused(monkeypatch, tmp_path, name, capability, says) -> None:
    spec = importlib.util.spec_from_file_location("official", ROOT / "workflow" / "scripts" / "geneval_official.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "torch", Cuda(name, capability))
    if says is None:
        assert module.device_name() == name
    else:
        with pytest.raises(module.Refused, match=says):
            module.device_name()


def test_mmdets_configuration_is_found_in_its_wheel(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mmdet"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(script.Refused, match="has no mask2former_swin-s"):
        script.config_of_mmdet()
    config = package / ".mim" / "configs" / "mask2former" / f"{script.DETECTOR}.py"
    config.parent.mkdir(parents=True)
    config.write_text("")
    assert script.config_of_mmdet() == config


def test_the_environment_pins_what_it_installs() -> None:
    import yaml

    found = yaml.safe_load((ROOT / "workflow" / "envs" / "geneval.yaml").read_text())
    pip = found["dependencies"][-1]["pip"]
    packages = dict(line.split("==") for line in pip if not line.startswith("--"))
    assert packages["mmdet"] == "2.27.0" and packages["mmcv-full"] == "1.7.1"
    assert packages["torch"] == "1.12.1+cu113"
    assert int(packages["numpy"].split(".")[0]) < 2 and int(packages["setuptools"].split(".")[0]) < 81
