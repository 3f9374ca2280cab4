"""Stages that read shards and write others: adopt, verify, merge, contact-sheet."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rcm.artefact import UserError, recording
from rcm.cli.progress import Progress
from rcm.data.samples import fault, sample_sha256
from rcm.data.shards import LatentDataset, manifest_path, part_indices, read_lines, read_manifests, read_shards


def adopt(arguments: Namespace) -> None:
    """Make shards of tars in the form of the published data set."""
    from rcm.data.published import adopt, scan

    if missing := [path for path in arguments.data if not path.is_file()]:
        raise UserError(f"tar {missing[0]} does not exist; download it first, or check the path")
    with Progress("adopt", len(arguments.data), "tars found") as progress:
        tars = []
        for path in arguments.data:
            tars.append(scan(path))
            progress.advance()
    if torn := sum(tar.torn for tar in tars):
        print(f"rcm adopt: note: {torn} samples lack members and are left out", file=sys.stderr)
    chosen = [tars[number] for number in part_indices(arguments.shard, len(tars))]
    numbers = [number + 1 for number in part_indices(arguments.shard, len(tars))]
    outputs = [arguments.out_dir / f"{number}-of-{len(tars)}.tar" for number in numbers]
    outputs += map(manifest_path, outputs[:])
    name = arguments.name or arguments.data[0].resolve().parent.name
    inputs = dict.fromkeys((tar.path for tar in chosen), "")
    config = {"name": name, "shard": arguments.shard}
    with (
        recording(*outputs, stage="adopt", inputs=inputs, config=config, seed=arguments.seed),
        Progress("adopt", sum(len(tar.places) for tar in chosen), "samples") as progress,
    ):
        options = {"name": name, "seed": arguments.seed, "share": arguments.shard}
        inputs |= adopt(tars, arguments.out_dir, **options, advance=progress.advance)


def verify(arguments: Namespace) -> None:
    """Check a set of shards and print what it holds."""
    with Progress("verify", len(arguments.data), "shards") as progress:
        data = read_shards(arguments.data, memory=0, advance=progress.advance)
    lines = read_lines(arguments.data)
    for key, value in _facts(data, lines, arguments.data).items():
        print(f"{key:<20}{value}")
    if arguments.samples:
        _verify_samples(data, {line["index"]: line["sha256"] for line in lines})


def _facts(data: LatentDataset, lines: Sequence[Mapping[str, int]], files: Sequence[Path]) -> dict[str, str]:
    """What a set holds and what it was made from, in words."""
    first = data.samples[0]
    seeds = sorted({line["seed"] for line in lines})
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (first.latents_CTHW, first.text_LD)]
    made_from = {key: value if isinstance(value, str) else json.dumps(value) for key, value in data.manifest.items()}
    made_from.pop("seed", None)  # as a range, below
    return {
        "samples": f"{len(data)} in {len(files)} shards, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB",
        "latents": f"{' x '.join(map(str, first.latents_CTHW.shape))}, {kinds[0]}",
        "words": f"{first.text_LD.shape[1]} numbers each, {kinds[1]}",
        "seed": " ... ".join(map(str, seeds[:1] + seeds[1:][-1:])) or str(first.seed),
        **made_from,
    }


def _verify_samples(data: LatentDataset, hashes: Mapping[int, str]) -> None:
    """Read every sample; UserError for those that are not as written, or cannot be latents."""
    faults = {}
    with Progress("verify", len(data), "samples") as progress:
        for sample in data.samples:
            if sample.index in hashes and sample_sha256(sample) != hashes[sample.index]:
                raise UserError(
                    f"sample {sample.index} is not the one that the manifest tells of; make its shard again"
                )
            if found := fault(sample):
                faults[sample.index] = found
            progress.advance()
    if faults:
        shown = "; ".join(f"sample {index}: {found}" for index, found in list(faults.items())[:5])
        raise UserError(f"{len(faults)} of {len(data)} samples are no samples of a teacher ({shown}); make them again")
    known = sum(index in hashes for index in range(len(data)))
    print(f"{'checked':<20}{len(data)} samples, {known} of them against their SHA-256: all are finite")


def merge(arguments: Namespace) -> None:
    """Write the samples of several shards as one set."""
    from rcm.data.merge import merge_shards

    if not arguments.shards:
        raise UserError("--shards is 0; expected 1 or more")
    manifests = read_manifests(arguments.data)
    inputs = {path: manifest["sha256"] for path, manifest in manifests.items()}  # which are verified
    outputs = [arguments.out_dir / f"{number}-of-{arguments.shards}.tar" for number in range(1, arguments.shards + 1)]
    outputs += map(manifest_path, outputs[:])
    config = {"shards": arguments.shards, "mixed": arguments.mixed, "renumber": arguments.renumber}
    total = 2 * sum(manifest["count"] for manifest in manifests.values())
    with (
        recording(*outputs, stage="merge", inputs=inputs, config=config),
        Progress("merge", total, "samples read and written") as progress,
    ):
        merge_shards(
            arguments.data,
            arguments.out_dir,
            arguments.shards,
            mixed=arguments.mixed,
            renumber=arguments.renumber,
            advance=progress.advance,
        )


def contact_sheet(arguments: Namespace) -> None:
    """Draw samples of shards, decoded, as a picture or a page."""
    from rcm.cli.config import compose
    from rcm.cli.contact_sheet import cards_of, chosen_places, write_sheet
    from rcm.cli.models import codec, device_of

    if arguments.out.suffix.lower() not in (".png", ".html"):
        raise UserError(f"cannot write {arguments.out}: the suffix must be .png or .html")
    config = compose(arguments.overrides)
    device = config["inference"]["device"]
    places, total = chosen_places(arguments.data, arguments.count)
    decoder = codec(config["codec"], arguments.codec, device=device)
    title = f"{len(places)} of {total} samples in {', '.join(path.name for path in arguments.data)}"
    with Progress("contact-sheet", len(places), "samples") as progress:

        def cards() -> Iterator[Any]:
            for card in cards_of(places, decoder, device_of(device)):
                yield card
                progress.advance()

        write_sheet(arguments.out, cards(), len(places), title)
