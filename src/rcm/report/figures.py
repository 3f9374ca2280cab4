"""The figures by name, as PNG bytes: the same inputs give the same bytes."""

from rcm.report.balance import figure_lambda
from rcm.report.pictures import Samples, chosen_prompts, figure_clips, figure_samples, sample_runs
from rcm.report.plots import figure_precision, figure_quality_diversity, figure_training
from rcm.report.steps import figure_rollout, figure_steps

__all__ = [
    "Samples",
    "chosen_prompts",
    "figure_clips",
    "figure_lambda",
    "figure_precision",
    "figure_quality_diversity",
    "figure_rollout",
    "figure_samples",
    "figure_steps",
    "figure_training",
    "sample_runs",
]
