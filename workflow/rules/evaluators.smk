# Evaluators of real models: what their networks see is stored, then scored; the official ones have environments of
# their own, which Snakemake makes with --sdm conda.
rule measure:
    input:
        unpack(lambda wildcards: weights(wildcards.suite)),
        samples="<data>/{media}/samples/{model}/{suite}/{scatteritem}",
    output:
        "<results>/{media}/measured/{model}/{suite}/{scatteritem}.jsonl",
    log:
        "<logs>/{media}/measure/{model}-{suite}-{scatteritem}.log",
    benchmark:
        "<logs>/benchmarks/measure/{media}-{model}-{suite}-{scatteritem}.tsv"
    threads: 1
    resources:
        mem_mb=32000,
        runtime=720,
        gpu=lambda wildcards: 1 if weights(wildcards.suite) else 0,
    params:
        cfg=numbers("measure"),
        code=code("measure"),
        overrides=overrides("measure"),
        weights=lambda wildcards, input: " ".join(
            ["--weights", *(f"{name}={input[name]}" for name in weights(wildcards.suite))] if len(input) > 1 else []
        ),
    message:
        "Look at {wildcards.media} of {wildcards.model} ({wildcards.suite}, part {wildcards.scatteritem})"
    shell:
        "python -m rcm measure {params.overrides} --samples {input.samples} {params.weights} --out {output} > {log} 2>&1"


rule evaluate_text:
    input:
        measured=parts("measured", "text"),
        prompts="<data>/{media}/prompts/text.jsonl",
    output:
        scores="<results>/{media}/text/{model}.json",
        results="<results>/{media}/text/{model}.results.jsonl",
    log:
        "<logs>/{media}/evaluate-text/{model}.log",
    benchmark:
        "<logs>/benchmarks/evaluate-text/{media}-{model}.tsv"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        cfg=numbers("evaluate", suite="text"),
        code=code("evaluate"),
        overrides=overrides("evaluate", suite="text"),
        given=given,
    message:
        "Score the letters in {wildcards.media} of {wildcards.model}"
    shell:
        "python -m rcm evaluate {params.overrides} {params.given} "
        "--out {output.scores} --results {output.results} > {log} 2>&1"


if by(*OFFICIAL):

    rule arrange_official:
        input:
            parts("samples", "report"),
        output:
            temp(directory("<data>/{media}/official/{model}")),
        log:
            "<logs>/{media}/arrange/{model}.log",
        benchmark:
            "<logs>/benchmarks/arrange/{media}-{model}.tsv"
        threads: 1
        resources:
            mem_mb=2000,
            runtime=480,
        params:
            cfg=numbers("official"),
            code=code("arrange"),
            overrides=overrides("official"),
        message:
            "Lay out {wildcards.media} of {wildcards.model} for the official evaluator"
        shell:
            "python -m rcm arrange {params.overrides} --samples {input} --out {output} > {log} 2>&1"


# The evaluator's own Python is named in full, for that of this project comes first in PATH.
RECORDED = (
    "python -m rcm.cli.external --stage official --inputs {input} --out {output} "
    "--config numbers={params.cfg:q} environment={params.environment} -- "
)


if by("geneval-mmdet"):

    rule known_photographs:
        output:
            directory("<data>/known"),
        log:
            "<logs>/known.log",
        benchmark:
            "<logs>/benchmarks/known.tsv"
        threads: 1
        resources:
            mem_mb=2000,
            runtime=10,
        message:
            "Write the photographs by which a detector is trusted"
        shell:
            "python -m rcm.cli.external --stage known --out {output} -- python -m rcm.evaluation.known --out {output} > {log} 2>&1"

    rule geneval_official:
        input:
            samples=rules.arrange_official.output,
            known=rules.known_photographs.output,
        output:
            f"<results>/{{media}}/official/{SCORER}/{{model}}.jsonl",
        log:
            "<logs>/{media}/official/{model}.log",
        benchmark:
            "<logs>/benchmarks/official/{media}-{model}.tsv"
        conda:
            "../envs/geneval.yaml"
        threads: 4
        resources:
            mem_mb=32000,
            runtime=480,
            gpu=1,
        params:
            cfg=numbers("official"),
            environment=environment("geneval"),
            # free, as `threads` is not compared: `evaluate` decides anew by what is stored
            least=lambda wildcards, threads: FIRST["evaluation"]["known_at_least"],
        message:
            "Let GenEval's own code look at {wildcards.media} of {wildcards.model}"
        shell:
            "{{ "
            + elsewhere("geneval_official", "mmdet")
            + RECORDED
            + '"$CONDA_PREFIX/bin/python" workflow/scripts/geneval_official.py --samples {input.samples} --known {input.known} --known-at-least {params.least} --out {output}; }} > {log} 2>&1'


if by("vbench", "vbench-long"):

    rule vbench_official:
        input:
            samples=rules.arrange_official.output,
            info=fetched("prompts_info"),
        output:
            f"<results>/{{media}}/official/{SCORER}/{{model}}.json",
        log:
            "<logs>/{media}/official/{model}.log",
        benchmark:
            "<logs>/benchmarks/official/{media}-{model}.tsv"
        conda:
            "../envs/vbench.yaml"
        threads: 4
        resources:
            mem_mb=64000,
            runtime=2880,
            gpu=1,
        params:
            cfg=numbers("official"),
            environment=environment("vbench"),
            kept=f"resume/{SCALE}/{{media}}/official-{SCORER}/{{model}}",
            protocol=f"--protocol {SCORER} --still-samples {FIRST['suites']['report'].get('still_samples', 0)}",
            # free, as `threads` is not compared: `evaluate` decides anew
            missing=lambda wildcards, threads: "--allow-missing" if FIRST["evaluation"]["allow_missing"] else "",
        message:
            "Let VBench's own code look at {wildcards.media} of {wildcards.model}"
        shell:
            "{{ "
            + elsewhere("vbench_official", "vbench")
            + RECORDED
            + '"$CONDA_PREFIX/bin/python" workflow/scripts/vbench_official.py --samples {input.samples} --info {input.info} {params.protocol} {params.missing} --kept {params.kept} --out {output}; }} > {log} 2>&1'
