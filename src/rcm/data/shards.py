"""Shards: the synthetic data set as webdataset tars with manifests, and the order in which training reads it.

A sample is three members of a tar: `KEY.json` (prompt, index, seed), `KEY.latents.npy` (C, T, H, W) and `KEY.text.npy`
(words, D), both float32. Beside `X.tar` stands `X.tar.json`, the manifest: what it holds, its SHA-256, and what it was
made from. Part k of n holds the samples k-1, k-1+n, k-1+2n, ... so that a part that is not there leaves gaps.

Letters of shapes: N samples, B batch, C channels, T frames, H height, W width, L words, D width of a word.
"""

import functools
import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rcm.artefact import UserError, atomic_file, beside, read_json, reason, sha256_file, write_json
from rcm.randomness import uniform


@dataclass(frozen=True)
class Sample:
    """One latent of the teacher; `index` is global over all shards, `seed` that of its noise."""

    index: int
    prompt: str
    seed: int
    latents_CTHW: Tensor
    text_LD: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples side by side; texts are padded with zeros to one length."""

    indices: tuple[int, ...]
    prompts: tuple[str, ...]
    latents_BCTHW: Tensor
    text_BLD: Tensor


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
            the sampler; JSON types), which must be equal in all shards of a set. Count and SHA-256 are added.
    """
    _parse_part(manifest["part"])
    count = 0
    with atomic_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            key = f"{sample.index:08d}"
            facts = {"prompt": sample.prompt, "index": sample.index, "seed": sample.seed}
            _add(tar, f"{key}.json", json.dumps(facts, sort_keys=True).encode())
            _add(tar, f"{key}.latents.npy", _npy(sample.latents_CTHW))
            _add(tar, f"{key}.text.npy", _npy(_unpadded(sample.text_LD)))
            count += 1
    write_json(_manifest_path(path), {"count": count, "sha256": sha256_file(path)} | dict(manifest))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner 0, time 0
    member.size = len(content)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(content))


def _npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(tensor.detach().cpu().float().numpy()), allow_pickle=False)
    return buffer.getvalue()


def _unpadded(text_LD: Tensor) -> Tensor:
    used = text_LD.ne(0).any(dim=1).nonzero()
    return text_LD[: int(used[-1]) + 1] if len(used) else text_LD[:0]


def _manifest_path(path: Path | str) -> Path:
    return beside(path, ".json")


# --- Reading -------------------------------------------------------------------------------------------------------


class LatentDataset:
    """All samples of a set in memory, in the order of their indices 0 ... N-1, whatever the order of the shards."""

    def __init__(self, samples: Sequence[Sample], manifest: Mapping[str, Any]) -> None:
        self.samples = sorted(samples, key=lambda sample: sample.index)
        self.manifest = dict(manifest)  # what the shards have in common

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
            latents_BCTHW=torch.stack([sample.latents_CTHW for sample in chosen]),
            text_BLD=torch.stack([pad(sample.text_LD, (0, 0, 0, words - len(sample.text_LD))) for sample in chosen]),
        )


def read_shards(paths: Iterable[Path | str]) -> LatentDataset:
    """Read and verify all shards of a set.

    A shard that is missing, damaged, given twice or of another origin than the others, and an index that is missing or
    comes twice, are UserErrors that name it.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise UserError("no shards given: expected one or more .tar files")
    if repeated := [path for path in files if files.count(path) > 1]:
        raise UserError(f"shard {repeated[0]} is given twice; give each part exactly once")
    manifests = {path: _verified_manifest(path) for path in files}
    common = _common_manifest(manifests)
    samples: dict[int, tuple[Sample, Path]] = {}
    for path in manifests:
        for sample in _read_shard(path, manifests[path]["count"]):
            if sample.index in samples:
                raise UserError(
                    f"sample {sample.index} is in {samples[sample.index][1]} and in {path}; make them again"
                )
            samples[sample.index] = sample, path
    if missing := sorted(set(range(len(samples))) - samples.keys()):
        raise UserError(f"sample {missing[0]} is in none of the {len(files)} shards; make them again")
    if not samples:
        raise UserError(f"the shards hold no samples: {', '.join(map(str, paths))}")
    shapes = {(tuple(sample.latents_CTHW.shape), sample.text_LD.shape[-1]) for sample, _ in samples.values()}
    if len(shapes) > 1:
        raise UserError(f"the shards hold latents of different shapes: {sorted(shapes)}; make them again")
    return LatentDataset([sample for sample, _ in samples.values()], common)


def _verified_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"shard {path} does not exist; make it with `rcm synthesize`")
    manifest = read_json(_manifest_path(path))
    if not isinstance(manifest, dict) or not {"count", "sha256", "part"} <= manifest.keys():
        raise UserError(f"{_manifest_path(path)} is not the manifest of a shard; make the shard again")
    if sha256_file(path) != manifest["sha256"]:
        raise UserError(f"shard {path} is damaged: its SHA-256 is not that of its manifest; make it again")
    return manifest


def _common_manifest(manifests: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    """What all manifests say alike; checks that the parts 1 ... n are all there and of one origin."""
    origins = {
        path: {key: value for key, value in manifest.items() if key not in ("count", "sha256", "part")}
        for path, manifest in manifests.items()
    }
    first, *others = origins
    for path in others:
        if differing := [key for key, value in origins[first].items() if origins[path].get(key) != value]:
            raise UserError(
                f"shards {first} and {path} do not belong together: {differing[0]} differs; make them again"
            )
    parts = [_parse_part(manifest["part"]) for manifest in manifests.values()]
    if sorted(parts) != [(number, parts[0][1]) for number in range(1, parts[0][1] + 1)]:
        given = ", ".join(manifest["part"] for manifest in manifests.values())
        raise UserError(f"the shards are not one whole set: parts {given}; give each part exactly once")
    return origins[first]


def _read_shard(path: Path, count: int) -> list[Sample]:
    try:
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                members.setdefault(key, {})[suffix] = file.read() if file else b""
        samples = [_parse(member) for member in members.values()]
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"shard {path} cannot be read ({reason(error)}); make it again") from error
    if len(samples) != count:
        raise UserError(f"shard {path} holds {len(samples)} samples, its manifest says {count}; make it again")
    return samples


def _parse(member: Mapping[str, bytes]) -> Sample:
    facts = json.loads(member["json"])
    latents = np.load(io.BytesIO(member["latents.npy"]), allow_pickle=False)
    text = np.load(io.BytesIO(member["text.npy"]), allow_pickle=False)
    if latents.dtype != np.float32 or text.dtype != np.float32 or latents.ndim != 4 or text.ndim != 2:
        raise ValueError(f"{latents.dtype} {latents.shape} and {text.dtype} {text.shape} are not latents and text")
    return Sample(facts["index"], facts["prompt"], facts["seed"], torch.from_numpy(latents), torch.from_numpy(text))


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
