# Tables, figures and the report. `snakemake -c2 NAME` makes one of them.
rule table1:
    input:
        scores=lambda _: scores("images"),
        controls=lambda _: scores("images", "controls"),
        published="config/published/table1.csv",
    output:
        csv="<results>/tables/table1.csv",
        md="<results>/tables/table1.md",
        tex="<results>/tables/table1.tex",
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
        folder=lambda wildcards, output: os.path.dirname(output.csv),
    message:
        "Make table 1: images"
    shell:
        "python -m rcm table {params.overrides} --name table1 --scores {input.scores} --controls {input.controls} "
        "--published {input.published} --out-dir {params.folder} > {log} 2>&1"


rule table2:
    input:
        scores=lambda _: scores("clips"),
        controls=lambda _: scores("clips", "controls"),
        published="config/published/table2.csv",
    output:
        csv="<results>/tables/table2.csv",
        md="<results>/tables/table2.md",
        tex="<results>/tables/table2.tex",
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
        folder=lambda wildcards, output: os.path.dirname(output.csv),
    message:
        "Make table 2: clips"
    shell:
        "python -m rcm table {params.overrides} --name table2 --scores {input.scores} --controls {input.controls} "
        "--published {input.published} --out-dir {params.folder} > {log} 2>&1"


rule figure_samples:
    input:
        lambda _: samples("images"),
    output:
        "<results>/figures/figure_samples.png",
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
    message:
        "Draw samples of teacher and students from the same noise"
    shell:
        "python -m rcm figure --name figure_samples --inputs {input} --out {output} > {log} 2>&1"


rule figure_clips:
    input:
        lambda _: samples("clips"),
    output:
        "<results>/figures/figure_clips.png",
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
    message:
        "Draw clips of teacher and students from the same noise, frame by frame"
    shell:
        "python -m rcm figure --name figure_clips --inputs {input} --out {output} > {log} 2>&1"


rule figure_quality_diversity:
    input:
        lambda _: [*scores("images"), *scores("images", "controls")],
    output:
        "<results>/figures/figure_quality_diversity.png",
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
    message:
        "Draw quality against diversity"
    shell:
        "python -m rcm figure --name figure_quality_diversity --inputs {input} --out {output} > {log} 2>&1"


rule figure_training:
    input:
        lambda _: [f"<data>/{MEDIA[0]}/{student}/metrics.jsonl" for student in students(MEDIA[0])],
    output:
        "<results>/figures/figure_training.png",
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
    message:
        "Draw the training of the students"
    shell:
        "python -m rcm figure --name figure_training --inputs {input} --out {output} > {log} 2>&1"


rule figure_precision:
    input:
        lambda _: precisions(),
    output:
        "<results>/figures/figure_precision.png",
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
    message:
        "Draw the rounding errors of the network and of its tangent"
    shell:
        "python -m rcm figure --name figure_precision --inputs {input} --out {output} > {log} 2>&1"


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
        # of a scale whose samples are not scored here
        samples=lambda _: [path for media in MEDIA if BIG for path in samples(media)],
    output:
        "<results>/report.html",
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
        overrides=shlex.join([f"experiment={SCALE}-{MEDIA[0]}", *config["overrides"]]),
        scores=lambda _, input: f"--scores {input.scores}" if input.scores else "",
        folders=[f"results/{SCALE}", f"data/{SCALE}", f"logs/{SCALE}"],
    message:
        "Write the report {output}"
    shell:
        "python -m rcm report {params.overrides} {params.scores} --results {params.folders} --out {output} > {log} 2>&1"


rule pretrain:
    input:
        expand(rules.pretrain_teacher.output, media=MEDIA),
