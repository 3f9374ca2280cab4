"""The stages of checkpoints: what they take and write, and what they say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rcm.artefact import content_sha256, sha256_file
from rcm.checkpoints import load_dcp, load_pth, read_export, read_settings, save_dcp
from rcm.checkpoints.diffusers import to_diffusers
from rcm.cli.config import compose

from .conftest import SMALL, Mini, Run

PLAIN = [*SMALL, "network.positions=null"]  # a network that diffusers has


@pytest.fixture
def student(mini: Mini, tmp_path: Path) -> Path:
    save_dcp(tmp_path / "dcp", load_pth(mini.transformer))
    return tmp_path / "dcp"


def test_download_leaves_a_manifest_and_convert_trusts_no_other_file(
    mini: Mini, run: Run, fail: Run, tmp_path: Path
) -> None:
    out = tmp_path / "transformer.pth"
    run("download", f"checkpoints.transformer.source={mini.transformer}", "checkpoints.transformer.sha256="
        + sha256_file(mini.transformer), "--name", "transformer", "--out", out)  # fmt: skip
    manifest = json.loads(Path(f"{out}.download.json").read_text())
    assert manifest["source"] == str(mini.transformer) and manifest["sha256"] == sha256_file(out)
    run("convert", *SMALL, "--checkpoint", out, "--out", tmp_path / "dcp")
    record = json.loads((tmp_path / "dcp.prov.json").read_text())
    assert [entry["sha256"] for entry in record["inputs"]] == [sha256_file(out)]
    out.write_bytes(mini.codec.read_bytes())
    said = fail("convert", *SMALL, "--checkpoint", out, "--out", tmp_path / "again")
    assert "transformer.pth has changed since it was downloaded" in said and not (tmp_path / "again").exists()


def test_download_records_no_signature(mini: Mini, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "x.pth"
    monkeypatch.setattr("rcm.checkpoints.download", lambda source, out, sha256: out.write_text(source))
    run(
        "download",
        "checkpoints.transformer.source='http://host/x.pth?token=secret'",
        "--name",
        "transformer",
        "--out",
        out,
    )
    assert out.read_text() == "http://host/x.pth?token=secret"
    assert json.loads(Path(f"{out}.prov.json").read_text())["config"]["source"] == "http://host/x.pth"


def test_download_of_what_the_configuration_does_not_name(fail: Run, tmp_path: Path) -> None:
    said = fail("download", "--name", "vae", "--out", tmp_path / "x")
    assert "the configuration has no checkpoint 'vae'; expected one of transformer, codec" in said


def test_convert_takes_every_format(mini: Mini, run: Run, tmp_path: Path) -> None:
    state = load_pth(mini.transformer)
    save_file(state, tmp_path / "x.safetensors")
    (tmp_path / "folder").mkdir()
    save_file({f"module.net.{key}": value for key, value in state.items()}, tmp_path / "folder" / "y.safetensors")
    contents = set()
    for number, checkpoint in enumerate([mini.transformer, tmp_path / "x.safetensors", tmp_path / "folder"]):
        run("convert", *SMALL, "--checkpoint", checkpoint, "--out", tmp_path / str(number))
        contents.add(content_sha256(tmp_path / str(number)))
    run("convert", *SMALL, "--network", "synthesizer", "--checkpoint", tmp_path / "0", "--out", tmp_path / "dcp")
    assert contents == {content_sha256(tmp_path / "dcp")}


def test_convert_from_diffusers_names_and_to_another_type(mini: Mini, run: Run, tmp_path: Path) -> None:
    state = {key: value for key, value in load_pth(mini.transformer).items() if not key.startswith("positions")}
    names = to_diffusers(compose(PLAIN)["network"], state)
    save_file({names[key]: value for key, value in state.items()}, tmp_path / "x.safetensors")
    out = tmp_path / "dcp"
    run("convert", *PLAIN, "--dtype", "bfloat16", "--checkpoint", tmp_path / "x.safetensors", "--out", out)
    found = load_dcp(out)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value.bfloat16()) for key, value in state.items())


def test_export_writes_what_was_asked_for(student: Path, run: Run, fail: Run, tmp_path: Path) -> None:
    state, out = load_dcp(student), tmp_path / "student.safetensors"
    run("export", *SMALL, "seed=3", "--student", student, "--out", out)
    assert sorted(path.name for path in tmp_path.glob("student.*") if path.suffix != ".json") == [
        "student.pth",
        "student.safetensors",
    ]
    settings, first = read_settings(out), out.read_bytes()
    assert settings == read_export(out)[1]
    config = compose(SMALL)
    assert settings["sampler"] == config["sampler"] and settings["network"] == config["network"]
    assert settings["guidance"] == config["distillation"]["guidance"] and settings["seed"] == 3
    assert settings["student_sha256"] == content_sha256(student) and len(settings["code_sha256"]) == 64
    assert settings["parameterisation"].startswith("rectified-flow velocity")
    with safe_open(out, framework="pt") as file:
        assert file.keys() and set(file.metadata()) == {"rcm"}
    for found in (read_export(out)[0], load_file(out), torch.load(out.with_suffix(".pth"), weights_only=True)):
        assert found.keys() == state.keys() and all(torch.equal(found[key], value) for key, value in state.items())

    run("export", *SMALL, "seed=3", "--student", student, "--format", "safetensors", "--out", out)
    assert out.read_bytes() == first
    run("export", *SMALL, "--student", student, "--format", "pth", "--dtype", "bfloat16", "--out", out)
    assert all(torch.equal(value, state[key].bfloat16()) for key, value in load_pth(out.with_suffix(".pth")).items())
    said = fail("export", *SMALL, "--student", student, "--format", "diffusers", "--out", out)
    assert "positions" in said and not out.with_suffix(".diffusers").exists()
    assert "--out must end in .safetensors" in fail("export", *SMALL, "--student", student, "--out", tmp_path / "x.pth")


def test_export_for_diffusers(student: Path, run: Run, tmp_path: Path) -> None:
    state = {key: value for key, value in load_dcp(student).items() if not key.startswith("positions")}
    save_dcp(student, state)
    run("export", *PLAIN, "--student", student, "--format", "diffusers", "--out", tmp_path / "student.safetensors")
    folder = tmp_path / "student.diffusers"
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    assert (tmp_path / "student.diffusers.prov.json").exists() and not (tmp_path / "student.safetensors").exists()
    run("convert", *PLAIN, "--checkpoint", folder, "--out", tmp_path / "back")
    assert content_sha256(tmp_path / "back") == content_sha256(student)


def test_export_of_another_network(student: Path, fail: Run, tmp_path: Path) -> None:
    said = fail("export", *SMALL, "objective=meanflow", "--student", student, "--out", tmp_path / "x.safetensors")
    assert "missing second_time_embedding" in said
    (student / "__0_0.distcp").write_bytes(b"")
    said = fail("export", *SMALL, "--student", student, "--out", tmp_path / "x.safetensors")
    assert "__0_0.distcp is damaged" in said and not (tmp_path / "x.safetensors").exists()
