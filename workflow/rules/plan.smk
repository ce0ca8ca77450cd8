# `snakemake plan`: what is left to do and what it will take. Nothing depends on it and it makes nothing.
localrules:
    plan,


rule plan:
    log:
        log_of("plan"),
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        config=config_file,
    message:
        "Say what is left to do and what it will take"
    shell:
        "{params.defectnet} plan --config {params.config} 2>&1 | tee {log}"
