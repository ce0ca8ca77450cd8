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
    params:
        hosts=host_rows,
        vocabulary=CONFIG.hosts.vocabulary,
        settings=CONFIG.dopants.model_dump_json(),
    message:
        "Recommend dopants for {wildcards.batch}"
    shell:
        "{PYTHON} -m defectnet dopants --config {CONFIG_FILE} --batch {wildcards.batch} > {log} 2>&1"
