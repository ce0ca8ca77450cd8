# Configuration, paths, batches and the environments of the rules.
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake_interface_executor_plugins.settings import DeploymentMethod

from defectnet.batches import assign
from defectnet.config import parse_config, write_config
from defectnet.errors import DefectnetError
from defectnet.hosts.sheet import read_sheet
from defectnet.layout import FIGURES, RECORD_STAGES, Layout
from defectnet.records import withdraw_stale_manifests
from defectnet.screening import read_dropped

try:
    CONFIG = parse_config(config, ", ".join(map(str, workflow.configfiles)))
    LAYOUT = Layout.of(CONFIG)
    HOSTS = {} if LAYOUT.given_dataset else {host.id: host for host in read_sheet(CONFIG.hosts.sheet)}
    DROPPED = {} if CONFIG.dopants.screened is None else read_dropped(Path(CONFIG.dopants.screened))
    # Under a name of its own content, so that a dry run with other values does not reach jobs that are running.
    CONFIG_FILE = write_config(CONFIG, LAYOUT.configs)
    if workflow.is_main_process:
        for manifest in withdraw_stale_manifests(LAYOUT.results, RECORD_STAGES):
            print(f"{manifest}: names a record that is gone; its batch runs again", file=sys.stderr)
except DefectnetError as error:
    raise WorkflowError(str(error)) from None

# What determines a potential's numbers.
POTENTIAL = CONFIG.potential.model_dump_json(include={"name", "model", "modality", "checkpoint", "dtype"})

# What determines the phonons of a host and of its single defects, and whether anything is built on them.
PHONONS_OF_HOST = {"displacement_A", "displacements", "symprec_A", "unstable_hosts"}
if CONFIG.phonons.unstable_hosts == "skip":
    PHONONS_OF_HOST.add("atoms_min")

MODELS = LAYOUT.models(CONFIG.training)
BATCHES = assign(list(HOSTS.values()), CONFIG)

# Without conda, the main environment is the one that Snakemake runs in, and the configuration names the potential's.
WITH_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
MAIN_ENV = "../../envs/main.yaml"
POTENTIAL_ENV = MAIN_ENV if CONFIG.potential.name == "analytic" else f"../../envs/{CONFIG.potential.name}.yaml"


wildcard_constraints:
    batch="[^/]+",
    preset="|".join(CONFIG.training.presets),
    split="|".join(CONFIG.training.splits),
    repeat=r"\d+",


def final_outputs():
    """Everything that a complete run leaves behind."""
    figures = [LAYOUT.figure(name) for name in FIGURES]
    if LAYOUT.given_dataset:
        return [LAYOUT.metrics, LAYOUT.summary, *figures]
    # Manifests are named here because Snakemake does not miss an intermediate file whose products exist.
    manifests = [path for stage in RECORD_STAGES for path in of_all_batches(stage)]
    return [LAYOUT.dataset, LAYOUT.metrics, LAYOUT.summary, *figures, *manifests]


# Functions of the output are no part of what Snakemake compares to decide on reruns: where an interpreter lies and what
# the configuration file is called changes no result.
def defectnet(wildcards, output):
    """The command in the main environment."""
    return f"{'python' if WITH_CONDA else sys.executable} -m defectnet"


def defectnet_with_potential(wildcards, output):
    """The command in the potential's environment."""
    return f"{'python' if WITH_CONDA else CONFIG.potential.python} -m defectnet"


def config_file(wildcards, output):
    """The effective configuration."""
    return CONFIG_FILE


def limits(wildcards, output, resources):
    """What the profile grants a job: minutes, after which a scheduler ends it, and a number of GPUs to choose one of."""
    granted = {"runtime": "--minutes", "choose_of_gpus": "--gpus"}
    return "".join(f" {option} {resources[name]}" for name, option in granted.items() if name in resources.keys())


def host_rows(wildcards):
    """Digest of the crystals that the sheet gives the hosts of a batch, so that a changed row reruns its batch only."""
    asides = dict.fromkeys(("family", "gap_eV", "source", "reference"))
    text = repr([replace(HOSTS[host_id], **asides) for host_id in BATCHES[wildcards.batch]])
    return hashlib.sha256(text.encode()).hexdigest()


def dopant_settings(wildcards):
    """The block ``dopants`` with what it says of the hosts of a batch only."""
    members = set(BATCHES[wildcards.batch])
    own = {host_id: lists for host_id, lists in CONFIG.dopants.overrides.items() if host_id in members}
    dropped = {host_id: sorted(DROPPED[host_id]) for host_id in sorted(members & set(DROPPED))}
    settings = CONFIG.dopants.model_copy(update={"overrides": own, "screened": None})
    return settings.model_dump_json() + (json.dumps(dropped) if dropped else "")


def structure_files(wildcards):
    """Structure files of the hosts of a batch, where the sheet refers to files."""
    hosts = (HOSTS[host_id] for host_id in BATCHES[wildcards.batch])
    return [str(host.structure) for host in hosts if host.structure is not None]


def of_batch(stage):
    """Path of what a batch makes in a stage, with its wildcard."""
    return LAYOUT.batch(stage, "{batch}")


def of_all_batches(stage):
    """What all batches make in a stage."""
    return [LAYOUT.batch(stage, batch) for batch in BATCHES]


def log_of(rule, *wildcards):
    """Log file of a rule."""
    return LAYOUT.results / "logs" / rule / ("-".join(wildcards) + ".log" if wildcards else f"{rule}.log")


def benchmark_of(rule, *wildcards):
    """Benchmark file of a rule."""
    return LAYOUT.results / "benchmarks" / rule / ("-".join(wildcards) + ".tsv" if wildcards else f"{rule}.tsv")


def pretrained(wildcards):
    """The checkpoint that a network starts from, if any."""
    return CONFIG.training.pretrained if wildcards.preset == "finetuned" else []
