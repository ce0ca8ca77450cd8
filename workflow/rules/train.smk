# Networks on splits by host (the honest one), by row (which shows how much leaking hosts flatters) and others.
RUN = ("{preset}", "{split}", "{repeat}")
MODEL = LAYOUT.model(*RUN)


rule train:
    input:
        dataset=LAYOUT.dataset,
        pretrained=pretrained,
    output:
        checkpoint=MODEL / "checkpoint.pt",
        history=MODEL / "history.csv",
        split=MODEL / "split.json",
    log:
        log_of("train", *RUN),
    benchmark:
        benchmark_of("train", *RUN)
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        config=config_file,
        limits=limits,
        seed=CONFIG.run.seed,
        settings=lambda wildcards: json.dumps(CONFIG.training.of_preset(wildcards.preset)),
    message:
        "Train network {wildcards.preset}, split by {wildcards.split}, repeat {wildcards.repeat}"
    shell:
        "{params.defectnet} train --config {params.config} --preset {wildcards.preset} --split {wildcards.split}"
        " --repeat {wildcards.repeat}{params.limits} > {log} 2>&1"
