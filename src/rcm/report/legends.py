"""What stands below the figures, on the page and in `snakemake --report`.

Imports nothing, for every start of Snakemake reads it.
"""

LEGENDS = {
    "figure_samples": "One sample a model and number of steps, from the same initial noise. The prompts are the first "
    "of each task, not chosen by eye. Small pictures are enlarged without smoothing, big ones scaled down.",
    "figure_quality_diversity": "Quality against diversity, means over training seeds with 95 % intervals; points are "
    "the larger the more sampling steps. Up and to the right is better.",
    "figure_steps": "Quality and diversity against sampling steps, means over training seeds with 95 % intervals; the "
    "band is the teacher at its own number of steps. What the paper printed has a panel of its own.",
    "figure_lambda": "The weight λ of DMD beside sCM in rCM, as in figure 7 of the paper, with diversity beside "
    "quality by the same sampler: at 0, 0.1, 1, 10 and 100 times the scale's own λ. λ = 0 is sCM alone, 1 the students "
    "of the tables. λ√D, with D the numbers in a sample's latents, makes scales of different size comparable. The "
    "paper's numbers are of Wan2.1 1.3B in a training of its own, so they have a panel of their own.",
    "figure_rollout": "Times of the student's own rollouts, random against fixed, in rCM and in DMD alone, after as "
    "many updates of the student; below, random − fixed with 95 % intervals, paired by prompt where that can be done.",
    "figure_training": "Training of the students: every update faintly, the running median in full. The sCM loss "
    "is near 1 by construction; its information is in the gradient and in the norm of the tangent.",
    "figure_precision": "Rounding in the network: its distance to float64 in the velocity F and in the tangent "
    "cos t sin t dF/dt along the guided teacher, relative to the norm of the float64 value. Lines are medians, "
    "bands quartiles over samples of different prompts. In bfloat16 the time is rounded with all else, or it and its "
    "embedding stay in float32; all outside the network is float64. At the middles of equal parts of 0 to π/2.",
    "figure_clips": "Clips as film strips, one sample a model and number of steps from the same initial noise.",
}
