# Relax hosts and doped supercells in the potential's environment. The manifest is what Snakemake tracks; the records
# it names outlive failed and killed jobs.
rule relax:
    input:
        supercells=of_batch("supercells"),
        library=of_batch("library"),
        checkpoint=CONFIG.potential.checkpoint or [],
        definet=CONFIG.relaxation.definet if CONFIG.relaxation.start == "definet" else [],
    output:
        of_batch("relax"),
    log:
        log_of("relax", "{batch}"),
    benchmark:
        benchmark_of("relax", "{batch}")
    conda:
        POTENTIAL_ENV
    params:
        defectnet=defectnet_with_potential,
        config=config_file,
        limits=limits,
        potential=POTENTIAL,
        settings=CONFIG.relaxation.model_dump_json(exclude={"definet"}),
    message:
        "Relax {wildcards.batch} with {CONFIG.potential.name} {CONFIG.potential.model}"
    shell:
        "{params.defectnet} relax --config {params.config} --batch {wildcards.batch}{params.limits} > {log} 2>&1"
