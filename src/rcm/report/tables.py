"""Tables 1 (images) and 2 (clips) as tidy CSV, Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def make_table(
    name: str, scores: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]], published: Path
) -> dict[str, str]:
    """`table1` (images) or `table2` (clips) as {"csv", "md", "tex"}, each the text of a file.

    `scores` are the score JSONs of teacher and students, `controls` those of oracle, codec and shuffled, `published` the
    CSV of the paper's own table, which gets a block of its own. Raises `UserError` when the controls fail: then the
    evaluator, not a model, was measured.
    """
    raise NotImplementedError
