"""Ranks draw a shard together that is the one of a single process, also where one of them goes on with it."""

import json
from pathlib import Path

import pytest
import torch

import rcm.networks
import rcm.parallel
from rcm.checkpoints import save_pth
from rcm.cli import main
from rcm.cli.config import compose

SMALL = ["network.width=16", "network.mlp_width=16", "network.layers=1", "network.heads=2"]
WORDS = ["synthesize", *SMALL, "teacher.steps=2", "inference.batch=2", "--shard", "1-of-1"]


def synthesize(folder, out, fail_at=None):
    """Synthesise on this rank; the status, and how many samples it drew before one of `fail_at` ended it."""
    from rcm.cli.models import Teacher

    drawn, plain, close, threads = [], Teacher.sample, rcm.parallel.Mesh.close, torch.get_num_threads()

    def sample(self, text, jobs, **options):
        if any(prompt == fail_at for prompt, _ in jobs):
            raise RuntimeError("the GPU is gone")
        drawn.extend(prompt for prompt, _ in jobs)
        return plain(self, text, jobs, **options)

    Teacher.sample, rcm.parallel.Mesh.close = sample, lambda self: None  # the ranks live on
    torch.set_num_threads(1)  # as all ranks, since sums over two are others
    try:
        files = [
            "--teacher",
            f"{folder}/teacher.pth",
            "--prompts",
            f"{folder}/prompts.jsonl",
            "--out",
            f"{folder}/{out}",
        ]
        return main([*WORDS, *files]), drawn
    except RuntimeError as error:
        return str(error), drawn
    finally:
        Teacher.sample, rcm.parallel.Mesh.close = plain, close
        torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = rcm.networks.build(compose(SMALL)["network"])
    torch.nn.init.normal_(network.head.head.weight, std=0.1)  # it starts at zero
    save_pth(tmp_path / "teacher.pth", network.state_dict())
    lines = [json.dumps({"prompt": f"a red star {'and a star ' * k}"}) + "\n" for k in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    return tmp_path


def test_a_shard_does_not_depend_on_who_draws_it(ranks, folder: Path) -> None:
    assert synthesize(folder, "alone.tar") == (0, list(range(9)))
    assert ranks(2, synthesize, folder, "two.tar") == [(0, [0, 1, 4, 5, 8]), (0, [2, 3, 6, 7])]
    for suffix in ("", ".json"):
        assert (folder / f"two.tar{suffix}").read_bytes() == (folder / f"alone.tar{suffix}").read_bytes()
    (one, other) = ranks(2, synthesize, folder, "broken.tar", 6)  # on the second rank, in the second round
    assert one == (other[0], [0, 1, 4, 5]) and "rank 1: RuntimeError: the GPU is gone" in one[0]
    assert not (folder / "broken.tar").exists()
    assert synthesize(folder, "broken.tar") == (0, [4, 5, 6, 7, 8])
    assert (folder / "broken.tar").read_bytes() == (folder / "alone.tar").read_bytes()
