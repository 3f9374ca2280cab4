"""Ranks for tests: gloo processes that stay alive for the whole session, so that a call costs its own work alone."""

import datetime
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the ranks import the functions of tests from

TIMEOUT = 120  # seconds that a call may take


def _serve(rank, world, store, connection):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )  # fmt: skip
    while (call := connection.recv()) is not None:
        function, arguments = call
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class _Pool:
    def __init__(self, world, folder):
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(world)]
        self.connections = [mine for mine, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, str(folder / "store"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments):
        for connection in self.connections:
            connection.send((function, arguments))
        answers = []
        for connection in self.connections:
            if not connection.poll(TIMEOUT):
                self.stop()
                raise TimeoutError(f"{function.__name__} did not end within {TIMEOUT} s on all ranks")
            answers.append(connection.recv())
        if failed := [text for done, text in answers if not done]:
            raise AssertionError("a rank failed:\n" + "\n".join(failed))
        return [result for _, result in answers]

    def stop(self):
        for process in self.processes:
            process.kill()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """`ranks(world, function, *arguments)`: the results of `function(*arguments)` on every rank, in their order.

    The function must be importable from its module; results are pickled. An exception on a rank is an AssertionError
    with its traceback, and the ranks start anew for the next call.
    """
    pools = {}

    def call(world, function, *arguments):
        if world not in pools:
            pools[world] = _Pool(world, tmp_path_factory.mktemp("ranks"))
        try:
            return pools[world].run(function, *arguments)
        except BaseException:
            pools.pop(world).stop()  # collectives may be out of step
            raise

    yield call
    for pool in pools.values():
        pool.stop()
