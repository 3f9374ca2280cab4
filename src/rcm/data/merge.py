"""Several shards, of one set or of many, written anew as one set."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from rcm.artefact import UserError, atomic_folder
from rcm.data.samples import Entry, Sample
from rcm.data.shards import one_shape, origin, part_indices, read_manifests, sample_at, verified, write_shard


def merge_shards(
    paths: Iterable[Path | str],
    folder: Path,
    parts: int,
    *,
    mixed: bool = False,
    renumber: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the samples of some shards as 1-of-N.tar ... N-of-N.tar with manifests; returns how many there are.

    Samples keep their order: by origin as first given, within one by index. They keep their indices too, where these
    are 0 ... N-1 of one origin. One sample is in memory at a time.

    Args:
        paths: shards, each verified first; a set need not be whole.
        folder: must not hold anything.
        mixed: take shards of different origins; the manifests then list them under "mixed", each with the first of its
            indices and its count.
        renumber: number the samples anew where indices are missing, which the manifests note.
        advance: called with the number of samples verified, and again with those written, since the last call.

    Raises UserError for whatever would lose, mix or repeat samples unasked.
    """
    files = [Path(path) for path in paths]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; choose a folder that is empty or not there")
    manifests = read_manifests(files)
    origins = _origins(files, [origin(manifest) for manifest in manifests.values()], mixed)
    found = []
    for file, manifest in manifests.items():
        number = origins.index(origin(manifest))
        entries = verified(file, manifest)
        found += [(number, entry.index, file, entry) for entry in entries]
        advance(len(entries))
    found.sort(key=lambda place: place[:2])
    _check_indices(found, len(origins) > 1 or renumber)
    manifest = _manifest(origins, found)
    with atomic_folder(folder) as staging:
        for number in range(1, parts + 1):
            part = f"{number}-of-{parts}"
            write_shard(staging / f"{part}.tar", _samples(found, part, advance), {"part": part, **manifest})
    return len(found)


Place = tuple[int, int, Path, Entry]  # number of the origin, index there, shard, where it stands


def _origins(files: Sequence[Path], all_origins: Sequence[dict[str, Any]], mixed: bool) -> list[dict[str, Any]]:
    """The different ones of the shards' origins, in their order."""
    origins: list[dict[str, Any]] = []
    for file, one in zip(files, all_origins, strict=True):
        if one in origins:
            continue
        if origins and not mixed:
            differing = [key for key in {**origins[0], **one} if origins[0].get(key) != one.get(key)]
            raise UserError(
                f"shards {files[0]} and {file} are of different origin: {differing[0]} differs; give --mixed"
            )
        origins.append(one)
    return origins


def _check_indices(found: Sequence[Place], renumber: bool) -> None:
    if not found:
        raise UserError("there are no samples in the shards")
    one_shape(entry for *_, entry in found)
    for one, other in pairwise(found):
        if one[:2] == other[:2]:
            raise UserError(f"sample {one[1]} is in {one[2]} and in {other[2]}, of one origin; leave one of them out")
    for place, (_, index, *_) in enumerate(found):
        if index != place and not renumber:
            raise UserError(f"sample {place} is in none of the shards; give them all, or --renumber to close the gaps")


def _samples(found: Sequence[Place], part: str, advance: Callable[[int], None]) -> Iterator[Sample]:
    for index in part_indices(part, len(found)):
        *_, file, entry = found[index]
        yield replace(sample_at(file, entry), index=index)
        advance(1)


def _manifest(origins: Sequence[dict[str, Any]], found: Sequence[Place]) -> dict[str, Any]:
    """What the manifests of the new set have in common."""
    if len(origins) == 1:
        kept = all(index == place for place, (_, index, *_) in enumerate(found))
        return origins[0] | ({} if kept else {"renumbered": True})
    counts = Counter(number for number, *_ in found)
    firsts = accumulate((counts[number] for number in range(len(origins))), initial=0)
    return {"mixed": [{"first": next(firsts), "count": counts[k], **one} for k, one in enumerate(origins)]}
