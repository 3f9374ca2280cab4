"""What files are called that say of which model they are."""

from pathlib import Path

from rcm.artefact import UserError


def model_and_steps(out: Path) -> tuple[str, int]:
    """Whose numbers a file holds: (rcm-0, 4) of `rcm-0-4.json`."""
    model, _, steps = out.stem.rpartition("-")
    if not (model and steps.isdecimal() and out.suffix == ".json"):
        raise UserError(f"--out must be called MODEL-STEPS.json, such as rcm-0-4.json; got {out.name!r}")
    return model, int(steps)
