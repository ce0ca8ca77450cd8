# Supercells and which of their atoms are replaced, per host.
rule supercells:
    input:
        dopants=of_batch("dopants"),
    output:
        of_batch("supercells"),
    log:
        log_of("supercells", "{batch}"),
    benchmark:
        benchmark_of("supercells", "{batch}")
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        config=config_file,
        seed=CONFIG.run.seed,
        settings=CONFIG.supercells.model_dump_json(),
    message:
        "Plan supercells of {wildcards.batch}"
    shell:
        "{params.defectnet} supercells --config {params.config} --batch {wildcards.batch} > {log} 2>&1"
