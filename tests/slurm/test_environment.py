"""An environment without the potential's package is refused, in words, wherever it is noticed first."""

from __future__ import annotations

import sys

from conftest import campaign, copy_of

LOGIN_NODE_ONLY = """#!/bin/sh
# The environment is complete on the login node, but not where jobs run.
case "$SLURM_JOB_ID $*" in " "*identify*) echo "sevennet 7net-0"; exit ;; esac
exec {python} "$@"
"""


def test_before_anything_is_submitted(cluster, tmp_path):
    earlier = cluster.finished().keys()
    run = campaign(tmp_path / "run")
    run.values["potential"] |= {"name": "sevennet", "python": sys.executable}
    run.write()
    told = run.end(run.start(), succeeds=False)
    assert "potential.name: sevennet needs the package sevenn" in told and "make envs" in told
    assert cluster.finished().keys() == earlier and not cluster.running()


def test_on_the_compute_node_and_nothing_is_recorded(cluster, relaxed, tmp_path):
    run = copy_of(relaxed, tmp_path / "run")
    python = run.folder / "half-python"
    python.write_text(LOGIN_NODE_ONLY.format(python=sys.executable))
    python.chmod(0o755)
    run.values["potential"] |= {"name": "sevennet", "python": str(python)}
    run.write()
    before = run.fingerprint()
    told = run.end(run.start("--retries", "0"), succeeds=False)
    assert "error: potential.name: sevennet needs the package sevenn" in told
    assert run.fingerprint() == before  # neither a result of another potential nor a failure that would be remembered
