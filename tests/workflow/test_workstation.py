"""The profile for one machine with several GPUs. Without any, jobs are told which one they would see."""

from __future__ import annotations

import re

from conftest import REPOSITORY, campaign


def test_every_potential_job_sees_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run = campaign(tmp_path / "run")
    profile = REPOSITORY / "profiles/gpu-workstation"
    run.snakemake("--workflow-profile", str(profile), "--cores", "4", "--until", "relax")
    logs = sorted((run.results / "logs").glob("*/*.log"))
    seen = {(log.parent.name, log.stem): re.findall(r"GPU (\S+) of (\d+)", log.read_text()) for log in logs}
    # Three hosts in two stages of the potential, and two stages without it.
    assert {stage for (stage, _), devices in seen.items() if devices} == {"library", "relax"}
    devices = [devices for devices in seen.values() if devices]
    assert len(devices) == 6
    assert all(len(one) == 1 and one[0][1] == "2" for one in devices)
    assert {one[0][0] for one in devices} == {"0", "1"}
