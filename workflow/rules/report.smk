# Figures as PNG (in the report) and SVG. The report itself is made by `snakemake --report`, see the Makefile.
rule figures:
    input:
        dataset=LAYOUT.dataset,
        metrics=LAYOUT.metrics,
        predictions=LAYOUT.predictions,
        histories=[model / "history.csv" for model in MODELS],
    output:
        [
            report(LAYOUT.figure(name), category="Figures", caption=f"../report/{name}.rst", labels={"figure": name})
            for name in FIGURES
        ],
        svg=[LAYOUT.figure(name, "svg") for name in FIGURES],
        summary=report(LAYOUT.summary, category="Results", caption="../report/summary.rst"),
    log:
        log_of("figures"),
    benchmark:
        benchmark_of("figures")
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        config=config_file,
    message:
        "Draw the figures"
    shell:
        "{params.defectnet} figures --config {params.config} > {log} 2>&1"
