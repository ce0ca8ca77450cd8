"""A private SLURM on this host: one CPU node and two GPU nodes with faked GPUs; no systemd, no cgroups, no database.

"Nodes" are several slurmd on one host, each with a port and a name of its own. Nothing outside the given folder is
touched; every daemon is stopped by its process id.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
NODES = {"c1": 0, "g1": 2, "g2": 2}
"""GPUs of each node."""

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for its credential to expire, two minutes by default.
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdSpoolDir={root}/spool/%n
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobs.txt
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SlurmdParameters=config_overrides
MinJobAge=600
KillWait=5
SlurmdTimeout=10
# Minutes over their limit that jobs are left: of limits as short as those of the tests, starting takes a good part.
OverTimeLimit=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=cpu Nodes=c1 Default=YES
PartitionName=gpu Nodes=g1,g2 MaxTime=24:00:00
PartitionName=urgent Nodes=g1,g2 PriorityTier=9
"""


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120, interval: float = 0.05) -> object:
    """The first truthy answer of ``condition``."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(interval)
    return answer


class Cluster:
    """The daemons below ``root`` and the commands that speak to them; also a context."""

    def __init__(self, root: Path):
        self.root = root
        self.port = _free_ports(1 + len(NODES))

    def __enter__(self) -> Cluster:
        try:
            self._write()
            # slurmctld and srun find the configuration in the environment. But Snakemake's job step takes all SLURM_*
            # out of it before it calls srun, hence an srun that puts it back.
            os.environ["SLURM_CONF"] = str(self.root / "etc" / "slurm.conf")
            os.environ["PATH"] = f"{self.root / 'bin'}:{os.environ['PATH']}"
            self._start_munge()
            subprocess.run(["slurmctld", "-c"], check=True)
            for node in NODES:
                self.start_node(node)
            wait_until(lambda: set(self.states().values()) == {"idle"}, "all nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            subprocess.run(["scancel", "--me"], timeout=20, check=False)
            wait_until(lambda: not self.running(), "the last job has ended", 20)
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
            self._stop(name)
        for node in NODES:
            for process in self._steps_of(node):
                process.kill()

    def _write(self) -> None:
        for folder in ("bin", "etc", "log", "munge", "run", "spool", "state"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "munge").chmod(0o700)
        key = self.root / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(host=host, port=self.port, root=self.root)
        # More processors and memory than this host has: jobs ask for what real ones need.
        common = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=1000000"
        gres = ""
        for number, (node, gpus) in enumerate(NODES.items()):
            text += f"NodeName={node} Port={self.port + 1 + number} {common} {f'Gres=gpu:{gpus}' if gpus else ''}\n"
            for gpu in range(gpus):
                # Has to be a character device; nothing opens it.
                device = self.root / "run" / f"{node}-gpu{gpu}"
                os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(195, gpu))
                gres += f"NodeName={node} Name=gpu File={device}\n"
        (self.root / "etc" / "slurm.conf").write_text(text)
        (self.root / "etc" / "gres.conf").write_text(gres)
        srun = self.root / "bin" / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.root}/etc/slurm.conf exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)

    def _start_munge(self) -> None:
        run, munge = self.root / "run", self.root / "munge"
        files = {"key-file": munge / "key", "seed-file": munge / "seed", "log-file": munge / "log"}
        files |= {"socket": run / "munge.socket", "pid-file": run / "munged.pid"}
        subprocess.run(["munged", *(f"--{name}={path}" for name, path in files.items())], check=True)

    def _pid(self, name: str) -> int | None:
        path = self.root / "run" / f"{name}.pid"
        return int(path.read_text()) if path.exists() and path.read_text().strip() else None

    def _stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        pid = self._pid(name)
        if pid is None or _gone(pid):
            return
        os.kill(pid, number)
        try:
            wait_until(lambda: _gone(pid), f"{name} ends", 10)
        except AssertionError:
            os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        subprocess.run(["slurmd", "-N", node], check=True)

    def kill_node(self, node: str) -> None:
        """What a power failure does: daemon, job steps and the jobs' processes are gone at once."""
        steps = self._steps_of(node)
        self._stop(f"slurmd-{node}", signal.SIGKILL)
        for process in steps:
            for child in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()

    def _steps_of(self, node: str) -> list[psutil.Process]:
        """Step daemons of a node; they are told apart by the spool folder that they keep their socket in."""
        found = []
        for process in psutil.process_iter(["name"]):
            if process.info["name"] == "slurmstepd":
                with contextlib.suppress(psutil.Error):
                    sockets = {connection.laddr for connection in process.net_connections("unix")}
                    if any(str(path).startswith(f"{self.root}/spool/{node}/") for path in sockets):
                        found.append(process)
        return found

    def ask(self, *command: str) -> str:
        """Output of a SLURM command."""
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    def states(self) -> dict[str, str]:
        """State of every node."""
        return dict(line.split() for line in self.ask("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines())

    def running(self, state: str = "running") -> list[dict[str, str]]:
        """Jobs in a state: id, partition, node, comment (which names rule and batch)."""
        fields = ("id", "partition", "node", "comment")
        answer = self.ask("squeue", "--me", "--noheader", f"--states={state}", "--format=%i|%P|%N|%k")
        return [dict(zip(fields, line.split("|"), strict=True)) for line in answer.splitlines()]

    def finished(self) -> dict[str, dict[str, str]]:
        """By job, in the order of their ends, what SLURM wrote at the end: JobState, Partition, TimeLimit and more."""
        path = self.root / "log" / "jobs.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        jobs = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
        return {job["JobId"]: job for job in jobs}


def _gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has collected it yet."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def _free_ports(count: int) -> int:
    """First of ``count`` successive ports that are free now; tests side by side look in different places."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for first in range(16817 + 1000 * worker, 30000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("no free ports")
