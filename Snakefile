# Dopants and their concentrations from phonon spectra: hosts -> dopants -> supercells -> relaxation -> phonons
# -> dataset -> training -> report. One rule, one command of `defectnet`, one module of the same name.
from snakemake.utils import min_version

min_version("9.27")

# Two configuration files would be merged, and values of the demo would leak into other runs.
if not workflow.config_settings.configfiles:

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"


# A dataset that is given needs neither hosts nor potential.
if not LAYOUT.given_dataset:

    include: "workflow/rules/plan.smk"
    include: "workflow/rules/dopants.smk"
    include: "workflow/rules/supercells.smk"
    include: "workflow/rules/library.smk"
    include: "workflow/rules/relax.smk"
    include: "workflow/rules/phonons.smk"
    include: "workflow/rules/superpose.smk"
    include: "workflow/rules/dataset.smk"
    include: "workflow/rules/definet.smk"


if not LAYOUT.given_models:

    include: "workflow/rules/train.smk"


include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


# Find everything that is wrong before anything expensive starts. Not a rule: whatever depended on it would run
# again with it.
onstart:
    if set(workflow.dag_settings.targets) != {"plan"}:
        shell(
            "{sys.executable} -m defectnet check --config {CONFIG_FILE}" + (" --no-potential" if WITH_CONDA else "")
        )


localrules:
    all,


rule all:
    default_target: True
    input:
        final_outputs(),
