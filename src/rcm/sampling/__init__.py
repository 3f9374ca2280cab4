"""Samplers: a teacher's along its probability flow, and the few steps of a consistency function.

The state is float64; the noise is an argument, so that a sample depends on nothing else.
"""

from rcm.sampling.few_step import consistency_sample, few_step_times
from rcm.sampling.teacher import teacher_sample

__all__ = ["consistency_sample", "few_step_times", "teacher_sample"]
