"""The command line: `python -m rcm STAGE`, one thin function a stage.

A stage reads the composed configuration, opens files, calls the library and writes its outputs atomically; formulas
live below. Mistakes of the user end in one sentence and exit status 2, Ctrl-C in one sentence and 130. A stage's
module, and torch with it, is imported only when the stage runs, so that `--help` is instant.
"""

import sys
from importlib import import_module

from rcm.artefact import UserError, reason
from rcm.cli.parser import STAGES, overview, parse
from rcm.cli.ranks import other_is_gone, rank, speaker, wait_for_the_end

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run one stage and return its exit status (0 done, 2 the user's mistake, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from rcm import __version__

        print(f"rcm {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in STAGES:
        print(f"rcm: error: there is no stage {name!r}; the stages are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    try:
        arguments = parse(name, rest)
        module, function = STAGES[name].where.split(":")
        getattr(import_module(module), function)(arguments)
    except UserError as mistake:
        print(f"{speaker(f'rcm {name}')}: error: {one_line(str(mistake))}", file=sys.stderr)
        return 2
    except RuntimeError as fault:
        if not other_is_gone(fault):
            raise
        wait_for_the_end()
        print(f"rcm {name} (rank {rank()}): error: another rank is gone ({reason(fault)})", file=sys.stderr)
        return 1
    except OSError as fault:
        if fault.strerror is None:
            raise
        place = "" if fault.filename is None else f"{one_line(str(fault.filename))}: "  # a full disk has no name
        print(f"rcm {name}: error: {place}{fault.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nrcm {name}: interrupted; no unfinished output was left, run it again to go on", file=sys.stderr)
        return 130
    return 0


def one_line(message: str, limit: int = 1000) -> str:
    """A message without line breaks, shortened in the middle where a value in it is very long."""
    message = " ".join(message.split())
    return message if len(message) <= limit else f"{message[: limit - 203]} … {message[-200:]}"
