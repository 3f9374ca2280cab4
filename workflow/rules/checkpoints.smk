# Checkpoints and prompt files: fetched and verified; networks then in DCP, the format of training.
for NAME in CHECKPOINTS:

    rule:
        name:
            f"download_{NAME}"
        input:
            source(NAME),
        output:
            directory(fetched(NAME)) if several(CHECKPOINTS[NAME]) else fetched(NAME),
        log:
            of_medium("<logs>/download/{}.log", NAME),
        benchmark:
            of_medium("<logs>/benchmarks/download/{}.tsv", NAME)
        threads: 1
        resources:
            mem_mb=sized(500, 2000),
            runtime=sized(30, 720),
        params:
            cfg=numbers("download", name=NAME),
            # no `code`: what comes is known by its hash, whatever brought it
            overrides=overrides("download"),
            name=NAME,
        message:
            f"Fetch {NAME} and verify it"
        shell:
            "python -m rcm download {params.overrides} --name {params.name} --out {output} > {log} 2>&1"


# The teacher of the distillation, and that of the data where it is another one.
for ROLE, NAME, FOLDER in (("network", "transformer", "teacher"), ("synthesizer", "synthesizer", "synthesizer")):
    if NAME in CHECKPOINTS:

        rule:
            name:
                "convert" if ROLE == "network" else "convert_synthesizer"
            input:
                fetched(NAME),
            output:
                directory(f"<data>/{{media}}/{FOLDER}"),
            log:
                f"<logs>/{{media}}/convert-{FOLDER}.log",
            benchmark:
                f"<logs>/benchmarks/convert-{FOLDER}/{{media}}.tsv"
            threads: 1
            resources:
                mem_mb=sized(800, 24000),
                runtime=sized(30, 240),
            params:
                cfg=numbers("convert", role=ROLE),
                code=code("convert"),
                overrides=overrides("convert"),
                network=f"--network {ROLE}",
            message:
                f"Convert the {FOLDER} of {{wildcards.media}} to DCP"
            shell:
                "python -m rcm convert {params.overrides} {params.network} --checkpoint {input} --out {output} > {log} 2>&1"


# Not part of the default target: what is shipped under assets/ came from here. Clips share the codec of images.
rule pretrain_teacher:
    input:
        branch(
            lambda wildcards: wildcards.media == "clips",
            then="<data>/images/pretrain/codec.pth",
            otherwise=[],
        ),
    output:
        transformer="<data>/{media}/pretrain/transformer.pth",
        codec="<data>/{media}/pretrain/codec.pth",
    log:
        "<logs>/{media}/pretrain.log",
    benchmark:
        "<logs>/benchmarks/pretrain/{media}.tsv"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=300,
    params:
        cfg=numbers("pretrain"),
        code=code("pretrain"),
        overrides=overrides("pretrain"),
        codec=lambda wildcards, input: f"--codec {input}" if input else "",
        resume=f"resume/{SCALE}/{{media}}/pretrain",
    message:
        "Train the teacher of {wildcards.media}; to watch: tail -f {log}"
    shell:
        "python -m rcm pretrain {params.overrides} {params.codec} --resume {params.resume} "
        "--out {output.transformer} --codec-out {output.codec} > {log} 2>&1"
