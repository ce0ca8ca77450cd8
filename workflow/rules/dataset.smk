# All finished spectra in one file, and a table of what is missing and why.
rule dataset:
    input:
        supercells=of_all_batches("supercells"),
        library=of_all_batches("library"),
        phonons=of_all_batches("phonons"),
        superposed=of_all_batches("superposed"),
    output:
        dataset=LAYOUT.dataset,
        missing=LAYOUT.missing,
    log:
        log_of("dataset"),
    benchmark:
        benchmark_of("dataset")
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        config=config_file,
        settings=CONFIG.spectra.model_dump_json(),
    message:
        "Collect the spectra of {CONFIG.run.name}"
    shell:
        "{params.defectnet} dataset --config {params.config} > {log} 2>&1"
