"""Every key of the Hydra tree, as tables: python workflow/scripts/list_keys.py writes them into config/README.md.

The words are those beside the values in `config/`; a key without words of its own belongs to what stands above it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

CONFIG = Path(__file__).parents[2] / "config"
START, END = "<!-- keys: python workflow/scripts/list_keys.py -->", "<!-- end of keys -->"
FILES = {  # file: what its keys stand under; a key is told of the first file that has it
    "config": "",
    "experiment/tiny-images": "",
    "objective/rcm": "objective",
    "network/wan-tiny": "network",
    "codec/cells": "codec",
    "text/words": "text",
    "pretrain/tiny-images": "pretrain",
    "experiment/wan2.1-1.3b-clips": "",
    "prompts_vbench/longer": "checkpoints.prompts_report",
    "experiment/cosmos-predict2-0.6b-images": "",
    "network/wan2.1-t2v-1.3b": "network",
    "network/wan2.1-i2v-14b": "network",
    "network/cosmos-predict2-t2i-2b": "network",
    "codec/wan2.1-vae": "codec",
    "text/umt5-xxl-encoder": "text",
    "text/t5-11b-encoder": "text",
    "vision/clip-vit-huge-14": "vision",
}
OF_TINY = list(FILES)[:7]
LINE = re.compile(r"""( *)(\w+):(?: +("[^"]*"|[^#"]*[^#" ]))? *(?:# ?(.*))?""")


def keys(text: str) -> Iterator[tuple[str, str, str]]:
    """Dotted key, value (empty for a section) and words of each line of a YAML file."""
    found: list[list[str]] = []
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := LINE.fullmatch(line):
            indent, name, value, words = len(match[1]), match[2], match[3] or "", match[4] or ""
            above = [(at, key) for at, key in above if at < indent]
            found.append([".".join([*(key for _, key in above), name]), value, words])
            above.append((indent, name))
        elif found and (more := re.fullmatch(r" {12,}# ?(.*)", line)):  # the words go on
            found[-1][2] += f" {more[1]}"
    yield from ((key, value, words) for key, value, words in found if not key.startswith("defaults"))


def tables() -> str:
    """The tables, one a section."""
    rows: dict[str, list[str]] = {}
    told: dict[str, str] = {}  # words of keys; of those that have none, of the last part in its section
    for file, prefix in FILES.items():
        for name, value, words in keys((CONFIG / f"{file}.yaml").read_text(encoding="utf-8")):
            key = f"{prefix}.{name}" if prefix else name
            section, _, rest = key.partition(".")
            if key in told or re.search(r"\.(source|sha256|weights\.\w+)$", key) or not (value or words):
                continue
            last = f"{'teacher' if section == 'synthesis' else section}.*.{rest.rpartition('.')[2]}"
            told[key] = words or told.get(last, "")
            told.setdefault(last, told[key])
            shown = value if len(value) <= 40 else f"{value[:30]}…"
            where = f" in `{file}`" if shown and file not in OF_TINY else ""
            cells = f"`{key}`", f"`{shown}`{where}" if shown else "", told[key]
            line = " | ".join(cell.replace("|", "\\|") for cell in cells)
            rows.setdefault(section if rest or not value else "", []).append(f"| {line} |")
    head = "| key | value | meaning |\n|---|---|---|\n"
    return "\n\n".join(head + "\n".join(lines) for lines in rows.values())


if __name__ == "__main__":
    readme = CONFIG / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    readme.write_text(f"{before}{START}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
