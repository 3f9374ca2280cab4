# Checkpoints: fetched and verified, or trained from nothing; then in DCP, the format of training.
rule download_transformer:
    output:
        "<data>/{media}/checkpoints/transformer.pth",
    log:
        "<logs>/{media}/download.log",
    benchmark:
        "<logs>/benchmarks/download-transformer/{media}.tsv"
    threads: 1
    resources:
        mem_mb=500,
        runtime=30,
    params:
        cfg=numbers("download transformer"),
        code=lambda _: code_digest("download"),
        overrides=overrides("download transformer"),
    message:
        "Fetch the teacher of {wildcards.media} and verify its SHA-256"
    shell:
        "python -m rcm download {params.overrides} --name transformer --out {output} > {log} 2>&1"


rule download_codec:
    output:
        "<data>/checkpoints/codec.pth",
    log:
        "<logs>/download-codec.log",
    benchmark:
        "<logs>/benchmarks/download-codec/codec.tsv"
    threads: 1
    resources:
        mem_mb=500,
        runtime=30,
    params:
        cfg=numbers("download codec"),
        code=lambda _: code_digest("download"),
        overrides=overrides("download codec"),
    message:
        "Fetch the codec and verify its SHA-256"
    shell:
        "python -m rcm download {params.overrides} --name codec --out {output} > {log} 2>&1"


rule convert:
    input:
        rules.download_transformer.output,
    output:
        directory("<data>/{media}/teacher"),
    log:
        "<logs>/{media}/convert.log",
    benchmark:
        "<logs>/benchmarks/convert/{media}.tsv"
    threads: 1
    resources:
        mem_mb=800,
        runtime=30,
    params:
        cfg=numbers("convert"),
        code=lambda _: code_digest("convert"),
        overrides=overrides("convert"),
    message:
        "Convert the teacher of {wildcards.media} to DCP"
    shell:
        "python -m rcm convert {params.overrides} --checkpoint {input} --out {output} > {log} 2>&1"


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
        code=lambda _: code_digest("pretrain"),
        overrides=overrides("pretrain"),
        codec=lambda wildcards, input: f"--codec {input}" if input else "",
        resume=f"resume/{SCALE}/{{media}}/pretrain",
    message:
        "Train the teacher of {wildcards.media}; to watch: tail -f {log}"
    shell:
        "python -m rcm pretrain {params.overrides} {params.codec} --resume {params.resume} "
        "--out {output.transformer} --codec-out {output.codec} > {log} 2>&1"
