"""What each evaluator measures and the weights that it takes; imports nothing heavy."""

from collections.abc import Mapping
from pathlib import Path

from rcm.artefact import UserError

OFFICIAL = ("geneval-mmdet", "vbench", "vbench-long")  # scorers with an environment of their own
WEIGHTS = {  # of what is measured: whose weights it takes, by their names in `checkpoints`
    "geneval": ("detector", "clip_large"),
    "vbench": ("dino", "clip_base", "clip_large", "aesthetic"),
    "diversity": ("clip_large", "dinov2", "vgg"),
    "text": (),
}
NAMES = {
    "geneval": "GenEval (HF Mask2Former)",
    "vbench": "VBench (native part)",
    "diversity": "Diversity",
    "text": "Small text (RapidOCR)",
}
ALL = tuple(dict.fromkeys(name for names in WEIGHTS.values() for name in names))


def subject(scorer: str, suite: str) -> str:
    """What is measured of a suite: geneval | vbench | diversity | text. UserError where nothing is measured."""
    if scorer == "shapes":
        raise UserError("evaluation.scorer is shapes, which looks at samples itself: give them to `rcm evaluate`")
    if suite in ("diversity", "text"):
        return suite
    if suite != "report":
        raise UserError(f"the samples of suite={suite} are not scored; allowed: report, diversity or text")
    if scorer == "geneval-mmdet":
        raise UserError(
            "evaluation.scorer is geneval-mmdet, whose own environment looks at the samples: give its results to "
            "`rcm evaluate --official`"
        )
    return "geneval" if scorer == "geneval-mask2former" else "vbench"


def taken(what: str, weights: Mapping[str, Path]) -> dict[str, Path]:
    """The weights that a measurement takes; UserError where one is missing, or one too many."""
    names = WEIGHTS[what]
    for name in weights:
        if name not in names:
            allowed = f"--weights takes {', '.join(names)}" if names else "leave --weights out"
            raise UserError(f"{NAMES[what]} has no use for {name}: {allowed}")
    for name in names:
        if name not in weights:
            raise UserError(f"{NAMES[what]} needs the weights {name}: add --weights {name}=PATH (`rcm download`)")
    return {name: weights[name] for name in names}
