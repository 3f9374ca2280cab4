"""What says what is installed agrees: pyproject.toml, constraints.txt, environment.yml, Makefile and containers."""

import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rattler import MatchSpec

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
ENVIRONMENTS = [ROOT / "environment.yml", *sorted((ROOT / "workflow/envs").glob("*.yaml"))]
FILES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "Dockerfile", "apptainer.def")}
# what only other builds of torch bring
ELSEWHERE = re.compile(r"nvidia-|cuda-|triton$")


def pins() -> dict[str, str]:
    """Names, canonical, and versions in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    names = [canonicalize_name(pin.name) for pin in found]
    assert len(names) == len(set(names))
    return {name: str(pin.specifier).removeprefix("==") for name, pin in zip(names, found, strict=True)}


def entries(path: Path) -> tuple[list[str], list[str]]:
    """The conda packages and the lines of the pip section of an environment."""
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))["dependencies"]
    return [e for e in listed if isinstance(e, str)], [line for e in listed if isinstance(e, dict) for line in e["pip"]]


def test_constraints_are_names_versions_and_markers_alone() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[a-z0-9.]+(; [a-z_]+ [=!<>]+ '[^']+')?( +#.*)?", line), line


@pytest.mark.parametrize("extra", ["", *sorted(EXTRAS.keys() - {"gpu"})])
def test_every_requirement_has_a_pin_that_satisfies_it(extra: str) -> None:
    pinned = pins()
    for line in EXTRAS[extra] if extra else PROJECT["project"]["dependencies"]:
        wanted = Requirement(line)
        if wanted.name == PROJECT["project"]["name"]:
            assert wanted.extras <= EXTRAS.keys()
        else:
            assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)], prereleases=True), line


def test_an_installation_is_pinned_whole_and_sound() -> None:
    """From the metadata of what is installed, as `pip check` reads it, for this project with all that tests need."""
    pinned = pins()
    todo, seen = [(PROJECT["project"]["name"], frozenset({"dev"}))], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in metadata.requires(name) or ():
            wanted = Requirement(line)
            if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                continue
            other = canonicalize_name(wanted.name)
            if other == PROJECT["project"]["name"] or not ELSEWHERE.match(other):
                has = Version(metadata.version(other))
                assert wanted.specifier.contains(has, prereleases=True), f"{name} wants {line}, there is {has}"
                assert other in pinned or other == PROJECT["project"]["name"], f"{other}, of {name}, has no pin"
                todo.append((other, frozenset(wanted.extras)))
    reached = {name for name, _ in seen} & pinned.keys()
    others = {n: metadata.version(n) for n in reached if Version(metadata.version(n)).public != pinned[n]}
    said = f"this environment has other versions than constraints.txt: {others}"
    assert not (others and os.environ.get("CI")), said
    if others:
        pytest.skip(said)


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.name)
def test_conda_reads_every_entry(path: Path) -> None:
    packages, lines = entries(path)
    assert "pip" in {str(MatchSpec(entry, strict=True).name.normalized) for entry in packages}  # before its section
    for line in lines:
        assert line.startswith("-") or Requirement(line)


def test_the_environment_installs_what_make_installs() -> None:
    packages, lines = entries(ROOT / "environment.yml")
    assert {str(MatchSpec(entry).name.normalized) for entry in packages} == {"python", "pip", "ffmpeg", "git"}
    assert lines[0] == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", lines[1])
    assert extras and len(lines) == 2 and {*extras[1].split(",")} <= EXTRAS.keys()
    commands = re.findall(r"pip install .*-c constraints.txt -e ['\"]\.\[([^]]+)\]", FILES["Makefile"])
    assert commands == [extras[1], "dev"]
    for name in ("Dockerfile", "apptainer.def"):
        first, second = re.findall(r"pip install .*-c constraints.txt -e \"\.\[([^]]+)\]", FILES[name])
        assert first == extras[1] and second.lower().strip("${ }") == "extras"
        assert re.search(rf"^(?:ARG | +)(?i:extras)={extras[1]}$", FILES[name], re.MULTILINE)


def test_both_containers_have_the_same_lines() -> None:
    def commands(text: str) -> list[str]:
        plain = re.sub(r"\$?\{+ ?(\w+) ?\}+", lambda match: match[1].lower(), text)
        return re.findall(r"(?:apt-get|pip|git config|rm) [^\\\n]*[^\\\s]", re.sub(r"(?m)^#.*", "", plain))

    assert len(commands(FILES["Dockerfile"])) == 6
    assert commands(FILES["Dockerfile"]) == commands(FILES["apptainer.def"])
    given, same = (
        {name.lower(): value for name, value in re.findall(r"^(?:ARG | +)(\w+)=(\S+)$", FILES[file], re.MULTILINE)}
        for file in ("Dockerfile", "apptainer.def")
    )
    assert given == same and given.keys() == {"base", "extras", "index"}


def test_one_python() -> None:
    """The oldest that is supported is what checkers and environments take."""
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    packages, _ = entries(ROOT / "environment.yml")
    assert f"python={oldest}" in packages
    assert f'\ncontainer: "docker://python:{oldest}"\n' in (ROOT / "workflow/Snakefile").read_text(encoding="utf-8")
    assert f"ARG BASE=python:{oldest}-slim\n" in FILES["Dockerfile"]
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in FILES["Makefile"]
    kernels = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())["project"]
    assert kernels["requires-python"] == f">={oldest}"


def test_the_gpu_extra_is_optional_and_whole() -> None:
    names = {Requirement(line).name for line in EXTRAS["gpu"]}
    assert names == {"flash-attn", "transformer-engine", "triton"}
    assert not any("gpu" in Requirement(line).extras for lines in EXTRAS.values() for line in lines)


def test_the_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])
