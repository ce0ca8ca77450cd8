# DefectNet on splits by host (the honest one) and by row (which shows how much leaking hosts flatters).
MODEL = LAYOUT.model("{split}", "{repeat}")


rule train:
    input:
        dataset=LAYOUT.dataset,
    output:
        checkpoint=MODEL / "checkpoint.pt",
        history=MODEL / "history.csv",
        split=MODEL / "split.json",
    log:
        log_of("train", "{split}", "{repeat}"),
    benchmark:
        benchmark_of("train", "{split}", "{repeat}")
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        config=config_file,
        limits=limits,
        seed=CONFIG.run.seed,
        settings=CONFIG.training.model_dump_json(exclude={"splits", "repeats"}),
    message:
        "Train DefectNet, split by {wildcards.split}, repeat {wildcards.repeat}"
    shell:
        "{params.defectnet} train --config {params.config} --split {wildcards.split} --repeat {wildcards.repeat}"
        "{params.limits} > {log} 2>&1"


rule evaluate:
    input:
        dataset=LAYOUT.dataset,
        models=[model / "checkpoint.pt" for model in MODELS],
    output:
        metrics=report(LAYOUT.metrics, category="Results", caption="../report/metrics.rst"),
        predictions=LAYOUT.predictions,
    log:
        log_of("evaluate"),
    benchmark:
        benchmark_of("evaluate")
    conda:
        MAIN_ENV
    params:
        defectnet=defectnet,
        config=config_file,
    message:
        "Score networks and baselines on held-out spectra"
    shell:
        "{params.defectnet} evaluate --config {params.config} > {log} 2>&1"
