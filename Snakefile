# Entry of the workflow: snakemake -n lists every job of the default target.
include: "workflow/Snakefile"


rule all:
    default_target: True
    input:
        rules.report.output,
    message:
        "Everything is made: see {input}"
