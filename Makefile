# make demo | evaluate | test | lint | format. Environments live in .venvs/, one for the workflow and one per potential.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
MAIN := .venvs/main/bin
# The demo's potential. `make envs test-potentials POTENTIALS="mace mattersim chgnet"` for the others.
POTENTIALS := sevennet
ALL_POTENTIALS := sevennet mace mattersim chgnet
RESULTS := results/demo
EVALUATED := results/evaluate

.PHONY: demo evaluate envs test test-unit test-workflow test-potentials test-slurm lint format config bench lock clean

# flock instead of Snakemake's lock: the kernel lifts it when a run is killed, once the last job of it has ended.
demo: envs
	@mkdir -p $(RESULTS)
	flock $(RESULTS)/.lock $(MAIN)/snakemake --nolock --configfile config/config.yaml
	@$(MAKE) --no-print-directory $(RESULTS)/report.html

# Snakemake writes its report outside the workflow, from the workflow's results.
$(RESULTS)/report.html: $(RESULTS)/metrics.json $(RESULTS)/figures/spectra.png
	$(MAIN)/snakemake --configfile config/config.yaml --report $@
	@echo "Done: $(RESULTS)/dataset.h5, $(RESULTS)/models/, $(RESULTS)/metrics.json, $@"

# Scores and figures of the networks in data/reference, from the dataset there; no potential is needed.
evaluate: .venvs/main/.installed
	@mkdir -p $(EVALUATED)
	flock $(EVALUATED)/.lock $(MAIN)/snakemake --nolock --configfile config/evaluate.yaml
	@$(MAKE) --no-print-directory $(EVALUATED)/report.html

$(EVALUATED)/report.html: $(EVALUATED)/metrics.json $(EVALUATED)/figures/spectra.png
	$(MAIN)/snakemake --configfile config/evaluate.yaml --report $@
	@echo "Done: $(EVALUATED)/metrics.json, $@"

envs: .venvs/main/.installed $(POTENTIALS:%=.venvs/%/.installed)

# torch first and pinned, or another package pulls a build of several gigabytes.
.venvs/%/.installed: envs/%.txt pyproject.toml
	@echo "Setting up .venvs/$* (a few minutes the first time)"
	$(PYTHON) -m venv --clear .venvs/$*
	.venvs/$*/bin/python -m pip install -qq $$(grep '^torch==' $<)
	.venvs/$*/bin/python -m pip install -qq --no-deps --requirement $<
	.venvs/$*/bin/python -m pip install -qq --no-deps --editable .
	touch $@

test: test-unit test-workflow test-potentials

test-unit: envs
	$(MAIN)/python -m pytest -n auto tests/unit

test-workflow: envs
	$(MAIN)/python -m pytest -n auto tests/workflow

test-potentials: envs
	for name in $(POTENTIALS); do .venvs/$$name/bin/python -m pytest tests/potentials || exit 1; done

# A real SLURM on this machine, three side by side, for the tests wait more than they compute; root on a Debian-like
# system installs it where it is missing.
test-slurm: envs
	command -v slurmctld > /dev/null || sh tests/slurm/install.sh
	$(MAIN)/python -m pytest -n 3 tests/slurm

lint: envs
	$(MAIN)/ruff check .
	$(MAIN)/ruff format --check .
	$(MAIN)/snakefmt --check Snakefile workflow
	$(MAIN)/snakemake --lint
	$(MAIN)/snakemake --lint --configfile config/paper.yaml
	$(MAIN)/snakemake --lint --configfile config/evaluate.yaml

format: envs
	$(MAIN)/ruff check --fix .
	$(MAIN)/ruff format .
	$(MAIN)/snakefmt Snakefile workflow

# The generated files that tests/unit/test_config.py compares with the models.
config: envs
	$(MAIN)/defectnet config > config/config.yaml
	$(MAIN)/defectnet config --schema > config/schema.json

# Hours on two cores; finished parts are kept in results/bench/work.
bench: envs
	.venvs/sevennet/bin/python tests/bench/evaluation.py
	.venvs/sevennet/bin/python tests/bench/phonons.py

# Resolve the newest versions that pyproject.toml allows and pin them.
lock:
	for name in main $(ALL_POTENTIALS); do sh envs/lock.sh $(PYTHON) $$name || exit 1; done

clean:
	rm -rf .venvs .snakemake $(RESULTS) $(EVALUATED)
