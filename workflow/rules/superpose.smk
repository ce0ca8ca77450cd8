# Superposed against direct spectra of every host, and as many superposed ones as training can use; where superposition
# is poor, supercells are relaxed and probed instead, hence the potential's environment.
rule superpose:
    input:
        supercells=of_batch("supercells"),
        library=of_batch("library"),
        relaxed=of_batch("relax"),
        phonons=of_batch("phonons"),
    output:
        of_batch("superposed"),
    log:
        log_of("superpose", "{batch}"),
    benchmark:
        benchmark_of("superpose", "{batch}")
    conda:
        POTENTIAL_ENV
    params:
        defectnet=defectnet_with_potential,
        config=config_file,
        limits=limits,
        seed=CONFIG.run.seed,
        settings=CONFIG.superposition.model_dump_json(exclude={"tolerance_eV_per_A2"}),
        spectra=CONFIG.spectra.model_dump_json(exclude={"weighting"}),
    message:
        "Superposed spectra of {wildcards.batch}"
    shell:
        "{params.defectnet} superpose --config {params.config} --batch {wildcards.batch}{params.limits} > {log} 2>&1"
