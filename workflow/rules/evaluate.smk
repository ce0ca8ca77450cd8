# Networks and baselines by one protocol on what training has not seen.
rule evaluate:
    input:
        dataset=LAYOUT.dataset,
        models=[model / "checkpoint.pt" for model in MODELS],
        other_potential=LAYOUT.other_potential or [],
    output:
        metrics=report(LAYOUT.metrics, category="Results", caption="../report/metrics.rst"),
        predictions=LAYOUT.predictions,
    log:
        log_of("evaluate"),
    benchmark:
        benchmark_of("evaluate")
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        config=config_file,
    message:
        "Score networks and baselines on held-out spectra"
    shell:
        "{params.defectnet} evaluate --config {params.config} > {log} 2>&1"
