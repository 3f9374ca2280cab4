"""Scores from samples; how the samples were made is no business of this package.

`evaluate` scores the samples of one model, `shapeeval` images in memory, and `check_controls` says whether scores mean
anything.
"""

from rcm.evaluation.geneval import shapeeval
from rcm.evaluation.scores import Evaluation, check_controls, evaluate, results_jsonl

__all__ = ["Evaluation", "check_controls", "evaluate", "results_jsonl", "shapeeval"]
