# Single defects of every host in the potential's environment, from which relaxations start and spectra are superposed.
rule library:
    input:
        supercells=of_batch("supercells"),
        checkpoint=CONFIG.potential.checkpoint or [],
    output:
        of_batch("library"),
    log:
        log_of("library", "{batch}"),
    benchmark:
        benchmark_of("library", "{batch}")
    conda:
        POTENTIAL_ENV
    params:
        defectnet=defectnet_with_potential,
        config=config_file,
        limits=limits,
        needed=CONFIG.needs_library,
        potential=POTENTIAL,
        relaxation=CONFIG.relaxation.model_dump_json(exclude={"doped_cell", "start", "definet"}),
        phonons=CONFIG.phonons.model_dump_json(include=PHONONS_OF_HOST),
        superposition=CONFIG.superposition.model_dump_json(
            include={"tolerance_eV_per_A2", "displacement_max_A", "force_constants"}
        ),
    message:
        "Single defects of {wildcards.batch} with {CONFIG.potential.name} {CONFIG.potential.model}"
    shell:
        "{params.defectnet} library --config {params.config} --batch {wildcards.batch}{params.limits} > {log} 2>&1"
