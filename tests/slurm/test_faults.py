"""Jobs, nodes and controllers that end at the wrong moment, while phonons of three hosts are computed.

What is asserted in every test stands in the fixture ``copy``: no finished record is lost, computed again or there
twice, and the dataset is that of an undisturbed run.
"""

from __future__ import annotations

import signal

from cluster import wait_until
from conftest import kill

PAUSE_S = 0.1
"""Long enough for a test to interfere between two records."""


def only_job(cluster) -> tuple[str, str]:
    """Id and node of the one job that is running."""
    (job,) = wait_until(cluster.running, "a job runs")
    return job["id"], job["node"]


def end(cluster, job: str, seconds: float = 120) -> str:
    """How SLURM says that a job has ended, once it has."""
    return wait_until(lambda: cluster.finished().get(job), f"job {job} ends", seconds)["JobState"]


def test_cancelled_job_is_submitted_again(run, cluster):
    run.pause(PAUSE_S)
    controller = run.start("--until", "phonons")
    run.wait_for_records(2)
    job, _ = only_job(cluster)
    cluster.ask("scancel", job)
    run.pause(0)
    run.end(controller)
    assert end(cluster, job) == "CANCELLED"
    assert len(run.notes("phonons")) == 2


def test_ctrl_c_cancels_the_job_and_the_same_command_goes_on(run, cluster):
    run.pause(PAUSE_S)
    controller = run.start("--nolock", "--until", "phonons")
    run.wait_for_records(2)
    job, _ = only_job(cluster)
    controller.send_signal(signal.SIGINT)
    run.end(controller, succeeds=False)
    assert end(cluster, job) == "CANCELLED"
    run.pause(0)
    run.end(run.start("--nolock", "--until", "phonons"))


def test_signals_stop_the_job_in_order(run, cluster):
    run.pause(PAUSE_S)
    controller = run.start("--until", "phonons")
    stopped = []
    for name in ("TERM", "USR1"):
        run.wait_for_records(1)
        stopped.append(only_job(cluster)[0])
        cluster.ask("scancel", f"--signal={name}", stopped[-1])
        assert end(cluster, stopped[-1]) == "FAILED"
    run.pause(0)
    told = run.end(controller)
    # Snakemake itself dies of SIGUSR1, and SLURM then kills what is left of the job, be it in the middle of a word.
    assert "stopped: SIGTERM" in told
    assert [note["SLURM_JOB_ID"] for note in run.notes("phonons")[:2]] == stopped
    assert len(run.notes("phonons")) == 3


def test_preempted_job_is_requeued_by_slurm(run, cluster):
    run.pause(PAUSE_S)
    controller = run.start("--until", "phonons")
    run.wait_for_records(2)
    job, node = only_job(cluster)
    cluster.ask(
        "sbatch", "--partition=urgent", f"--nodelist={node}", "--exclusive", "--wrap=sleep 2", "--output=/dev/null"
    )
    wait_until(lambda: job not in {other["id"] for other in cluster.running()}, "the job has to go")
    run.pause(0)
    run.end(controller)
    assert end(cluster, job) == "COMPLETED"
    assert len(run.notes("phonons")) == 2


def test_killed_node(run, cluster):
    run.pause(PAUSE_S)
    controller = run.start("--until", "phonons")
    run.wait_for_records(2)
    job, node = only_job(cluster)
    try:
        cluster.kill_node(node)
        run.pause(0)
        run.end(controller)
    finally:
        cluster.start_node(node)
    assert end(cluster, job) == "COMPLETED"
    where = [note["SLURMD_NODENAME"] for note in run.notes("phonons")]
    assert len(where) == 2 and where[0] == node != where[1]
    wait_until(lambda: set(cluster.states().values()) == {"idle"}, "the node is back")


def test_killed_controller_and_the_same_command_again_while_its_job_runs(run, cluster):
    run.pause(PAUSE_S)
    controller = run.start("--nolock", "--until", "phonons")
    run.wait_for_records(1)
    job, _ = only_job(cluster)
    run.pause(600)
    kill(controller)
    again = run.start("--nolock", "--until", "phonons")
    wait_until(lambda: len(run.notes("phonons")) == 2, "two copies run at once")
    run.pause(PAUSE_S)
    run.end(again)
    assert end(cluster, job) == "COMPLETED"


def test_two_copies_of_a_batch_at_once(run, cluster):
    run.pause(PAUSE_S)
    (config,) = run.results.glob("configs/*.yaml")
    command = f"{run.values['potential']['python']} -m defectnet phonons --config {config} --batch batch-00000"
    submit = ("sbatch", "--parsable", "--partition=gpu", f"--chdir={run.folder}", f"--wrap={command}")
    jobs = [cluster.ask(*submit, f"--nodelist={node}").strip() for node in ("g1", "g2")]
    wait_until(lambda: len(cluster.running()) == 2, "two copies run at once")
    assert [end(cluster, job) for job in jobs] == ["COMPLETED"] * 2


def test_time_limits(copy, cluster):
    """One job stops by itself before its minute is over, another hangs and is ended by SLURM; then both get two."""
    patient, deaf = copy("patient"), copy("deaf")
    controllers = []
    for run in (patient, deaf):
        run.edit_profile("runtime: .*", "runtime: 1 * attempt")
        run.pause(PAUSE_S)
        controllers.append(run.start("--until", "phonons"))
    for run in (patient, deaf):
        run.wait_for_records(1)
        run.pause(600)
    (deaf.folder / "deaf").touch()
    first = [run.notes("phonons")[0]["SLURM_JOB_ID"] for run in (patient, deaf)]
    assert end(cluster, first[0]) == "FAILED"
    patient.pause(0)
    assert end(cluster, first[1], 240) == "TIMEOUT"
    (deaf.folder / "deaf").unlink()
    deaf.pause(0)
    told = [run.end(controller) for run, controller in zip((patient, deaf), controllers, strict=True)]
    assert "stopped: 1 minutes are nearly over" in told[0]
    for run in (patient, deaf):
        assert [cluster.finished()[note["SLURM_JOB_ID"]]["TimeLimit"] for note in run.notes("phonons")] == ["1", "2"]
