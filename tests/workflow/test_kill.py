"""A run that is killed without warning goes on where it stopped and ends with the same dataset."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from conftest import campaign

from defectnet.dataset.schema import content_digest


def doped_phonons(run):
    """All but the first phonons of each host, which are the pristine ones."""
    folders = (run.results / "records" / "phonons").glob("*")
    return [path for folder in folders for path in sorted(folder.glob("*.h5"), key=os.path.getmtime)[1:]]


def test_sigkill_in_the_middle_of_phonons(finished, tmp_path):
    victim = campaign(tmp_path / "victim")
    process = subprocess.Popen(
        victim.command("--cores", "1"),
        cwd=victim.folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not doped_phonons(victim):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = victim.fingerprint()
    assert 0 < len(doped_phonons(victim)) < 6

    victim.snakemake("--nolock", "--until", "dataset")
    after = victim.fingerprint()
    assert {path: after[path] for path in saved} == saved
    expected = content_digest(finished.results / "dataset.h5")
    assert content_digest(victim.results / "dataset.h5") == expected
