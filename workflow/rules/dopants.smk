# Which elements may replace which, per host.
rule dopants:
    input:
        structures=structure_files,
    output:
        of_batch("dopants"),
    log:
        log_of("dopants", "{batch}"),
    benchmark:
        benchmark_of("dopants", "{batch}")
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        config=config_file,
        hosts=host_rows,
        vocabulary=CONFIG.hosts.vocabulary,
        settings=dopant_settings,
    message:
        "Recommend dopants for {wildcards.batch}"
    shell:
        "{params.defectnet} dopants --config {params.config} --batch {wildcards.batch} > {log} 2>&1"
