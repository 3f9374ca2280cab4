# Data: prompts, their encoding, and latents that a teacher makes of them.
rule prompts:
    input:
        source=prompt_file,
        names=lambda wildcards: of_vbench(wildcards, "prompts_names"),
        info=lambda wildcards: of_vbench(wildcards, "prompts_info"),
    output:
        "<data>/{media}/prompts/{suite}.jsonl",
    log:
        "<logs>/{media}/prompts/{suite}.log",
    benchmark:
        "<logs>/benchmarks/prompts/{media}-{suite}.tsv"
    threads: 1
    resources:
        mem_mb=sized(300, 2000),
        runtime=10,
    params:
        cfg=numbers("prompts"),
        code=code("prompts"),
        overrides=overrides("prompts"),
        given=given,
    message:
        "Prepare the prompts `{wildcards.suite}` for {wildcards.media}"
    shell:
        "python -m rcm prompts {params.overrides} {params.given} --out {output} > {log} 2>&1"


if ENCODED:

    rule embed:
        input:
            prompts=rules.prompts.output,
            encoder=fetched("text"),
            tokenizer=fetched("tokenizer"),
        output:
            "<data>/{media}/text/{suite}/{scatteritem}.safetensors",
        log:
            "<logs>/{media}/embed/{suite}-{scatteritem}.log",
        benchmark:
            "<logs>/benchmarks/embed/{media}-{suite}-{scatteritem}.tsv"
        threads: 1
        resources:
            mem_mb=64000,
            runtime=120,
            gpu=1,
        params:
            cfg=numbers("embed"),
            code=code("embed"),
            overrides=overrides("embed"),
        message:
            "Encode the prompts `{wildcards.suite}`, part {wildcards.scatteritem}"
        shell:
            "python -m rcm embed {params.overrides} --prompts {input.prompts} --part {wildcards.scatteritem} "
            "--encoder {input.encoder} --tokenizer {input.tokenizer} --out {output} > {log} 2>&1"


rule synthesize:
    input:
        teacher="<data>/{media}/synthesizer" if "synthesizer" in CHECKPOINTS else rules.convert.output,
        prompts="<data>/{media}/prompts/train.jsonl",
        text=texts_of_shard,
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
        mem_mb=sized(1000, 64000),
        runtime=60 * config["hours"]["synthesize"],
        gpu=sized(0, 1),
    params:
        cfg=numbers("synthesize"),
        code=code("synthesize"),
        overrides=overrides("synthesize"),
        text=encoded,
    message:
        "Let the teacher of {wildcards.media} make training data, shard {wildcards.scatteritem}"
    shell:
        "python -m rcm synthesize {params.overrides} --teacher {input.teacher} --prompts {input.prompts} {params.text} "
        "--shard {wildcards.scatteritem} --out {output.shard} > {log} 2>&1"
