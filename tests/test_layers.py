"""The shape of the code: imports point down the floors of the architecture, and what documents name exists."""

import ast
import re
from pathlib import Path

import pytest

from rcm.cli.parser import STAGES

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "src" / "rcm"

FLOORS = [
    ("usage",),
    ("artefact",),
    ("tree",),
    ("randomness", "dual", "flow", "collective"),
    ("networks", "codecs", "text", "vision"),
    ("data", "sampling", "conditioning", "checkpoints", "parallel"),
    ("objectives",),
    ("training", "evaluation"),
    ("report",),  # on the floor of evaluation, but it reads what evaluation writes
    ("cli", "launch"),
]
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}


def imported(path: Path, package: str) -> set[str]:
    """Full names of all modules that a file imports, relative imports resolved; `package` is the one it lies in."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return names


def library_files() -> list[Path]:
    return sorted(path for path in LIBRARY.rglob("*.py") if path.parent != LIBRARY or path.stem in FLOOR)


def test_every_module_has_a_floor() -> None:
    found = {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in LIBRARY.rglob("*.py")}
    assert found - {"__init__", "__main__"} <= set(FLOOR)


@pytest.mark.parametrize("path", library_files(), ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(LIBRARY)
    own = relative.parts[0].removesuffix(".py")
    package = ".".join(["rcm", *relative.parent.parts])
    for name in imported(path, package):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if top == "rcm" and other in FLOOR and other != own:
            assert FLOOR[other] < FLOOR[own], f"{own} (floor {FLOOR[own]}) imports {name} (floor {FLOOR[other]})"


def test_kernels_know_nothing_of_the_library() -> None:
    files = sorted((ROOT / "kernels" / "flash_jvp").rglob("*.py"))
    assert files
    for path in files:
        assert not {name for name in imported(path, "flash_jvp") if name.split(".")[0] == "rcm"}, path.name


def documents() -> str:
    """The README, the notes and the table of targets in the Makefile, as one text."""
    files = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
    return "\n".join(path.read_text(encoding="utf-8") for path in [*files, ROOT / ".ci" / "run"])


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)(?:[A-Z]+=\S+ )*make ([a-z][a-z-]*)", documents(), re.MULTILINE))
    assert named, "nothing calls make"
    assert named <= targets


def test_stages_in_documents_exist() -> None:
    named = set(re.findall(r"(?:python -m rcm|`rcm) ([a-z][a-z-]*)", documents()))
    assert named <= set(STAGES)


def test_workflow_calls_stages_that_exist_with_their_options() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "workflow/rules").glob("*.smk")))
    calls = []
    for rule in re.split(r"\n *(?:rule [a-z_0-9]+|rule):\n", text):
        lines = re.match(r"(?:\n +\".*\")+", rule.partition("shell:")[2])
        shell = "".join(re.findall(r'"(.*)"', lines[0])) if lines else ""
        if call := re.match(r"(?:python -m rcm|\{params\.launcher\}) ([a-z]+) (.*)", shell):
            named = re.findall(
                r"^ +(?!then|otherwise)([a-z]+)=", rule.partition("input:")[2].partition("output:")[0], re.MULTILINE
            )
            calls.append((call[1], call[2].replace("{params.given}", " ".join(f"--{name}" for name in named))))
    assert len(calls) == len(re.findall(r"python -m rcm |launcher\} distill", text))
    by_hand = {"generate", "doctor", "plan", "adopt", "verify", "merge", "contact-sheet"}
    by_hand |= {"stages", "record", "sync", "why"}
    assert {stage for stage, _ in calls} == set(STAGES) - by_hand
    for stage, words in calls:
        given = set(re.findall(r"(?<!\S)--[a-z-]+", words))
        known = {option.name for option in STAGES[stage].options}
        needed = {option.name for option in STAGES[stage].options if option.required}
        assert given <= known, stage
        assert needed - set(STAGES[stage].exclusive) <= given, stage
        assert bool(STAGES[stage].overrides) == ("{params.overrides}" in words), stage
