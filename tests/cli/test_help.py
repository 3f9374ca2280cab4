"""Help: every stage explains itself, and nothing heavy is loaded for it."""

import shlex
import subprocess
import sys

import pytest

from rcm.cli import main
from rcm.cli.parser import STAGES, build, overview, parse

ASKED_FOR = (
    "prompts download pretrain convert embed synthesize adopt verify merge contact-sheet plan distill export sample "
    "measure arrange evaluate throughput precision table figure report generate stages why record sync doctor"
)


def test_the_stages_are_those_of_the_design() -> None:
    assert list(STAGES) == ASKED_FOR.split()
    assert all(f"  {name}" in overview() and STAGES[name].summary in overview() for name in STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_help_has_summary_options_and_example(name: str) -> None:
    text = build(name).format_help()
    stage = STAGES[name]
    assert stage.summary.endswith(".") and stage.summary in " ".join(text.split())
    assert stage.example in text
    assert all(option.name in text and option.help for option in stage.options)


@pytest.mark.parametrize("name", STAGES)
def test_the_example_parses(name: str) -> None:
    program, stage, *arguments = shlex.split(STAGES[name].example)
    assert (program, stage) == ("rcm", name)
    parse(name, arguments)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, rcm.cli\n"
        "for name in rcm.cli.STAGES:\n"
        "    with contextlib.suppress(SystemExit): rcm.cli.main([name, '--help'])\n"
        "heavy = {'torch', 'numpy', 'hydra', 'pandas', 'matplotlib', 'cv2', 'PIL'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path()})
    assert done.returncode == 0, done.stderr


def path() -> str:
    return ":".join(sys.path)


def test_the_program_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rcm", "nonsense"], capture_output=True, text=True, env={"PYTHONPATH": path()}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("rcm: error: there is no stage 'nonsense'; the stages are prompts, download")


def test_without_arguments_it_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out == overview() + "\n"
