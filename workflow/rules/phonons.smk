# Phonon modes of everything that is relaxed, in the potential's environment.
rule phonons:
    input:
        supercells=of_batch("supercells"),
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
        settings=CONFIG.phonons.model_dump_json(),
    message:
        "Phonons of {wildcards.batch} with {CONFIG.potential.name} {CONFIG.potential.model}"
    shell:
        "{POTENTIAL_PYTHON} -m defectnet phonons --config {CONFIG_FILE} --batch {wildcards.batch} > {log} 2>&1"
