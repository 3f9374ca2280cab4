"""The graph of the rules as a picture.

    snakemake --rulegraph mermaid-js | python workflow/scripts/draw_rules.py > docs/rules.svg

Layers by the longest way to the end, crossings reduced by medians (Sugiyama, Tagawa and Toda 1981); arrows that others
imply are left out. Needs nothing but Python.
"""

import re
import sys
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path

COLOURS = {"checkpoints": "#dbe7f5", "data": "#dcefe0", "train": "#fbe3cf", "evaluate": "#f7dde3", "tables": "#ece3f4"}
HEIGHT, GAP, LAYER = 26, 12, 70  # of a box; between boxes; between layers
Node = str | tuple[str, str, int]  # a rule, or where an arrow crosses a layer: its ends and the layer


def read(text: str) -> tuple[list[str], set[tuple[str, str]]]:
    """Rules and arrows of Snakemake's Mermaid text, without the target `all`, which is no work."""
    names = dict(re.findall(r"(id\d+)\[(.+)\]", text))
    arrows = {(names[a], names[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", text)}
    return sorted({*names.values()} - {"all"}), {arrow for arrow in arrows if "all" not in arrow}


def reduced(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without the arrows that a longer way implies."""

    def reached(start: str) -> set[str]:
        after = {b for a, b in arrows if a == start}
        return after.union(*map(reached, after))

    return {(a, b) for a, b in arrows if not any(b in reached(c) for d, c in arrows if d == a)}


def layers(names: list[str], arrows: set[tuple[str, str]]) -> dict[str, int]:
    """0 for what comes last; of a rule one more than of what needs it."""
    found: dict[str, int] = {}

    def layer(name: str) -> int:
        if name not in found:
            found[name] = max((layer(b) + 1 for a, b in arrows if a == name), default=0)
        return found[name]

    for name in names:
        layer(name)
    return found


def width(node: Node) -> float:
    return 7.2 * len(node) + 18 if isinstance(node, str) else 4


def segments(arrows: set[tuple[str, str]], at: dict[str, int]) -> Iterator[tuple[Node, Node]]:
    """Arrows cut where they cross layers."""
    for a, b in sorted(arrows):
        way: list[Node] = [a, *((a, b, layer) for layer in range(at[a] - 1, at[b], -1)), b]
        yield from pairwise(way)


def placed(rows: list[list[Node]], links: list[tuple[Node, Node]]) -> dict[Node, float]:
    """Middles of the nodes: rows are sorted and shifted towards their neighbours, above and below in turn."""
    x: dict[Node, float] = {node: 120.0 * i for row in rows for i, node in enumerate(row)}
    near: dict[Node, tuple[list[Node], list[Node]]] = {node: ([], []) for node in x}
    for a, b in links:
        near[a][1].append(b)
        near[b][0].append(a)
    for turn in range(60):
        for row in rows if turn % 2 else rows[::-1]:
            sides = (0,) if turn % 2 else (1,)
            if turn >= 40:
                sides = (0, 1)  # the order is found; now straight
            want = {}
            for node in row:
                others = [x[other] for side in sides for other in near[node][side]]
                want[node] = sum(others) / len(others) if others else x[node]
            if turn < 40:
                row.sort(key=lambda node: (want[node], str(node)))
            for node, place in zip(row, spread([want[node] for node in row], row), strict=True):
                x[node] = place
    return x


def spread(want: list[float], row: list[Node]) -> list[float]:
    """The nearest places (least squares) in the same order that leave a gap: pool adjacent violators."""
    before = [0.0]
    for a, b in pairwise(row):
        before.append(before[-1] + (width(a) + width(b)) / 2 + GAP)
    blocks: list[list[float]] = []
    for value in (w - offset for w, offset in zip(want, before, strict=True)):
        blocks.append([value])
        while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return [mean(block) + offset for block, offset in zip([b for b in blocks for _ in b], before, strict=True)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def themes(folder: Path) -> dict[str, str]:
    """Of each rule that has a name of its own, the file it stands in."""
    found = ((path.stem, path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.smk")))
    return {name: stem for stem, text in found for name in re.findall(r"^ *rule (\w+):", text, re.MULTILINE)}


def draw(text: str, theme: dict[str, str]) -> str:
    """The picture."""
    names, arrows = read(text)
    arrows = reduced(arrows)
    at = layers(names, arrows)
    links = list(segments(arrows, at))
    level = {node: at[node] if isinstance(node, str) else node[2] for link in links for node in link}
    top = max(at.values())
    rows: list[list[Node]] = [sorted((n for n in level if level[n] == k), key=str) for k in range(top, -1, -1)]
    x = placed(rows, links)
    left = min(x[node] - width(node) / 2 for node in x) - 16
    right = max(x[node] + width(node) / 2 for node in x) + 16

    def y(node: Node) -> float:
        return 16 + HEIGHT / 2 + LAYER * (top - level[node])

    size = f"{right - left:.0f}", f"{LAYER * top + HEIGHT + 32 + 34:.0f}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {" ".join(size)}" width="{size[0]}" height="{size[1]}" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="12">',
        "<title>Rules of the workflow at the scale tiny; arrows that others imply are left out</title>",
        '<rect width="100%" height="100%" rx="8" fill="#fff"/>',
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#667"/></marker>',
    ]
    for a, b in links:
        start, end = y(a) + HEIGHT / 2, y(b) - HEIGHT / 2
        x0, x1, middle = x[a] - left, x[b] - left, (start + end) / 2
        tip = ' marker-end="url(#tip)"' if isinstance(b, str) else ""
        path = f"M{x0:.0f} {start:.0f}C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {end:.0f}"
        path += "" if tip else f"v{HEIGHT}"  # past the boxes of a layer
        parts.append(f'<path d="{path}" fill="none" stroke="#889" stroke-width="1.2"{tip}/>')
    for name in names:
        parts.append(box(x[name] - left, y(name), name, COLOURS[theme.get(name, "checkpoints")]))
    place = 16.0
    for stem, colour in COLOURS.items():
        label = f"{stem}.smk"
        parts.append(box(place + width(label) / 2, float(size[1]) - 26, label, colour))
        place += width(label) + GAP
    return "\n".join([*parts, "</svg>", ""])


def box(x: float, y: float, name: str, colour: str) -> str:
    shape = f'x="{x - width(name) / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{width(name):.0f}" height="{HEIGHT}"'
    words = f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" fill="#223">{escape(name)}</text>'
    return f'<rect {shape} rx="6" fill="{colour}" stroke="#99a"/>{words}'


if __name__ == "__main__":
    sys.stdout.write(draw(sys.stdin.read(), themes(Path(__file__).parents[1] / "rules")))
