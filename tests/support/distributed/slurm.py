"""A SLURM cluster of two nodes on this machine, by Debian's own daemons and without systemd."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")

CONF = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={kill_wait}
FirstJobId={first_job}
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A running cluster. ``run`` calls one of SLURM's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, **more: str) -> str:
        done = subprocess.run(
            command, env=self.environment | more, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{self.logs()}"
        return done.stdout

    def submit(self, *arguments: str, **environment: str) -> str:
        """Submit a batch script; return the job's id."""
        return self.run("sbatch", "--parsable", *arguments, **environment).strip()

    def show(self, job: str) -> dict[str, str]:
        """Return what SLURM knows of a job: JobState, ExitCode, Reason, ..."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *, seconds: float = 180) -> dict[str, str]:
        """Wait until a job is over; return what SLURM says of it."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.show(job)
            if found["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SIGNALING"):
                return found
            assert time.monotonic() < deadline, f"{found}{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "".join(f"\n--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def running(folder: Path, *, kill_wait: int = 30) -> Iterator[Cluster]:
    """Start munged, slurmctld and two slurmd; wait until both nodes are idle. Root's privileges are needed."""
    folder.chmod(0o755)
    for name in ("state", "spool.n0", "spool.n1"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    conf = CONF.format(folder=folder, host=host, ports=_free_ports(3), kill_wait=kill_wait, first_job=_first_job())
    (folder / "slurm.conf").write_text(conf)
    cluster = Cluster(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (
            [
                *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"),
                *(
                    f"--pid-file={folder}/munged.pid",
                    f"--seed-file={folder}/munged.seed",
                    f"--log-file={folder}/munged.log",
                ),
            ],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "n0"],
            ["slurmd", "-D", "-N", "n1"],
        ):
            path = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin") or command[0]
            with open(folder / f"{command[0]}{len(daemons)}.out.log", "wb") as log:
                daemons.append(subprocess.Popen([path, *command[1:]], env=cluster.environment, stdout=log, stderr=log))
            if command[0] == "munged":
                _wait_for((folder / "munge.socket").exists, cluster)
        _wait_for(lambda: _idle_nodes(cluster) == 2, cluster)
        yield cluster
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            jobs = cluster.run("squeue", "--noheader", "--format=%i").split()
            if jobs:
                cluster.run("scancel", "--signal=KILL", *jobs)
                time.sleep(1)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _first_job() -> int:
    """Return where this cluster counts jobs from: launch/slurm.sbatch makes ports of the numbers, and workers share the host."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return 1 + worker % 9 * 1000 + random.randrange(900)


def _idle_nodes(cluster: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%t"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split().count("idle")


def _wait_for(is_true: Callable[[], bool], cluster: Cluster, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
