"""The figures by name, as PNG bytes: the same inputs give the same bytes."""

from rcm.report.ablations import figure_lambda, figure_rollout, figure_steps
from rcm.report.pictures import Samples, chosen_prompts, figure_clips, figure_samples, sample_runs
from rcm.report.plots import figure_precision, figure_quality_diversity, figure_training

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
