# Tables, figures and the report. `snakemake -c2 NAME` makes one of them.
rule table1:
    input:
        scores=lambda _: scores("images"),
        controls=lambda _: scores("images", "controls"),
        published="config/published/table1.csv",
    output:
        csv=told("<results>/tables/table1.csv", "Tables"),
        md=told("<results>/tables/table1.md", "Tables"),
        tex=told("<results>/tables/table1.tex", "Tables"),
    log:
        "<logs>/table1.log",
    benchmark:
        "<logs>/benchmarks/table/table1.tsv"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        cfg=numbers("table", media="images"),
        code=code("table"),
        overrides=overrides("table", media="images"),
        given=given,
        folder=lambda wildcards, output: os.path.dirname(output.csv),
        caption=caption,
    message:
        "Make table 1: images"
    shell:
        "python -m rcm table {params.overrides} --name table1 {params.given} --out-dir {params.folder} > {log} 2>&1"


rule table2:
    input:
        scores=lambda _: scores("clips"),
        controls=lambda _: scores("clips", "controls"),
        throughput=lambda _: throughputs("clips"),
        published="config/published/table2.csv",
    output:
        csv=told("<results>/tables/table2.csv", "Tables"),
        md=told("<results>/tables/table2.md", "Tables"),
        tex=told("<results>/tables/table2.tex", "Tables"),
    log:
        "<logs>/table2.log",
    benchmark:
        "<logs>/benchmarks/table/table2.tsv"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        cfg=numbers("table", media="clips"),
        code=code("table"),
        overrides=overrides("table", media="clips"),
        given=given,
        folder=lambda wildcards, output: os.path.dirname(output.csv),
        caption=caption,
    message:
        "Make table 2: clips"
    shell:
        "python -m rcm table {params.overrides} --name table2 {params.given} --out-dir {params.folder} > {log} 2>&1"


# The paper's own rows: its network is not part of this project.
rule table3:
    input:
        published="config/published/table3.csv",
    output:
        csv=told("<results>/tables/table3.csv", "Tables"),
        md=told("<results>/tables/table3.md", "Tables"),
        tex=told("<results>/tables/table3.tex", "Tables"),
    log:
        "<logs>/table3.log",
    benchmark:
        "<logs>/benchmarks/table/table3.tsv"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        code=code("table"),
        overrides=overrides("table"),
        folder=lambda wildcards, output: os.path.dirname(output.csv),
        caption=caption,
    message:
        "Make table 3: the paper's rows"
    shell:
        "python -m rcm table {params.overrides} --name table3 --published {input.published} --out-dir {params.folder} "
        "> {log} 2>&1"


if BIG:

    rule table_text:
        input:
            scores=lambda _: texts_read(MEDIA[0]),
        output:
            csv=told("<results>/tables/table_text.csv", "Tables"),
            md=told("<results>/tables/table_text.md", "Tables"),
            tex=told("<results>/tables/table_text.tex", "Tables"),
        log:
            "<logs>/table_text.log",
        benchmark:
            "<logs>/benchmarks/table/table_text.tsv"
        threads: 1
        resources:
            mem_mb=500,
            runtime=10,
        params:
            cfg=numbers("table"),
            code=code("table"),
            overrides=overrides("table"),
            given=given,
            folder=lambda wildcards, output: os.path.dirname(output.csv),
            caption=caption,
        message:
            "Make the table of small text"
        shell:
            "python -m rcm table {params.overrides} --name table_text {params.given} --out-dir {params.folder} > {log} 2>&1"


rule figure_samples:
    input:
        lambda _: samples("images"),
    output:
        told("<results>/figures/figure_samples.png", "Figures"),
    log:
        "<logs>/figure_samples.log",
    benchmark:
        "<logs>/benchmarks/figure/figure_samples.tsv"
    threads: 1
    resources:
        mem_mb=800,
        runtime=10,
    params:
        code=code("figure"),
        caption=caption,
    message:
        "Draw samples of teacher and students from the same noise"
    shell:
        "python -m rcm figure --name figure_samples --inputs {input} --out {output} > {log} 2>&1"


rule figure_clips:
    input:
        lambda _: samples("clips"),
    output:
        told("<results>/figures/figure_clips.png", "Figures"),
    log:
        "<logs>/figure_clips.log",
    benchmark:
        "<logs>/benchmarks/figure/figure_clips.tsv"
    threads: 1
    resources:
        mem_mb=800,
        runtime=10,
    params:
        code=code("figure"),
        caption=caption,
    message:
        "Draw clips of teacher and students from the same noise, frame by frame"
    shell:
        "python -m rcm figure --name figure_clips --inputs {input} --out {output} > {log} 2>&1"


rule figure_quality_diversity:
    input:
        lambda _: [*scores(MEDIA[0]), *scores(MEDIA[0], "controls")],
    output:
        told("<results>/figures/figure_quality_diversity.png", "Figures"),
    log:
        "<logs>/figure_quality_diversity.log",
    benchmark:
        "<logs>/benchmarks/figure/figure_quality_diversity.tsv"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        code=code("figure"),
        caption=caption,
    message:
        "Draw quality against diversity"
    shell:
        "python -m rcm figure --name figure_quality_diversity --inputs {input} --out {output} > {log} 2>&1"


rule figure_training:
    input:
        lambda _: [f"<data>/{MEDIA[0]}/{student}/metrics.jsonl" for student in students(MEDIA[0])],
    output:
        told("<results>/figures/figure_training.png", "Figures"),
    log:
        "<logs>/figure_training.log",
    benchmark:
        "<logs>/benchmarks/figure/figure_training.tsv"
    threads: 1
    resources:
        mem_mb=800,
        runtime=10,
    params:
        code=code("figure"),
        caption=caption,
    message:
        "Draw the training of the students"
    shell:
        "python -m rcm figure --name figure_training --inputs {input} --out {output} > {log} 2>&1"


rule figure_precision:
    input:
        lambda _: precisions(),
    output:
        told("<results>/figures/figure_precision.png", "Figures"),
    log:
        "<logs>/figure_precision.log",
    benchmark:
        "<logs>/benchmarks/figure/figure_precision.tsv"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        code=code("figure"),
        caption=caption,
    message:
        "Draw the rounding errors of the network and of its tangent"
    shell:
        "python -m rcm figure --name figure_precision --inputs {input} --out {output} > {log} 2>&1"


rule figure_steps:
    input:
        inputs=lambda _: scores(MEDIA[0]),
        published=f"config/published/{'table1' if MEDIA[0] == 'images' else 'table2'}.csv" if BIG else [],
    output:
        told("<results>/figures/figure_steps.png", "Figures"),
    log:
        "<logs>/figure_steps.log",
    benchmark:
        "<logs>/benchmarks/figure/figure_steps.tsv"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        code=code("figure"),
        caption=caption,
        given=given,
    message:
        "Draw quality against the number of steps"
    shell:
        "python -m rcm figure --name figure_steps {params.given} --out {output} > {log} 2>&1"


# The ablations train students of their own, so none of them is part of the default target.
rule figure_lambda:
    input:
        inputs=lambda _: ablation(
            *("scm", "rcm-lambda-0.1", "rcm", "rcm-lambda-10", "rcm-lambda-100"), steps=[most_steps()]
        ),
        published="config/published/figure7.csv",
    output:
        told("<results>/figures/figure_lambda.png", "Figures"),
    log:
        "<logs>/figure_lambda.log",
    benchmark:
        "<logs>/benchmarks/figure/figure_lambda.tsv"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        code=code("figure"),
        caption=caption,
        given=given,
    message:
        "Draw quality and diversity against the weight of DMD"
    shell:
        "python -m rcm figure --name figure_lambda {params.given} --out {output} > {log} 2>&1"


rule figure_rollout:
    input:
        lambda _: ablation("rcm", "rcm-fixed-rollout", "dmd", "dmd-random-rollout", steps=config["steps"]),
    output:
        told("<results>/figures/figure_rollout.png", "Figures"),
    log:
        "<logs>/figure_rollout.log",
    benchmark:
        "<logs>/benchmarks/figure/figure_rollout.tsv"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        code=code("figure"),
        caption=caption,
    message:
        "Draw what fixed and random times of rollouts do"
    shell:
        "python -m rcm figure --name figure_rollout --inputs {input} --out {output} > {log} 2>&1"


rule report:
    input:
        scores=lambda _: [  # of the media whose tables are built
            path
            for media, table in (("images", "table1"), ("clips", "table2"))
            if table in config["tables"]
            for path in [*scores(media), *scores(media, "controls")]
        ],
        tables=expand("<results>/tables/{table}.csv", table=config["tables"]),
        figures=expand("<results>/figures/{figure}.png", figure=config["figures"]),
        clips=lambda _: samples("clips") if "table2" in config["tables"] else [],
        # of a scale whose samples are not scored
        samples=lambda _: [path for media in MEDIA if not config["tables"] for path in samples(media)],
    output:
        told("<results>/report.html", "Page"),
    log:
        "<logs>/report.log",
    benchmark:
        "<logs>/benchmarks/report/report.tsv"
    threads: 1
    resources:
        mem_mb=800,
        runtime=10,
    params:
        cfg=lambda wildcards: [numbers("report", media=media)(wildcards) for media in MEDIA],
        code=code("report"),
        shown=[
            yaml.safe_load(path.read_text()) for path in (config_dir() / "pipeline.yaml", OF_SCALE) if path.is_file()
        ],
        overrides=overrides("report"),
        scores=lambda _, input: f"--scores {input.scores}" if input.scores else "",
        folders=[f"results/{SCALE}", f"data/{SCALE}", f"logs/{SCALE}"],
    message:
        "Write the report {output}"
    shell:
        "python -m rcm report {params.overrides} {params.scores} --results {params.folders} --out {output} > {log} 2>&1"


rule pretrain:
    input:
        expand(rules.pretrain_teacher.output, media=MEDIA),
