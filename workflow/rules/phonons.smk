# Phonon modes of everything that is relaxed, in the potential's environment.
rule phonons:
    input:
        supercells=of_batch("supercells"),
        library=of_batch("library"),
        relaxed=of_batch("relax"),
    output:
        of_batch("phonons"),
    log:
        log_of("phonons", "{batch}"),
    benchmark:
        benchmark_of("phonons", "{batch}")
    conda:
        POTENTIAL_ENV
    params:
        defectnet=defectnet_with_potential,
        config=config_file,
        limits=limits,
        settings=CONFIG.phonons.model_dump_json(),
    message:
        "Phonons of {wildcards.batch} with {CONFIG.potential.name} {CONFIG.potential.model}"
    shell:
        "{params.defectnet} phonons --config {params.config} --batch {wildcards.batch}{params.limits} > {log} 2>&1"
