"""dvc.yaml and params.json against the workflow, and a stage of DVC run for real."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rcm.artefact import UserError
from rcm.cli import stages

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STAGE = ROOT / "workflow/scripts/stage.sh"
# keys that change how a distillation runs or is watched, but no weights
FREE = {
    *("preview_every", "profile", "state_every", "wandb", "device", "replicate", "shard", "context", "recompute"),
    *("tangent_pass", "micro_batch", "offload_teacher", "compile", "workers", "timeout"),
}


def call(*command: object, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )


def written(scale: str, **environment: str) -> tuple[dict[str, dict], dict, dict]:
    """The stages, the params and the code of a scale, as they would be written."""
    script = f"import json; from rcm.cli.stages import texts; print(json.dumps(texts(['{scale}'])))"
    run = call(sys.executable, "-c", script, **environment)
    assert run.returncode == 0, run.stderr
    pipeline, params, code = json.loads(run.stdout)
    return yaml.load(pipeline, yaml.CSafeLoader)["stages"], json.loads(params), json.loads(code)


def values(stage: dict, params: dict) -> dict[str, object]:
    """The values in params.json that a stage of dvc.yaml names."""
    named = [name for group in stage.get("params", []) for name in group.get("params.json", [])]
    found = {}
    for name in named:
        node = params
        for word in name.split("."):
            node = node[word]
        found[name] = node
    return found


def outputs(stage: dict) -> list[str]:
    return [path for out in stage["outs"] for path in ([out] if isinstance(out, str) else out)]


@pytest.fixture(scope="module")
def committed() -> tuple[dict[str, dict], dict]:
    pipeline = yaml.load((ROOT / "dvc.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)["stages"]
    return pipeline, json.loads((ROOT / "params.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def large() -> tuple[dict[str, dict], dict, dict]:
    return written("wan2.1-14b")


def test_what_is_committed_is_current():
    run = call(sys.executable, "-m", "rcm", "stages", "--check")
    assert run.returncode == 0, run.stderr


def test_a_distillation_does_not_depend_on_keys_that_change_no_weights(committed):
    pipeline, params = committed
    read = {name: values(stage, params) for name, stage in pipeline.items() if name.startswith("distill-")}
    assert read["distill-images-rcm-0"]["tiny.images.objective.rcm"]["dmd_weight"] == 0.5  # config/experiment/
    for found in read.values():
        words = {*re.findall(r'"(\w+)":', json.dumps(found)), *(name.split(".")[-1] for name in found)}
        assert not words & FREE


def test_no_output_lies_in_one_of_another_stage(committed):
    pipeline, _ = committed
    every = [path for stage in pipeline.values() for path in outputs(stage)]
    assert len({*every}) == len(every)
    assert not {*every} & {str(parent) for path in every for parent in Path(path).parents}


def test_params_edited_by_hand_are_refused(tmp_path, monkeypatch, committed):
    monkeypatch.chdir(tmp_path)
    params = json.loads(json.dumps(committed[1]))
    Path("params.json").write_text(json.dumps(params), encoding="utf-8")
    stages.require_untouched()
    params["tiny"]["images"]["objective"]["rcm"]["dmd_weight"] = 0.6
    Path("params.json").write_text(json.dumps(params), encoding="utf-8")
    with pytest.raises(UserError, match="edited by hand"):
        stages.require_untouched()


def test_a_stage_takes_the_environment_and_the_profile_that_are_active(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("snakemake", "rcm"):
        (tmp_path / "bin" / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    arguments = ("tiny", "synthesize", "a b/{1..11}-of-11.tar", "c")
    run = call("bash", STAGE, *arguments, VIRTUAL_ENV=str(tmp_path), SNAKEMAKE_PROFILE="elsewhere")
    words = run.stdout.splitlines()
    assert words[words.index("--profile") + 1] == "elsewhere"
    assert words[words.index("--") + 1 :] == [*(f"a b/{k}-of-11.tar" for k in range(1, 12)), "c"]
    assert words[words.index("--allowed-rules") + 1] == "synthesize"
    plain = call("bash", STAGE, *arguments, VIRTUAL_ENV=str(tmp_path), SNAKEMAKE_PROFILE="")
    assert "workflow/profiles/local" in plain.stdout
    (tmp_path / "bin/rcm").unlink()  # an environment of something else
    other = call("bash", STAGE, *arguments, folder=tmp_path, VIRTUAL_ENV=str(tmp_path), PATH="/usr/bin:/bin")
    assert other.returncode == 2
    assert other.stderr.splitlines() == ["stage.sh: error: there is no rcm: run `make setup`"]
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("snakemake", "rcm"):
        (tmp_path / ".venv/bin" / name).write_text("#!/bin/sh\necho own\n", encoding="utf-8")
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    own = call("bash", STAGE, *arguments, folder=tmp_path, VIRTUAL_ENV=str(tmp_path), PATH="/usr/bin:/bin")
    assert own.stdout == "own\n"


def test_a_damaged_params_file_forgets_no_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stages.known_scales() == ["tiny"]
    Path("params.json").write_text('{"tiny": {}, "wan2_1-14b": {}}', encoding="utf-8")
    assert stages.known_scales() == ["tiny", "wan2.1-14b"]
    Path("params.json").write_text('<<<<<<< HEAD\n{"tiny": {}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"params\.json is not valid JSON"):
        stages.known_scales()


def test_scales_are_taken_in_one_order_and_each_once(tmp_path, monkeypatch):
    """So that what is written for scales that are named is what is found by their keys in params.json."""
    asked: list[list[str]] = []

    def texts(scales: list[str]) -> tuple[str, str, str]:
        asked.append(scales)
        return "", json.dumps({stages.key(scale): {} for scale in scales}), ""

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "texts", texts)
    (tmp_path / "data").mkdir()
    for named in (["tiny", "cosmos-predict2-2b", "tiny"], []):
        stages.stages(argparse.Namespace(scales=named, check=False, values=False))
    assert asked == [["cosmos-predict2-2b", "tiny"]] * 2


def test_outside_the_project_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no Snakefile in .*: call this in the root"):
        stages.jobs("tiny")


TEMPORARY = """
rule all:
    input: expand("made/{name}.txt", name=[*"ab"])
rule part:
    output: "parts/{name}/{scatteritem}.txt"
    params: cfg=None, code="code part", overrides="experiment=tiny-images"
    shell: "echo {wildcards.scatteritem} > {output}"
rule arrange:
    input: [f"parts/{{name}}/{k}-of-2.txt" for k in (1, 2)]
    output: temp(directory("brief/{name}"))
    params: cfg=None, code="code arrange", overrides="experiment=tiny-images"
    shell: "mkdir {output} && cp {input} {output}"
rule look:
    input: "brief/{name}"
    output: "made/{name}.txt"
    params: cfg=None, code="code look", overrides="experiment=tiny-images", environment=ENVIRONMENT
    shell: "cat {input}/* > {output}"
"""


@pytest.mark.slow
def test_a_temporary_output_is_made_within_the_stage_that_reads_it(tmp_path):
    code = {}
    for digest in ("'first'", "'second'"):
        (tmp_path / "Snakefile").write_text(TEMPORARY.replace("ENVIRONMENT", digest), encoding="utf-8")
        script = "import json; from rcm.cli.stages import texts; print(json.dumps(texts(['tiny'])))"
        run = call(sys.executable, "-c", script, folder=tmp_path)
        assert run.returncode == 0, run.stderr
        pipeline, _, code[digest] = json.loads(run.stdout)
        found = yaml.load(pipeline, yaml.CSafeLoader)["stages"]
        assert {*found} == {"configure", "part-a", "part-b", "look-a", "look-b"}
        assert found["look-a"]["deps"] == ["parts/a"]
        assert found["look-a"]["params"] == [{"data/code.json": ["tiny.look", "tiny.arrange"]}]
    first, second = (json.loads(text)["tiny"] for text in code.values())
    assert {rule for rule in first if first[rule] != second[rule]} == {"look"}  # a digest of an environment file

    (tmp_path / "workflow/profiles").mkdir(parents=True)
    shutil.copytree(ROOT / "workflow/profiles/local", tmp_path / "workflow/profiles/local")
    for name in ("part-a", "look-a"):
        words = shlex.split(found[name]["cmd"].replace("workflow/scripts/stage.sh", str(STAGE)))
        run = call(*words, folder=tmp_path, VIRTUAL_ENV=str(BIN.parent))
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "made/a.txt").read_text() == "1-of-2\n2-of-2\n"
    assert not (tmp_path / "brief/a").exists()


@pytest.mark.slow
def test_what_snakemake_refuses_is_said_in_a_sentence(tmp_path):
    (tmp_path / "Snakefile").write_text("rule all:\n    input: 'nobody/makes/this'\n", encoding="utf-8")
    run = call(sys.executable, "-m", "rcm", "stages", folder=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "Snakemake refuses the workflow at the scale tiny, " in run.stderr and "nobody/makes/this" in run.stderr


@pytest.mark.slow
def test_no_output_of_a_stage_is_deleted_after_use(large):
    """Of an official evaluator, which has its samples laid out anew."""
    rules = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "workflow/rules").glob("*.smk"))
    patterns = re.findall(r'temp\((?:directory\()?"<(\w+)>/([^"]+)"', rules)
    assert patterns
    regex = "|".join(f"{top}/[^/]+/{re.sub('{[^}]*}', '[^/]+', path)}" for top, path in patterns)
    pipeline, _, _ = large
    assert not [path for stage in pipeline.values() for path in outputs(stage) if re.fullmatch(regex, path)]
    looks = [stage for name, stage in pipeline.items() if "_official-" in name]
    assert looks and all(",arrange_official" in stage["cmd"] for stage in looks)
    assert all(any("/samples/" in dep for dep in stage["deps"]) for stage in looks)


@pytest.mark.slow
def test_the_graph_of_rules_is_that_of_snakemake(committed):
    pipeline, _ = committed
    drawn = call(BIN / "snakemake", "--rulegraph", "--quiet", "all").stdout
    names = dict(re.findall(r'(\d+)\[label ?= ?"(\w+)"', drawn))
    wanted = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", drawn) if names[b] != "all"}
    rule = {name: stage["cmd"].split()[3] for name, stage in pipeline.items() if name != "configure"}
    maker = {path: name for name in rule for path in outputs(pipeline[name])}
    found = set()
    for name in rule:
        for dep in pipeline[name].get("deps", []):
            made = maker.get(dep) or maker.get(str(Path(dep).parent))
            found |= {(rule[made], rule[name])} if made else set()
    assert found == wanted
    assert {*rule.values()} == {*names.values()} - {"all"}


@pytest.mark.slow
def test_thousands_of_shards_are_one_short_stage(large):
    pipeline, params, code = large
    made = pipeline["synthesize-clips-wan2_1-14b"]
    assert made["outs"] == ["data/wan2.1-14b/clips/shards"]
    assert made["cmd"].endswith("synthesize 'data/wan2.1-14b/clips/shards/{1..4000}-of-4000.tar'")
    assert "data/wan2.1-14b/clips/shards" in pipeline["distill-clips-rcm-0-wan2_1-14b"]["deps"]
    assert len(yaml.safe_dump(pipeline)) < 200_000
    assert all(values(stage, params) or name == "configure" or "figure" in name for name, stage in pipeline.items())
    assert code["wan2_1-14b"]["distill"].startswith("command ")  # real models are not made again for code


CHANGES = {
    "objective/rcm.yaml": (
        ("dmd_weight: ${distillation.dmd_weight}", "dmd_weight: 0.7"),
        {"distill-clips-rcm-0", "distill-images-rcm-0", "export-clips-rcm-0", "export-images-rcm-0", "report"},
    ),
    "experiment/tiny-images.yaml": (("preview_every: 200", "preview_every: 100"), {"report"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", CHANGES)
def test_a_changed_value_changes_the_stages_that_read_it(file, tmp_path, committed):
    (old, new), wanted = CHANGES[file]
    shutil.copytree(ROOT / "config", tmp_path / "config")
    changed = tmp_path / "config" / file
    text = changed.read_text(encoding="utf-8")
    assert text.count(old) == 1
    changed.write_text(text.replace(old, new), encoding="utf-8")
    pipeline, before = committed
    _, after, _ = written("tiny", RCM_CONFIG_DIR=str(tmp_path / "config"))
    assert {name for name, stage in pipeline.items() if values(stage, before) != values(stage, after)} == wanted


@pytest.mark.slow
def test_a_stage_of_dvc(tmp_path):
    """Run it, edit its configuration and run it again, edit params.json, and have it fail."""
    folder = tmp_path / "clone"
    for name in call("git", "ls-files", "-co", "--exclude-standard").stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    call("git", "init", "-q", folder=folder)
    environment = {"PYTHONPATH": f"{folder / 'src'}:{folder / 'kernels'}", "VIRTUAL_ENV": str(BIN.parent)}
    environment["PYTHONDONTWRITEBYTECODE"] = ""

    def dvc(*words: str) -> tuple[int, str]:
        run = call(BIN / "dvc", *words, folder=folder, **environment)
        return run.returncode, run.stdout + run.stderr

    status, said = dvc("repro", "prompts-images-dev")
    assert status == 0, said
    out = folder / "data/tiny/images/prompts/dev.jsonl"
    first = out.read_bytes()
    assert "up to date" in dvc("status", "prompts-images-dev", "configure")[1]
    assert [*(folder / "src/rcm").rglob("__pycache__")]  # which is no source
    idle = call(BIN / "snakemake", "-n", out.relative_to(folder), folder=folder, **environment)
    assert "Nothing to be done" in idle.stdout + idle.stderr

    experiment = folder / "config/experiment/tiny-images.yaml"
    text = experiment.read_text(encoding="utf-8")
    changed = re.sub(r"(  dev:.*\n(?:    .*\n)*?    seed: )\d+", r"\g<1>977", text)
    assert changed != text
    experiment.write_text(changed, encoding="utf-8")
    status, said = dvc("repro", "--single-item", "--force", "prompts-images-dev")  # which leaves out `configure`
    assert status != 0
    assert [
        line for line in said.splitlines() if "snakemake: error: " in line and "`dvc repro -f -s configure`" in line
    ]
    assert "Traceback" not in said
    status, said = dvc("repro", "prompts-images-dev")
    assert status == 0, said
    assert out.read_bytes() != first

    rule = folder / "workflow/rules/data.smk"
    text = rule.read_text(encoding="utf-8")
    rule.write_text(text.replace("python -m rcm prompts", "python -W ignore -m rcm prompts"), encoding="utf-8")
    status, said = dvc("repro", "--single-item", "--force", "prompts-images-dev")
    assert status != 0 and "`dvc repro -f -s configure`" in said
    rule.write_text(text, encoding="utf-8")

    params = folder / "params.json"
    params.write_text(params.read_text(encoding="utf-8").replace("977", "978"), encoding="utf-8")
    status, said = dvc("repro", "prompts-images-dev")
    assert status != 0
    assert "edited by hand" in said
    assert "configure" in said
