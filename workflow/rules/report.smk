# Figures as PNG (in the report) and SVG. The report itself is made by `snakemake --report`, see the Makefile.
rule figures:
    input:
        dataset=LAYOUT.dataset,
        metrics=LAYOUT.metrics,
        predictions=LAYOUT.predictions,
        histories=[model / "history.csv" for model in LAYOUT.models(CONFIG.training.repeats)],
    output:
        [
            report(LAYOUT.figure(name), category="Figures", caption=f"../report/{name}.rst", labels={"figure": name})
            for name in FIGURES
        ],
        svg=[LAYOUT.figure(name, "svg") for name in FIGURES],
    log:
        log_of("figures"),
    benchmark:
        benchmark_of("figures")
    message:
        "Draw the figures"
    shell:
        "{PYTHON} -m defectnet figures --config {CONFIG_FILE} > {log} 2>&1"
