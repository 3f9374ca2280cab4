"""rCM pipeline: score-regularised continuous-time consistency distillation, from checkpoint to table."""

__version__ = "0.1.0"
