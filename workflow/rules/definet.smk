# `snakemake definet`: a network that relaxes doped cells in one step, learned from all relaxations of this run and scored
# on what it has not seen. Nothing here depends on it; other runs start from it by relaxation.definet.
localrules:
    definet,


rule definet:
    input:
        LAYOUT.definet / "metrics.json",


rule definet_collect:
    input:
        of_all_batches("supercells"),
        of_all_batches("library"),
        of_all_batches("relax"),
        [] if CONFIG.needs_hosts_phonons else of_all_batches("phonons"),
    output:
        LAYOUT.definet / "relaxations.h5",
    log:
        log_of("definet_collect"),
    benchmark:
        benchmark_of("definet_collect")
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        config=config_file,
    message:
        "Put all relaxations into one file"
    shell:
        "{params.defectnet} definet collect --config {params.config} --output {output} > {log} 2>&1"


rule definet_train:
    input:
        LAYOUT.definet / "relaxations.h5",
    output:
        checkpoint=LAYOUT.definet / "checkpoint.pt",
        history=LAYOUT.definet / "history.csv",
    log:
        log_of("definet_train"),
    benchmark:
        benchmark_of("definet_train")
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        limits=limits,
        folder=LAYOUT.definet,
    message:
        "Train a network on the relaxations"
    shell:
        "{params.defectnet} definet train --relaxations {input} --output {params.folder}{params.limits} > {log} 2>&1"


rule definet_count_forces:
    input:
        LAYOUT.definet / "relaxations.h5",
        checkpoint=LAYOUT.definet / "checkpoint.pt",
    output:
        LAYOUT.definet / "force_calls.csv",
    log:
        log_of("definet_count_forces"),
    benchmark:
        benchmark_of("definet_count_forces")
    conda:
        POTENTIAL_ENV
    params:
        defectnet=defectnet_with_potential,
        config=config_file,
        limits=limits,
    message:
        "Count the force calls that the network saves"
    shell:
        "{params.defectnet} definet count-forces {input.checkpoint} --config {params.config} --output {output}"
        "{params.limits} > {log} 2>&1"


rule definet_evaluate:
    input:
        relaxations=LAYOUT.definet / "relaxations.h5",
        checkpoint=LAYOUT.definet / "checkpoint.pt",
        force_calls=LAYOUT.definet / "force_calls.csv",
    output:
        LAYOUT.definet / "metrics.json",
    log:
        log_of("definet_evaluate"),
    benchmark:
        benchmark_of("definet_evaluate")
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
    message:
        "Score the network on relaxations that it has not seen"
    shell:
        "{params.defectnet} definet evaluate {input.checkpoint} --relaxations {input.relaxations}"
        " --force-calls {input.force_calls} --output {output} > {log} 2>&1"
