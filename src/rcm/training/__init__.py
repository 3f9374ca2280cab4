"""Training loops: what they optimise comes from `rcm.objectives`, parallelism and files from their callers."""
