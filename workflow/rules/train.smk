# Training: distillation by each method, and export of the students.
rule distill:
    input:
        teacher=rules.convert.output,
        shards=gather.synthesize(rules.synthesize.output.shard, allow_missing=True),
        manifests=gather.synthesize(rules.synthesize.output.manifest, allow_missing=True),
        codec=rules.download_codec.output,
    output:
        dcp=directory("<data>/{media}/{method}-{seed}/dcp"),
        metrics="<data>/{media}/{method}-{seed}/metrics.jsonl",
        previews=directory("<data>/{media}/{method}-{seed}/previews"),
    log:
        "<logs>/{media}/distill/{method}-{seed}.log",
    benchmark:
        "<logs>/benchmarks/distill/{media}-{method}-{seed}.tsv"
    priority: 50
    threads: config["nproc"]
    resources:
        mem_mb=lambda wildcards, threads: 1500 * threads,
        runtime=120,
    params:
        cfg=numbers("distill"),
        code=lambda _: code_digest("distill"),
        overrides=overrides("distill"),
        launcher=launcher,
        resume=f"resume/{SCALE}/{{media}}/{{method}}-{{seed}}",
    message:
        "Distil {wildcards.media} by {wildcards.method}, seed {wildcards.seed}; to watch: tail -f {log}"
    shell:
        "{params.launcher} distill {params.overrides} --teacher {input.teacher} --data {input.shards} --codec {input.codec} "
        "--resume {params.resume} --out {output.dcp} --metrics {output.metrics} --previews {output.previews} "
        "> {log} 2>&1"


rule export:
    input:
        rules.distill.output.dcp,
    output:
        safetensors="<data>/{media}/{method}-{seed}/student.safetensors",
        pth="<data>/{media}/{method}-{seed}/student.pth",
    log:
        "<logs>/{media}/export/{method}-{seed}.log",
    benchmark:
        "<logs>/benchmarks/export/{media}-{method}-{seed}.tsv"
    threads: 1
    resources:
        mem_mb=800,
        runtime=30,
    params:
        cfg=numbers("export"),
        code=lambda _: code_digest("export"),
        overrides=overrides("export"),
    message:
        "Export the student {wildcards.method}-{wildcards.seed} of {wildcards.media}"
    shell:
        "python -m rcm export {params.overrides} --student {input} --out {output.safetensors} > {log} 2>&1"
