"""Shards: the synthetic data set as webdataset tars with manifests, and the order in which training reads it.

`X.tar` holds samples (`rcm.data.samples`). Beside it stands `X.tar.json`, the manifest: how many they are, the SHA-256
of the tar, index, seed and SHA-256 of each sample, and what they were made from. Part k of n holds the samples k-1,
k-1+n, k-1+2n, ... so that a part that is not there leaves gaps.

Letters of shapes: N samples, B batch, C channels, T frames, H height, W width, L words, D width of a word.
"""

import functools
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rcm.artefact import UserError, atomic_file, beside, read_json, sha256_file, verified_sha256, write_json
from rcm.collective import everywhere
from rcm.data.samples import Entry, entries, naming, read_sample, write_sample
from rcm.data.samples import Sample as Sample
from rcm.randomness import uniform


def part_indices(part: str, total: int) -> range:
    """Which of `total` things part "k-of-n" works on: k-1, k-1+n, ..."""
    number, count = _parse_part(part)
    return range(number - 1, total, count)


def _parse_part(part: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)-of-([1-9]\d*)", part)
    if not match or int(match[1]) > int(match[2]):
        raise UserError(f"{part!r} is not a part: expected K-of-N with 1 <= K <= N, such as 1-of-4")
    return int(match[1]), int(match[2])


# --- Writing -------------------------------------------------------------------------------------------------------


def write_shard(path: Path | str, samples: Iterable[Sample], manifest: Mapping[str, Any]) -> None:
    """Write a tar and its manifest; equal samples give equal bytes.

    Args:
        path: the tar; its manifest becomes `path`.json.
        samples: zero rows at the end of a text are padding and not stored.
        manifest: "part" ("k-of-n"), and whatever the samples follow from (hashes of prompts and teacher, settings of
            the sampler; JSON types), which must be equal in all shards of a set. What is known of the tar is added.
    """
    _parse_part(manifest["part"])
    with atomic_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        lines = [write_sample(tar, sample) for sample in samples]
    write_manifest(path, manifest, lines, sha256_file(path))


def write_manifest(
    path: Path | str, manifest: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], sha256: str
) -> None:
    """Write the manifest of a tar; `lines` are those of its samples (`rcm.data.samples.write_sample`)."""
    write_json(manifest_path(path), {"count": len(lines), "sha256": sha256, **manifest, "samples": lines})


def manifest_path(path: Path | str) -> Path:
    """Where the manifest of a tar stands."""
    return beside(path, ".json")


# --- Reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Samples side by side in float32, whatever they are stored as; texts are padded with zeros to one length."""

    indices: tuple[int, ...]
    prompts: tuple[str, ...]
    latents_BCTHW: Tensor
    text_BLD: Tensor


class LatentDataset:
    """The samples of a set, in the order of their indices 0 ... N-1, whatever the order of the shards.

    Args:
        samples: in memory, or read from the shards when asked for; `samples[i]` has index i.
        manifest: what the shards have in common.
        sha256: SHA-256 of each shard, in the order in which they were given.
    """

    def __init__(self, samples: Sequence[Sample], manifest: Mapping[str, Any], sha256: Sequence[str] = ()) -> None:
        self.samples = samples
        self.manifest = dict(manifest)
        self.sha256 = tuple(sha256)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Iterable[int], words: int) -> Batch:
        """The samples at `indices`, texts padded to `words`."""
        chosen = [self.samples[index] for index in indices]
        longest = max(chosen, key=lambda sample: len(sample.text_LD))
        if len(longest.text_LD) > words:
            raise UserError(
                f"the text of sample {longest.index} has {len(longest.text_LD)} words, but the text length of this"
                f" configuration is {words}; use the configuration that the shards were made with"
            )
        pad = torch.nn.functional.pad
        return Batch(
            indices=tuple(sample.index for sample in chosen),
            prompts=tuple(sample.prompt for sample in chosen),
            latents_BCTHW=torch.stack([sample.latents_CTHW.float() for sample in chosen]),
            text_BLD=torch.stack([pad(s.text_LD.float(), (0, 0, 0, words - len(s.text_LD))) for s in chosen]),
        )


class _Stored(Sequence[Sample]):
    """Samples that stay in their shards; each is read when asked for, from the byte where it begins.

    webdataset itself reads tars from front to back and shuffles within a buffer, which is no permutation of the set.
    """

    def __init__(self, files: Sequence[Path], contents: Sequence[Sequence[Entry]]) -> None:
        indices_N = np.array([entry.index for found in contents for entry in found], dtype=np.int64)
        starts_N = np.array([entry.start for found in contents for entry in found], dtype=np.int64)
        shards_N = np.repeat(np.arange(len(files)), [len(found) for found in contents])
        order_N = indices_N.argsort(kind="stable")
        self.files, self.starts_N, self.shards_N = files, starts_N[order_N], shards_N[order_N]
        for place in np.flatnonzero(indices_N[order_N] != np.arange(len(order_N)))[:1]:
            if (index := indices_N[order_N[place]]) > place:
                raise UserError(f"sample {place} is in none of the {len(files)} shards; make them again")
            one, other = (files[shard] for shard in self.shards_N[place - 1 : place + 1])
            raise UserError(f"sample {index} is in {one} and in {other}; make them again")
        if not len(order_N):
            raise UserError(f"the shards hold no samples: {', '.join(map(str, files))}")
        self.shapes = one_shape(entry for found in contents for entry in found)

    def __len__(self) -> int:
        return len(self.starts_N)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        index = range(len(self))[index]
        return sample_at(self.files[self.shards_N[index]], Entry(index, int(self.starts_N[index]), self.shapes))


def sample_at(path: Path, entry: Entry) -> Sample:
    """The sample of a shard that begins where `entry` says, and must be as it says."""
    with (
        naming(f"sample {entry.index} of shard {path}"),
        path.open("rb") as file,
    ):  # opened anew: threads share no place
        file.seek(entry.start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            sample = read_sample(tar)
        if (sample.index, sample.shapes) != (entry.index, entry.shapes):
            raise ValueError("changed since it was verified")
    return sample


def one_shape(entries: Iterable[Entry]) -> tuple[tuple[int, ...], int]:
    """`Sample.shapes`, which must be those of all samples."""
    shapes = {entry.shapes for entry in entries}
    if len(shapes) > 1:
        raise UserError(f"the shards hold latents of different shapes: {sorted(shapes)}; make them again")
    return shapes.pop()


def read_shards(
    paths: Iterable[Path | str],
    *,
    group: dist.ProcessGroup | None = None,
    memory: int = 2**28,
    advance: Callable[[int], None] = lambda count: None,
) -> LatentDataset:
    """Verify all shards of a set, and read them.

    A shard that is missing, damaged, given twice or of another origin than the others, and an index that is missing or
    comes twice, are UserErrors that name it, on all ranks.

    Args:
        paths: the tars, on a file system that all ranks share.
        group: the ranks that share the verification out and must all call this; None: this process is alone.
        memory: a set of no more bytes than this is kept in memory; of a larger one, samples are read when asked for.
        advance: called with the number of shards verified since the last call, on all ranks together.
    """
    files = [Path(path) for path in paths]
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    checked: list[tuple[dict[Path, dict[str, Any]], dict[str, Any]]] = []  # of thousands, no rank is sent the others'
    everywhere(lambda: checked.append(_checked_manifests(files)), group)
    manifests, common = checked[0]
    contents: list[list[Entry]] = []
    for first in range(0, len(files), world):  # a shard each, so that none waits long and an error comes early
        mine = files[first + rank : first + rank + 1]
        found = everywhere(functools.partial(_all_contents, mine, manifests), group)
        contents += [entries for part in found for entries in part]
        advance(len(files[first : first + world]))
    stored = _Stored(files, contents)
    small = sum(path.stat().st_size for path in files) <= memory
    return LatentDataset(list(stored) if small else stored, common, [manifests[path]["sha256"] for path in files])


def _checked_manifests(files: Sequence[Path]) -> tuple[dict[Path, dict[str, Any]], dict[str, Any]]:
    """The manifest of each shard, and what they have in common; nothing is read of the shards."""
    if not files:
        raise UserError("no shards given: expected one or more .tar files")
    manifests = read_manifests(files)
    first, *others = files
    for path in others:
        if differing := [key for key, value in origin(manifests[first]).items() if manifests[path].get(key) != value]:
            raise UserError(
                f"shards {first} and {path} do not belong together: {differing[0]} differs; make them again"
            )
    parts = [_parse_part(manifest["part"]) for manifest in manifests.values()]
    if sorted(parts) != [(number, parts[0][1]) for number in range(1, parts[0][1] + 1)]:
        given = ", ".join(manifest["part"] for manifest in manifests.values())
        raise UserError(f"the shards are not one whole set: parts {given}; give each part exactly once")
    return manifests, origin(manifests[first])


def read_manifests(files: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """The manifest of each shard, without the lines of its samples; UserError for one that is not there."""
    if repeated := [path for path, count in Counter(files).items() if count > 1]:
        raise UserError(f"shard {repeated[0]} is given twice; give each part exactly once")
    manifests = {}
    for path in files:
        if not path.is_file():
            raise UserError(f"shard {path} does not exist; make it with `rcm synthesize`")
        manifest = read_json(manifest_path(path))
        verified_sha256(manifest_path(path))
        if not isinstance(manifest, dict) or not {"count", "sha256", "part"} <= manifest.keys():
            raise UserError(f"{manifest_path(path)} is not the manifest of a shard; make the shard again")
        manifest.pop("samples", None)
        manifests[path] = manifest
    return manifests


def read_lines(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Index, seed and SHA-256 of the samples of shards, as their manifests have them (none, in those of old)."""
    return [line for path in files for line in read_json(manifest_path(path)).get("samples", [])]


def origin(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says that all shards of a set have in common."""
    return {key: value for key, value in manifest.items() if key not in ("count", "sha256", "part", "source")}


def _all_contents(paths: Sequence[Path], manifests: Mapping[Path, Mapping[str, Any]]) -> list[list[Entry]]:
    return [verified(path, manifests[path]) for path in paths]


def verified(path: Path, manifest: Mapping[str, Any]) -> list[Entry]:
    """What a shard holds, whose bytes must be those that its manifest tells of."""
    with naming(f"shard {path}"):
        if sha256_file(path) != manifest["sha256"]:
            raise UserError(f"shard {path} is damaged: its SHA-256 is not that of its manifest; make it again")
        verified_sha256(path, manifest["sha256"])
        with tarfile.open(path, "r:") as tar:
            found = list(entries(tar))
    if len(found) != manifest["count"]:
        raise UserError(
            f"shard {path} holds {len(found)} samples, its manifest says {manifest['count']}; make it again"
        )
    return found


# --- Order of training ---------------------------------------------------------------------------------------------


def batch_indices(n: int, batch: int, seed: int, step: int) -> list[int]:
    """Samples of the global batch at `step` (from 0): a pure function, so a resumed run goes on exactly.

    The stream of samples is one permutation of 0 ... n-1 per epoch, one after the other; batches are cut from it
    without regard to epochs, so a batch may hold the end of one and the beginning of the next.
    """
    places = range(step * batch, (step + 1) * batch)
    return [_permutation(n, seed, place // n)[place % n] for place in places]


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    draws = uniform((n,), seed=seed, purpose="order of samples", step=epoch, indices=[0])[0]
    return tuple(draws.argsort(stable=True).tolist())
