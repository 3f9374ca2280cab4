"""The report: one HTML page that needs nothing beside itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def report_page(
    results: Path,
    *,
    samples: Sequence[Path] = (),
    config: Mapping[str, Any] | None = None,
    benchmarks: Sequence[Path] = (),
    provenance: Sequence[Path] = (),
) -> str:
    """The page as text.

    `results` is `results/{scale}` with `{media}/scores/*.json`, `tables/`, `figures/`; `samples` are sample folders of clips
    (`.../{model}-{steps}/{suite}/{part}`) to show as animations; `config` the composed configuration; `benchmarks` the files
    or folders of Snakemake's benchmark TSVs; `provenance` files or folders searched for `*.prov.json` and `*.run.json`
    (results is searched anyway).
    """
    raise NotImplementedError
