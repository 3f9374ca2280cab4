"""What the scores say about each claim of the paper, in one plain sentence a claim."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One claim: `verdict` is "shown", "not shown" or "contradicted"; `sentence` carries the numbers and intervals."""

    media: str
    claim: str
    verdict: str
    sentence: str


def findings(scores: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Findings of every claim that the scores at hand (of one or both media) can be asked about."""
    raise NotImplementedError
