# Find everything that is wrong before anything expensive starts; write the effective configuration.
localrules:
    check,


rule check:
    input:
        sheet=CONFIG.hosts.sheet,
    output:
        LAYOUT.config,
    log:
        log_of("check"),
    benchmark:
        benchmark_of("check")
    params:
        config=CONFIG.model_dump_json(),
    message:
        "Check configuration, host sheet and potential"
    shell:
        "{PYTHON} -m defectnet check --json {params.config:q} > {log} 2>&1"
