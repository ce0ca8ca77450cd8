import os
import signal
import subprocess
import sys

import pytest

from defectnet.gpus import VISIBLE, one_gpu, slots_folder

JOB = """
import os, sys, time
from defectnet.gpus import one_gpu
with one_gpu(2):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_slots(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv(VISIBLE, raising=False)


@pytest.fixture
def jobs():
    """Starts a job that holds its GPU until it ends; what it says it got."""
    running = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_jobs_take_turns_on_the_devices(jobs):
    assert [jobs()[1] for _ in range(4)] == ["0", "1", "0", "1"]


def test_a_killed_job_gives_its_device_back(jobs):
    _, (victim, _), _ = jobs(), jobs(), jobs()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert jobs()[1] == "1"
    assert jobs()[1] == "1"  # the fourth of four


def test_devices_that_are_visible_are_shared(monkeypatch):
    monkeypatch.setenv(VISIBLE, "5,GPU-7")
    with one_gpu(2) as first:
        assert os.environ[VISIBLE] == first == "5"
        monkeypatch.setenv(VISIBLE, "5,GPU-7")  # as another process sees it
        with one_gpu(2) as second:
            assert second == "GPU-7"
    assert os.environ[VISIBLE] == "5,GPU-7"


def test_nothing_happens_without_a_number():
    with one_gpu(None) as device:
        assert device is None
    assert VISIBLE not in os.environ
    assert not slots_folder().exists()
