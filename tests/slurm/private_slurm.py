"""A private Slurm of several nodes on this machine: munged, slurmctld and slurmds of our own.

Everything lives under one temporary directory, and only what was started here is ended. A node is a
slurmd in UTS and mount namespaces of its own, so that it has its own name and hosts file; all nodes
share this machine's network and processes.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from processes import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")


def missing() -> str | None:
    """Why no Slurm can be started here; None if it can."""
    if os.geteuid() != 0:
        return "a private Slurm needs root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge)" if absent else None


class Cluster:
    """Two nodes, n1 and n2; partition `main`, and `low`, whose jobs `main` takes the place of."""

    def __init__(self, directory: Path, cpus: int = 12) -> None:
        """Start the daemons and wait until the nodes are idle. `directory` has a short path."""
        self.directory = directory
        self.nodes = ("n1", "n2")
        self._daemons: list[int] = []
        directory.chmod(0o755)  # munge refuses a socket that not everybody can reach
        for name in ("munge", "state", "log", "spool", "run"):
            (directory / name).mkdir(mode=0o755, parents=True)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("SLURM_")
        } | {"SLURM_CONF": str(directory / "slurm.conf")}
        self._configure(cpus)
        self._start_munge()
        self._run("slurmctld", "-i")
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: self.ask("sinfo", "-hNpmain", "-tidle", "-o%N").split() == ["n1", "n2"])

    def _configure(self, cpus: int) -> None:
        here, sub, port = self.directory, "127.77.0", free_port()
        hosts = ["127.0.0.1 localhost", *(f"{sub}.{n[1:]} {n}" for n in self.nodes)]
        (here / "hosts").write_text("\n".join(hosts) + "\n")
        hostname = os.uname().nodename.partition(".")[0]
        settings = {
            "ClusterName": "test",
            # Ports are made from jobs' numbers: two such clusters on a machine must not share them.
            "FirstJobId": random.randrange(1, 1_000_000),
            "SlurmctldHost": f"{hostname}(127.0.0.1)",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            # A requeued job waits for its old credential to expire: two minutes by default.
            "AuthInfo": f"socket={here}/munge/sock,cred_expire=5",
            "SlurmctldPort": port,
            "SlurmctldPidFile": f"{here}/run/slurmctld.pid",
            "SlurmdPidFile": f"{here}/run/slurmd.%n.pid",
            "StateSaveLocation": f"{here}/state",
            "SlurmdSpoolDir": f"{here}/spool/%n",
            "SlurmctldLogFile": f"{here}/log/slurmctld.log",
            "SlurmdLogFile": f"{here}/log/slurmd.%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerParameters": "bf_interval=1,sched_interval=1,batch_sched_delay=0",
            # Nodes may claim more CPUs than there are.
            "SlurmdParameters": "config_overrides",
            # A job submitted with `nice` leaves the time to the others, also when it is requeued.
            "PropagatePrioProcess": 1,
            "MpiDefault": "none",
            "MailProg": "/bin/true",
            "SwitchType": "switch/none",
            "ReturnToService": 2,
            "KillWait": 10,
            "SlurmdTimeout": 10,
            "MinJobAge": 3600,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for number, node in enumerate(self.nodes, start=1):
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr={sub}.{number} "
                f"Port={free_port()} CPUs={cpus} RealMemory=2000 State=UNKNOWN"
            )
        common = "Nodes=ALL MaxTime=60 DefaultTime=10 State=UP"
        lines.append(f"PartitionName=main Default=YES PriorityTier=10 {common}")
        lines.append(f"PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=5 {common}")
        (here / "slurm.conf").write_text("\n".join(lines) + "\n")
        # slurmd 22.05 wants a cgroup plugin even where nothing uses it; v2's needs systemd.
        (here / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start_munge(self) -> None:
        here = self.directory / "munge"
        (here / "key").write_bytes(os.urandom(128))
        (here / "key").chmod(0o600)
        words = [f"--{name}={here / file}" for name, file in _MUNGE_FILES.items()]
        self._run("munged", "--num-threads=2", *words)

    def _run(self, *words: str) -> None:
        said = self.directory / "log" / "starts"
        with said.open("a") as log:  # not a pipe: a daemon would keep it open
            done = subprocess.run(
                words,
                env=self.environment,
                timeout=30,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if done.returncode != 0:
            raise RuntimeError(f"{words[0]} did not start: {said.read_text()}")

    def start_node(self, node: str) -> None:
        """Start the slurmd of `node`."""
        (self.directory / "spool" / node).mkdir(exist_ok=True)
        own = 'hostname "$1"; mount --bind "$2" /etc/hosts; exec slurmd -N "$1"'
        hosts = str(self.directory / "hosts")
        unshare = ["unshare", "--uts", "--mount", "--propagation", "private"]
        self._run(*unshare, "bash", "-c", own, "_", node, hosts)

    def pid(self, daemon: str) -> int:
        """Process of `slurmctld`, `slurmd.n1` or `slurmd.n2`; 0 if it wrote none down."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.directory / "run" / f"{daemon}.pid").read_text())
        return 0

    def ask(self, *words: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            words, env=self.environment, timeout=30, capture_output=True, text=True
        )
        return done.stdout.strip()

    def until(self, condition: Callable[[], object], timeout: float = 60) -> None:
        """Wait until `condition` holds, else raise TimeoutError with how things stand."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(self.report())
            time.sleep(0.1)

    def report(self) -> str:
        """Queue, nodes, and the ends of the logs, for a test that failed."""
        parts = [self.ask("squeue", "-tall"), self.ask("sinfo", "-Nl")]
        parts += [log.read_text()[-1500:] for log in sorted((self.directory / "log").iterdir())]
        return "\n".join(parts)

    def stop(self) -> None:
        """End the jobs, then the daemons, then what is left of their steps."""
        self.ask("scancel", "--full", "--signal=KILL", "--user=root")
        self.ask("scancel", "--user=root")
        with contextlib.suppress(TimeoutError):
            self.until(lambda: not self.ask("squeue", "-h"), timeout=20)
        for daemon in (*(f"slurmd.{node}" for node in self.nodes), "slurmctld"):
            end(self.pid(daemon))
        subprocess.run(
            ["munged", "--stop", f"--socket={self.directory}/munge/sock"],
            timeout=30,
            capture_output=True,
        )
        for pid in self.processes("slurmstepd"):
            end(pid)

    def processes(self, marker: str, *variables: str) -> list[int]:
        """Living processes of this cluster with `marker` in their command.

        Args:
            marker: any part of the command line.
            variables: NAME=VALUE, each of them in the process's environment.
        """
        own = {f"SLURM_CONF={self.directory}/slurm.conf".encode(), *map(str.encode, variables)}
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                command, environment = ((entry / n).read_bytes() for n in ("cmdline", "environ"))
                if marker.encode() in command and own <= set(environment.split(b"\0")):
                    found.append(int(entry.name))
        return found


_MUNGE_FILES = {
    "key-file": "key",
    "socket": "sock",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


def end(pid: int) -> None:
    """Ask a process to end, then make it."""
    if pid <= 0:
        return
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 2.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience
        while _lives(pid) and time.monotonic() < deadline:
            time.sleep(0.05)


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
