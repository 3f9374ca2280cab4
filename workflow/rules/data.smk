# Data: prompts, and latents that the teacher makes of them.
rule prompts:
    output:
        "<data>/{media}/prompts/{suite}.jsonl",
    log:
        "<logs>/{media}/prompts/{suite}.log",
    benchmark:
        "<logs>/benchmarks/prompts/{media}-{suite}.tsv"
    threads: 1
    resources:
        mem_mb=300,
        runtime=10,
    params:
        cfg=numbers("prompts"),
        code=lambda _: code_digest("prompts"),
        overrides=overrides("prompts"),
    message:
        "Draw the prompts `{wildcards.suite}` for {wildcards.media}"
    shell:
        "python -m rcm prompts {params.overrides} --out {output} > {log} 2>&1"


rule synthesize:
    input:
        teacher=rules.convert.output,
        prompts="<data>/{media}/prompts/train.jsonl",
    output:
        shard="<data>/{media}/shards/{scatteritem}.tar",
        manifest="<data>/{media}/shards/{scatteritem}.tar.json",
    log:
        "<logs>/{media}/synthesize/{scatteritem}.log",
    benchmark:
        "<logs>/benchmarks/synthesize/{media}-{scatteritem}.tsv"
    priority: 100
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    params:
        cfg=numbers("synthesize"),
        code=lambda _: code_digest("synthesize"),
        overrides=overrides("synthesize"),
    message:
        "Let the teacher of {wildcards.media} make training data, shard {wildcards.scatteritem}"
    shell:
        "python -m rcm synthesize {params.overrides} --teacher {input.teacher} --prompts {input.prompts} "
        "--shard {wildcards.scatteritem} --out {output.shard} > {log} 2>&1"
