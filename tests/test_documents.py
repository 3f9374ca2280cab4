"""What documents list is what there is: keys of the configuration, and what the workflow catalogue asks for."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "config/README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", README.partition("<!-- keys")[2], re.MULTILINE))


def paths(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a JSON schema, through references and conditions."""
    if "$ref" in node:
        yield from paths(schema, schema["$defs"][node["$ref"].rpartition("/")[2]], prefix)
    for word in {"if", "then", "else", "anyOf", "oneOf", "allOf"} & node.keys():
        for branch in node[word] if isinstance(node[word], list) else [node[word]]:
            yield from paths(schema, branch, prefix)
    for name, inner in node.get("properties", {}).items():
        yield prefix + name
        yield from paths(schema, inner, f"{prefix}{name}.")


def test_every_key_of_the_tree_is_explained() -> None:
    schema = json.loads((ROOT / "config/schema.json").read_text(encoding="utf-8"))
    found = {*paths(schema, schema)}
    assert {"objective.name", "network.adaln_width", "suites.text.prompts", "teacher.steps"} <= found
    # one row for all: each checkpoint, the shares of tasks, and sections that repeat another one
    found = {key for key in found if not re.search(r"\.(source|sha256)$|\.weights\.|^(synthesis|synthesizer)\.", key)}
    keys = {key for key in found if not any(other.startswith(f"{key}.") for other in found)}
    alike = {(key.partition(".")[0], key.rpartition(".")[2]) for key in ROWS}  # such as seeds of suites
    by_hand = {*re.findall(r"`(\w+)(?:: true)?`", README.partition("## The numbers")[2].partition("<!-- keys")[0])}
    lacking = {key for key in keys if (key.partition(".")[0], key.rpartition(".")[2]) not in alike}
    assert {key for key in lacking if key.rpartition(".")[2] not in by_hand} == set()
    assert len(lacking) <= 3
    assert all(ROWS.values())


def test_every_key_of_the_pipeline_is_explained() -> None:
    schema = json.loads((ROOT / "workflow/schemas/pipeline.schema.json").read_text(encoding="utf-8"))
    told = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", README.partition("## The numbers")[0], re.MULTILINE))
    assert told.keys() == schema["properties"].keys()
    for section in ("scatter", "hours"):
        assert all(f"`{key}`" in told[section] for key in schema["properties"][section]["properties"])
    named = re.findall(r"`(\w+)`", told["tables"] + told["figures"])
    listed = {name for key in ("tables", "figures") for name in schema["properties"][key]["items"]["enum"]}
    assert {*named} == listed


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("list_keys", ROOT / "workflow/scripts/list_keys.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_keys_are_current(script: Any) -> None:
    wanted = f"{script.START}\n\n{script.tables()}\n\n{script.END}"
    assert wanted in README, "run python workflow/scripts/list_keys.py"


def test_lines_are_read_as_yaml_has_them(script: Any) -> None:
    def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            elif name != "defaults":
                yield prefix + name, value

    for file in script.FILES:
        text = (ROOT / "config" / f"{file}.yaml").read_text(encoding="utf-8")
        read = {key: yaml.safe_load(value) for key, value, _ in script.keys(text) if value and not value.endswith(",")}
        known = dict(leaves(yaml.safe_load(text)))
        assert read == {key: known[key] for key in read}
        assert {*known} == {key for key, value, _ in script.keys(text) if value}, file


@pytest.mark.parametrize("name", ["workflow/Snakefile", "config/README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md"])
def test_the_catalogue_finds_what_it_looks_for(name: str) -> None:
    assert (ROOT / name).is_file()


def test_the_catalogue_is_told_how_to_call_the_workflow() -> None:
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text(encoding="utf-8"))["usage"]
    assert usage.keys() == {"mandatory-flags", "software-stack-deployment", "report"}
    assert usage["software-stack-deployment"].keys() == {"conda", "apptainer", "apptainer+conda"}
    profile = re.fullmatch(r"--profile (\S+)", usage["mandatory-flags"]["flags"])
    assert profile and (ROOT / profile[1] / "profile.v9+.yaml").is_file()
    assert {"snakemake", "workflow"} <= {*re.findall(r"\w+", (ROOT / "README.md").read_text(encoding="utf-8").lower())}
