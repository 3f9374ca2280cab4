"""A process that has imported what stages need once and forks one for each order: real processes at a tenth the price.

python -m tests.faults.server ADDRESS MODULE ...   One client a connection, one order at a time.
"""

import contextlib
import copy
import functools
import importlib
import itertools
import os
import select
import signal
import sys
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path

CHANGES = "open", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"  # of names, as audit events


def serve(address, modules):
    for module in modules:
        importlib.import_module(module)
    from rcm.artefact import code_digest
    from rcm.cli import config
    from rcm.cli.sources import code_digest as digest_of_stage

    composed = functools.cache(lambda overrides, plain=config._composed: plain(list(overrides)))
    config._composed = lambda overrides: copy.deepcopy(composed(tuple(overrides)))
    code_digest()
    for stage in ("synthesize", "distill", "export") if "torch" in sys.modules else ():
        digest_of_stage(stage)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with Listener(address) as listener:
        while True:
            with listener.accept() as client:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    answer(client)
                    os._exit(0)


def answer(client: Connection):
    from rcm.artefact import UserError
    from rcm.cli.config import compose

    with contextlib.suppress(EOFError):
        while True:
            order = client.recv()
            with contextlib.suppress(UserError):  # which the stage will say
                compose(itertools.takewhile(lambda word: not word.startswith("--"), order["words"][1:]))
            client.send(ordered(**order))


def ordered(words, folder, after=None, before=None, number=signal.SIGKILL, environment=(), patience=120.0):
    """Run a stage in `folder`, to be sent a signal `after` seconds or at (`before`) its n-th change of a name there.

    Returns its exit status (negative: the signal), its seconds, those from the signal on, and the number of changes.
    """
    seen, told = os.pipe()
    started = time.monotonic()
    if (child := os.fork()) == 0:
        os.environ.update(environment)
        stage(words, Path(folder), before, number, told)
    os.close(told)
    ended, signalled = os.pidfd_open(child), None
    if not select.select([ended], [], [], patience if after is None else after)[0]:
        signalled = time.monotonic()
        os.kill(child, number if after is not None else signal.SIGKILL)
        if not select.select([ended], [], [], patience)[0]:
            os.kill(child, signal.SIGKILL)
    now = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = os.read(seen, 2**16).decode().split("|")
    signalled = float("".join(said)) if any(said) else signalled
    os.close(ended)
    os.close(seen)
    return {
        "status": status,
        "seconds": now - started,
        "since": None if signalled is None else now - signalled,
        "changes": len(said) - 1,
    }


def stage(words, folder, before, number, told):
    """Be the stage; never returns."""
    status = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    try:
        os.chdir(folder)
        rank = os.environ.get("RANK", "")
        log = os.open(folder / ".." / f"{folder.name}{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        count, home = 0, f"{folder.resolve()}/"

        def look(event, arguments):
            nonlocal count
            if event not in CHANGES or (event == "open" and not arguments[2] & os.O_CREAT):
                return
            # of shutil.rmtree the second is the folder's descriptor, or None; of others a descriptor or -1
            of_folder = {"open": None, "os.rename": arguments[-1], "os.link": arguments[-1]}.get(event, arguments[1])
            place = Path(f"/proc/self/fd/{of_folder}").readlink() if of_folder and of_folder > 0 else Path.cwd()
            if str(place / os.fsdecode(arguments[0])).startswith(home):
                count += 1
                os.write(told, b"|")
                if count == before:
                    os.write(told, str(time.monotonic()).encode())
                    if event == "open" and number == signal.SIGKILL:  # die behind it, with the file empty
                        os.open(arguments[0], arguments[2], 0o644)
                    os.kill(os.getpid(), number)

        sys.addaudithook(look)
        from rcm.cli import main

        status = main(words)
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
