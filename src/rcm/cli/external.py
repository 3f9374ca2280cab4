"""A command of another environment, recorded as a stage is: `python -m rcm.cli.external --stage NAME ... -- COMMAND`.

For official evaluators, whose Python has no `rcm`.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from rcm.artefact import UserError, recording
from rcm.training.signals import SIGNALS


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 for a mistake; SystemExit with the status of a command that fails, above 128: by a signal."""
    argv = sys.argv[1:] if argv is None else argv
    own, command = (argv[: (end := argv.index("--"))], argv[end + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(prog="python -m rcm.cli.external", description=__doc__)
    parser.add_argument("--stage", required=True, help="its name in the records")
    parser.add_argument("--inputs", type=Path, nargs="+", default=[], help="files and folders that it reads")
    parser.add_argument("--out", type=Path, required=True, help="file or folder that it writes")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="what else it depends on, as JSON")
    arguments = parser.parse_args(own)
    if not command:
        parser.error("expected -- and a command")
    try:
        config = dict(map(_setting, arguments.config))
        with recording(arguments.out, stage=arguments.stage, inputs=arguments.inputs, config=config):
            if status := _status(command):
                raise SystemExit(status)  # nothing is recorded
            if not arguments.out.exists():
                raise UserError(f"{command[0]} has not written {arguments.out}, although it ended well; see its output")
    except (UserError, OSError) as mistake:
        print(f"rcm.cli.external ({arguments.stage}): error: {mistake}", file=sys.stderr)
        return 2
    return 0


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _status(command: list[str]) -> int:
    """Run a command to its end, and pass the signals on that come."""
    with subprocess.Popen(command) as process:
        pass_on = lambda number, _: process.send_signal(number)  # noqa: E731
        before = {number: signal.signal(number, pass_on) for number in SIGNALS}
        status = process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
