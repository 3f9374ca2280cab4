"""kill -9 at any moment: no artefact is lost, none looks finished and is not, and a rerun ends as if undisturbed."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .miniature import LIGHT, ROOT, STAGES, Server, Victim, hidden, made, run_ranks

KILLS = 20  # at random moments, besides those at changes of names
IN_A_ROW = 4  # until a rerun is left alone
CHANGES = 6  # of names, between any two of which is a moment at which other things are there


def test_no_stage_of_the_rules_is_forgotten() -> None:
    text = "".join(path.read_text() for path in ROOT.glob("workflow/rules/*.smk"))
    called = set(re.findall(r"(?:python -m rcm|\{params\.launcher\}) (\w+)", text))
    assert {str(stage.words[0]) for stage in STAGES.values()} == called
    sampled = set(re.findall(r"^rule (sample_\w+)", text, re.MULTILINE))
    assert {name for name, stage in STAGES.items() if stage.words[0] == "sample"} == sampled


def kill_at_moments(server: Server, name: str, folder: Path, kills: int) -> int:
    """Kill a stage at random moments of its time, left alone now and then; how often that was done."""
    drawn, seconds = random.Random(f"{name} {folder.name}"), server.undisturbed(name)[1]["seconds"]
    done, attempts, victim = 0, 0, None
    while done < kills:
        attempts += 1
        assert attempts < 5 * kills, f"{name} ends before it is killed"
        victim = victim or Victim(server, name, folder / str(attempts), older=attempts % 2 == 0)
        ended = victim.killed(after=drawn.random() * seconds)
        if ended is None:
            done += 1
            if done % IN_A_ROW:
                continue
            victim.finish()
        else:  # machines are slow and fast by turns
            seconds = (seconds + ended) / 2
        victim = None
    if victim:
        victim.finish()
    return done


def kill_at_changes(server: Server, name: str, folder: Path) -> int:
    """Kill a stage before some of its changes of names, over older artefacts; how often that was done."""
    whole = Victim(server, name, folder / "whole", older=True)
    changes = server.run(name, whole.folder)["changes"]
    chosen = random.Random(name).sample(range(1, changes + 1), min(CHANGES, changes))
    for change in chosen:
        victim = Victim(server, name, folder / str(change), older=True)
        victim.killed(before=change)
        victim.finish()
    return len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_kill_9(server: Server, name: str, tmp_path: Path) -> None:
    server.undisturbed(name)
    folders = [tmp_path / part for part in ("one", "two", "changes")]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        counts = [pool.submit(kill_at_moments, server, name, folder, KILLS // 2) for folder in folders[:2]]
        counts.append(pool.submit(kill_at_changes, server, name, folders[2]))
        print(name, [count.result() for count in counts])


def test_kill_9_of_one_stage(tmp_path: Path) -> None:
    server = Server(tmp_path, LIGHT)
    try:
        server.undisturbed("prompts")
        (tmp_path / "x").mkdir()
        kill_at_moments(server, "prompts", tmp_path / "x", 4)
        kill_at_changes(server, "prompts", tmp_path / "x")
    finally:
        server.close()


@pytest.mark.slow
def test_kill_9_of_ranks(server: Server, tmp_path: Path) -> None:
    """Of one of two, which ends the other, and of both."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    undisturbed = run_ranks(server, whole)
    assert [told["status"] for told in undisturbed] == [0, 0], undisturbed
    first, second = (told["changes"] // 2 for told in undisturbed)
    for killed in ({"rank1": second}, {"rank0": first // 2}, {"rank0": first, "rank1": second}):
        ended = run_ranks(server, folder, **killed)
        assert all(told["status"] != 0 for told in ended), ended
        for rank, told in enumerate(ended):
            if f"rank{rank}" not in killed:
                assert "another rank is gone" in told["said"], told["said"]
        assert made(folder).items() <= made(whole).items()
    assert [told["status"] for told in run_ranks(server, folder)] == [0, 0]
    assert made(folder) == made(whole)
    assert hidden(folder) == []
