# Evaluation: samples of students, teacher and controls, and their scores.
rule sample_student:
    input:
        student=rules.export.output.safetensors,
        codec=fetched("codec"),
        prompts=rules.prompts.output,
        text=texts("{suite}"),
    output:
        directory("<data>/{media}/samples/{method}-{seed}-{steps}/{suite}/{scatteritem}"),
    log:
        "<logs>/{media}/sample/{method}-{seed}-{steps}-{suite}-{scatteritem}.log",
    benchmark:
        "<logs>/benchmarks/sample/{media}-{method}-{seed}-{steps}-{suite}-{scatteritem}.tsv"
    threads: 1
    resources:
        mem_mb=sized(1000, 64000),
        runtime=sized(60, 1440),
        gpu=sized(0, 1),
    params:
        cfg=numbers("sample student"),
        code=code("sample"),
        overrides=overrides("sample student"),
        text=encoded,
    message:
        "Sample {wildcards.media} from {wildcards.method}-{wildcards.seed} in {wildcards.steps} steps "
        "({wildcards.suite}, part {wildcards.scatteritem})"
    shell:
        "python -m rcm sample {params.overrides} --checkpoint {input.student} --codec {input.codec} "
        "--prompts {input.prompts} {params.text} --steps {wildcards.steps} --part {wildcards.scatteritem} --out {output} > {log} 2>&1"


rule sample_teacher:
    input:
        teacher=rules.convert.output,
        codec=fetched("codec"),
        prompts=rules.prompts.output,
        text=texts("{suite}"),
    output:
        directory("<data>/{media}/samples/teacher-{steps}/{suite}/{scatteritem}"),
    log:
        "<logs>/{media}/sample/teacher-{steps}-{suite}-{scatteritem}.log",
    benchmark:
        "<logs>/benchmarks/sample/{media}-teacher-{steps}-{suite}-{scatteritem}.tsv"
    threads: 1
    resources:
        mem_mb=sized(1000, 64000),
        runtime=sized(60, 1440),
        gpu=sized(0, 1),
    params:
        cfg=numbers("sample teacher"),
        code=code("sample"),
        overrides=overrides("sample teacher"),
        text=encoded,
    message:
        "Sample {wildcards.media} from the teacher in {wildcards.steps} steps "
        "({wildcards.suite}, part {wildcards.scatteritem})"
    shell:
        "python -m rcm sample {params.overrides} --checkpoint {input.teacher} --codec {input.codec} "
        "--prompts {input.prompts} {params.text} --steps {wildcards.steps} --part {wildcards.scatteritem} --out {output} > {log} 2>&1"


rule sample_control:
    input:
        codec=fetched("codec"),
        prompts=rules.prompts.output,
    output:
        directory("<data>/{media}/samples/{control}-0/{suite}/{scatteritem}"),
    log:
        "<logs>/{media}/sample/{control}-{suite}-{scatteritem}.log",
    benchmark:
        "<logs>/benchmarks/sample/{media}-{control}-{suite}-{scatteritem}.tsv"
    threads: 1
    resources:
        mem_mb=800,
        runtime=60,
    params:
        cfg=numbers("sample control"),
        code=code("sample"),
        overrides=overrides("sample control"),
    message:
        "Make the control `{wildcards.control}` of {wildcards.media} ({wildcards.suite}, part {wildcards.scatteritem})"
    shell:
        "python -m rcm sample {params.overrides} --control {wildcards.control} --codec {input.codec} "
        "--prompts {input.prompts} --steps 0 --part {wildcards.scatteritem} --out {output} > {log} 2>&1"


rule precision:
    input:
        teacher=rules.convert.output,
        checkpoint=branch(
            lambda wildcards: wildcards.model == "teacher",
            then=rules.convert.output,
            otherwise="<data>/{media}/{model}/student.safetensors",
        ),
        prompts="<data>/{media}/prompts/dev.jsonl",
        text=texts("dev"),
    output:
        "<results>/{media}/precision/{model}.json",
    log:
        "<logs>/{media}/precision/{model}.log",
    benchmark:
        "<logs>/benchmarks/precision/{media}-{model}.tsv"
    threads: 1
    resources:
        mem_mb=sized(1000, 128000),
        runtime=sized(30, 720),
        gpu=sized(0, 1),
    params:
        cfg=numbers("precision", suite="dev"),
        code=code("precision"),
        overrides=overrides("precision", suite="dev"),
        text=encoded,
    message:
        "Measure rounding in the network of {wildcards.model}, {wildcards.media}"
    shell:
        "python -m rcm precision {params.overrides} --checkpoint {input.checkpoint} --teacher {input.teacher} "
        "--prompts {input.prompts} {params.text} --out {output} > {log} 2>&1"


rule evaluate:
    input:
        # of those that an official evaluator has looked at, how they were made
        samples=parts("samples", "report") if by("shapes", *OFFICIAL) else [],
        measured=[] if by("shapes", "geneval-mmdet") else parts("measured", "report"),
        official=f"<results>/{{media}}/official/{SCORER}/{{model}}.{ENDING}" if by(*OFFICIAL) else [],
        # the diversity of ground truth is the most there can be; of the other controls it says nothing
        diversity=branch(
            lambda wildcards: wildcards.model in ("codec-0", "shuffled-0"),
            then=[],
            otherwise=parts("samples" if by("shapes") else "measured", "diversity"),
        ),
        prompts="<data>/{media}/prompts/report.jsonl",
    output:
        scores="<results>/{media}/scores/{model}.json",
        results="<results>/{media}/scores/{model}.results.jsonl",
        metrics="<results>/{media}/metrics/{model}.json",
    log:
        "<logs>/{media}/evaluate/{model}.log",
    benchmark:
        "<logs>/benchmarks/evaluate/{media}-{model}.tsv"
    threads: 1
    resources:
        mem_mb=sized(1000, 4000),
        runtime=60,
    params:
        cfg=numbers("evaluate"),
        code=code("evaluate"),
        overrides=overrides("evaluate"),
        given=given,
    message:
        "Score {wildcards.media} of {wildcards.model}"
    shell:
        "python -m rcm evaluate {params.overrides} {params.given} "
        "--out {output.scores} --results {output.results} --metrics {output.metrics} > {log} 2>&1"


rule throughput:
    input:
        checkpoint=branch(
            lambda wildcards: wildcards.student == "teacher",
            then=rules.convert.output,
            otherwise="<data>/{media}/{student}/student.safetensors",
        ),
        codec=fetched("codec"),
        prompts="<data>/{media}/prompts/report.jsonl",
        text=texts("report"),
    output:
        "<results>/{media}/throughput/{student}-{steps}.json",
    log:
        "<logs>/{media}/throughput/{student}-{steps}.log",
    benchmark:
        "<logs>/benchmarks/throughput/{media}-{student}-{steps}.tsv"
    # on one machine: with nothing beside it; a cluster's job takes as many as were asked for
    threads: 1 if workflow.remote_exec else workflow.resource_settings.cores or 1
    resources:
        mem_mb=sized(1000, 64000),
        runtime=sized(30, 480),
        gpu=sized(0, 1),
    params:
        cfg=numbers("throughput"),
        code=code("throughput"),
        overrides=overrides("throughput"),
        text=encoded,
    message:
        "Time {wildcards.media} of {wildcards.student} in {wildcards.steps} steps"
    shell:
        "python -m rcm throughput {params.overrides} --checkpoint {input.checkpoint} --codec {input.codec} "
        "--prompts {input.prompts} {params.text} --steps {wildcards.steps} --out {output} > {log} 2>&1"
