# Training: distillation by each method, and export of the students.

# What a distillation asks for besides memory and time; on several machines it starts by Slurm's srun
ON_MACHINES = {"gpu": sized(0, config["nproc"])}
if MACHINES > 1:
    ON_MACHINES = {"mpi": "srun", "tasks": MACHINES, "tasks_per_gpu": 0, "cpus_per_task": config["nproc"] // MACHINES}
    if BIG:
        ON_MACHINES["gres"] = f"gpu:{config['nproc'] // MACHINES}"


rule distill:
    input:
        teacher=rules.convert.output,
        shards=gather.synthesize(rules.synthesize.output.shard, allow_missing=True),
        manifests=gather.synthesize(rules.synthesize.output.manifest, allow_missing=True),
        codec=fetched("codec"),
        text=texts("dev"),
    output:
        dcp=directory("<data>/{media}/{method}-{seed}/dcp"),
        raw=directory("<data>/{media}/{method}-{seed}/raw"),
        metrics="<data>/{media}/{method}-{seed}/metrics.jsonl",
        previews=directory("<data>/{media}/{method}-{seed}/previews"),
    log:
        "<logs>/{media}/distill/{method}-{seed}.log",
    benchmark:
        "<logs>/benchmarks/distill/{media}-{method}-{seed}.tsv"
    priority: 50
    threads: config["nproc"]
    resources:
        **ON_MACHINES,
        # memory, cores and GPUs of each machine
        mem_mb=lambda wildcards, threads: sized(1500, 64000) * threads // MACHINES,
        runtime=60 * config["hours"]["distill"],
        nodes=MACHINES,
    params:
        cfg=numbers("distill"),
        code=code("distill"),
        overrides=overrides("distill"),
        launcher=launcher,
        resume=f"resume/{SCALE}/{{media}}/{{method}}-{{seed}}",
        text=encoded,
    message:
        "Distil {wildcards.media} by {wildcards.method}, seed {wildcards.seed}; to watch: tail -f {log}"
    shell:
        "{params.launcher} distill {params.overrides} --teacher {input.teacher} --data {input.shards} --codec {input.codec} "
        "{params.text} --resume {params.resume} --out {output.dcp} --raw {output.raw} --metrics {output.metrics} "
        "--previews {output.previews} > {log} 2>&1"


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
        mem_mb=sized(800, 24000),
        runtime=sized(30, 240),
    params:
        cfg=numbers("export"),
        code=code("export"),
        overrides=overrides("export"),
    message:
        "Export the student {wildcards.method}-{wildcards.seed} of {wildcards.media}"
    shell:
        "python -m rcm export {params.overrides} --student {input} --out {output.safetensors} > {log} 2>&1"
