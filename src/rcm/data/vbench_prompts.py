"""VBench's suite of prompts in any of its variants (Huang et al., arXiv 2311.17982).

Three files say the same prompts in the same order: the texts to sample by, the short ones that samples are named by,
and which dimensions ask what of each. Two of the 946 prompts stand there twice, with another dimension each, so that
944 remain.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcm.artefact import UserError, read_json
from rcm.data.prompt_files import file_name_fault, read_lines, read_prompt_file
from rcm.data.prompts import Metadata

STILL = "temporal_flickering"  # of which only clips without motion count, so that it takes more samples
_LONGEST = "-24.mp4"  # what a name is followed by


def vbench_prompts(source: Path, names: Path, info: Path | None, *, still_samples: int | None) -> list[Metadata]:
    """The prompts of `source`, each {"prompt", "name", "dimension", "auxiliary_info", "samples"?}.

    Args:
        source: a prompt file, which may hold longer forms of the prompts.
        names: their own words, a prompt a line, by which samples are named.
        info: VBench_full_info.json; without it the prompts have no `dimension` and no `auxiliary_info`.
        still_samples: "samples" of prompts of temporal flickering, if others than of the rest.

    Where a name recurs, the first prompt is taken, with the dimensions of both. Raises UserError, which names file and
    line, where the files do not say the same prompts, or a file cannot have such a name.
    """
    prompts, lines = read_prompt_file(source), read_lines(names)
    if len(prompts) != len(lines):
        raise UserError(
            f"{names} has {len(lines)} lines, but {source} has {len(prompts)} prompts; expected the same prompts, line "
            "by line"
        )
    entries = [{}] * len(lines) if info is None else _entries(info, names, [name for _, name in lines])
    found: dict[str, Metadata] = {}
    for item, (number, line), entry in zip(prompts, lines, entries, strict=True):
        name = entry.get("prompt_en", line)  # to the letter, as the official code looks for it
        if fault := file_name_fault(name + _LONGEST):
            raise UserError(f"{names}, line {number}: no file can be called NAME{_LONGEST}, for {fault}")
        known = found.setdefault(name, {"prompt": item["prompt"], "name": name})
        if info is not None:
            _unite(known, entry, f"{info}, {name!r}")
    for item in found.values():
        if still_samples is not None and STILL in item.get("dimension", []):
            item["samples"] = still_samples
    return list(found.values())


def _entries(info: Path, names: Path, wanted: list[str]) -> list[Mapping[str, Any]]:
    """The entries of VBench_full_info.json, checked."""
    entries = read_json(info)
    if not isinstance(entries, list):
        raise UserError(f"{info} is no list of prompts; expected VBench_full_info.json")
    if len(entries) != len(wanted):
        raise UserError(f"{info} has {len(entries)} entries, but {names} has {len(wanted)} lines; expected as many")
    for number, (entry, name) in enumerate(zip(entries, wanted, strict=True), start=1):
        if not _is_entry(entry):
            raise UserError(
                f'{info}, entry {number}: expected {{"prompt_en": TEXT, "dimension": [NAME, ...]}}, and perhaps '
                '"auxiliary_info"'
            )
        if entry["prompt_en"].strip() != name:
            raise UserError(
                f"{info}, entry {number}: the prompt is {entry['prompt_en']!r}, but {names} has {name!r} there; "
                "expected the same order"
            )
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt_en"), str):
        return False
    dimensions, asked = entry.get("dimension"), entry.get("auxiliary_info", {})
    if not isinstance(dimensions, list) or not dimensions or not isinstance(asked, dict):
        return False
    return all(isinstance(dimension, str) for dimension in dimensions)


def _unite(known: Metadata, entry: Mapping[str, Any], place: str) -> None:
    """Add what an entry asks to what is known of its prompt."""
    known["dimension"] = list(dict.fromkeys([*known.get("dimension", []), *entry["dimension"]]))
    asked, more = known.get("auxiliary_info", {}), entry.get("auxiliary_info", {})
    if twice := [key for key in more if asked.get(key, more[key]) != more[key]]:
        raise UserError(f"{place} stands there twice, with different {twice[0]!r}; expected one, or the same")
    known["auxiliary_info"] = {**asked, **more}
