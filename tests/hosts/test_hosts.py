"""launch/host.sh on several network hosts: joined, killed, cut off, and wrongly named."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from private_hosts import Hosts, missing
from processes import ROOT, completed_run, metrics

DATA = ["--data=bundled", "--train-samples=1000", "--lr=0.001", "--global-batch-size=16"]
SHORT = [*DATA, "--epochs=1"]
# Too many to come to an end by itself: a test stops it when it has seen what it wants to see.
LONG = [*DATA, "--epochs=1000", "--checkpoint-every-steps=25"]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(reason)
    made = Hosts(tmp_path, 3)
    try:
        yield made
    finally:
        made.remove()


class HostJob:
    """One run over several hosts, which share a disk."""

    def __init__(self, hosts: Hosts, directory: Path, nodes: str, *flags: str) -> None:
        self.hosts, self.directory, self.nodes = hosts, directory, nodes
        self.flags = [*flags, "--run-dir=run"]
        self.variables = {"PROCESSES": "1", "OMP_NUM_THREADS": "1", "RUN_ID": directory.name}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, host: str, head: str = "n1:29400", **variables: str) -> None:
        """Type launch/host.sh's line on `host`."""
        number = str(self.hosts.names.index(host))
        words = [str(ROOT / "launch" / "host.sh"), head, self.nodes, number, *self.flags]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings = {**self.variables, "PATH": path, **variables}
        self.agents[host] = self.hosts.start(
            host, self.directory, self.directory / f"{host}.log", *words, **settings
        )

    def log(self, host: str) -> str:
        return (self.directory / f"{host}.log").read_text()

    def logs(self) -> str:
        return "\n".join(f"== {host}\n{self.log(host)[-4000:]}" for host in self.agents)

    def end(self, host: str, timeout: float = 120) -> int:
        """Wait for its agent; the exit code."""
        try:
            return self.agents[host].wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(self.logs()) from error

    def read(self, file: str) -> dict[str, Any]:
        """An object of the run directory; empty if it is not there."""
        path = self.directory / "run" / file
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return content

    def until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until `condition` holds, while all agents live."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def until_saved_by(self, world_size: int) -> None:
        """Wait until so many processes train and have saved another checkpoint."""
        known = self.read("status.json").get("saved_step") or 0
        self.until(
            lambda: (
                self.read("environment.json").get("world_size") == world_size
                and (self.read("status.json").get("saved_step") or 0) > known
            )
        )

    def until_next_epoch(self) -> None:
        """Wait until the processes that train now have recorded one more epoch."""
        known = self.log("n1").count("\nepoch ")
        self.until(lambda: self.log("n1").count("\nepoch ") > known)

    def stop(self) -> None:
        """Ask for a stop, and wait until all agents have ended."""
        self.agents["n1"].send_signal(signal.SIGTERM)
        for host in self.agents:
            self.end(host)
        assert self.read("status.json")["status"] == "preempted", self.logs()

    def require_losses_as_if_alone(self) -> None:
        """Every epoch so far once, with the losses of one process that nobody disturbed."""
        mine = losses(self.directory / "run")
        expected = alone(*self.flags[:-1], f"--epochs={max(epoch for epoch, _ in mine)}")
        if self.read("status.json")["status"] != "completed":
            expected = {key: loss for key, loss in expected.items() if key[1] != "test/loss"}
        assert mine.keys() == expected.keys()
        assert list(mine.values()) == pytest.approx(list(expected.values()), rel=1e-5)


def losses(run: Path) -> dict[tuple[int, str], float]:
    """All the losses of metrics.jsonl by epoch and name; an epoch told twice is an error."""
    told = [
        ((record["epoch"], name), record[name])
        for record in metrics(run)
        for name in ("train/loss", "val/loss", "test/loss")
        if name in record
    ]
    assert len(dict(told)) == len(told)
    return dict(told)


def told(job: HostJob, what: str, world_size: int, resumes: int) -> None:
    """Wait until so many have resumed and saved; `pytest -rP` shows how long that took."""
    begun = time.monotonic()
    job.until(lambda: job.log("n1").count("resume at step") == resumes)
    job.until_saved_by(world_size)
    print(f"{what}: {time.monotonic() - begun:.0f} s")


@cache
def alone(*flags: str) -> dict[tuple[int, str], float]:
    return losses(completed_run(Path(tempfile.mkdtemp()), 1, *flags))


@pytest.mark.parametrize(("count", "processes"), [(2, 2), (3, 1)])
def test_hosts_train_together_with_the_losses_of_one_process(
    count: int, processes: int, hosts: Hosts, tmp_path: Path
) -> None:
    job = HostJob(hosts, tmp_path, str(count), *SHORT)
    for host in hosts.names[:count]:
        job.start(host, PROCESSES=str(processes))
    assert [job.end(host) for host in job.agents] == [0] * count, job.logs()
    environment = job.read("environment.json")
    assert (len(environment["hosts"]), environment["world_size"]) == (count, count * processes)
    assert job.read("status.json")["status"] == "completed"
    job.require_losses_as_if_alone()


def test_hosts_that_share_only_ipv6_train_together(hosts: Hosts, tmp_path: Path) -> None:
    """Without torchrun, whose own connections are not what is in question here."""
    hosts.use_ipv6_alone()
    job = {
        "MASTER_ADDR": "[fd77::1]",
        "SLURM_JOB_ID": "9",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_LOCALID": "0",
        "PYTHONPATH": str(ROOT),
    }
    words = [sys.executable, str(ROOT / "train_ddp.py"), *SHORT, "--setup-timeout=60"]
    ranks = []
    for host, rank in (("n1", "0"), ("n2", "1")):
        variables = job | {"SLURM_PROCID": rank, "SLURM_NODEID": rank}
        log = tmp_path / f"{host}.log"
        ranks.append(hosts.start(host, tmp_path, log, *words, "--run-dir=run", **variables))
    logs = [rank.wait(120) for rank in ranks], (tmp_path / "n1.log").read_text()
    assert logs[0] == [0, 0], logs[1]
    assert losses(tmp_path / "run") == pytest.approx(alone(*SHORT), rel=1e-5)


def test_a_killed_process_is_replaced_on_both_hosts(hosts: Hosts, tmp_path: Path) -> None:
    job = HostJob(hosts, tmp_path, "2", *LONG)
    job.start("n1")
    job.start("n2")
    job.until_saved_by(2)
    os.kill(hosts.processes("n2", "train_ddp.py")[-1], signal.SIGKILL)
    told(job, "a process killed, on both hosts they train again", 2, resumes=1)
    job.until_next_epoch()
    job.stop()
    job.require_losses_as_if_alone()


def test_a_lost_host_is_done_without_and_taken_in_again(hosts: Hosts, tmp_path: Path) -> None:
    job = HostJob(hosts, tmp_path, "1:2", *LONG)
    quick = {"RDZV_CONF": "last_call_timeout=2,keep_alive_interval=1", "PROCESSES": "2"}
    job.start("n1", **quick)
    job.start("n2", **quick)
    job.until_saved_by(4)
    hosts.kill("n2")
    told(job, "a host killed, the other goes on", 2, resumes=1)
    job.until_next_epoch()
    job.start("n2", **quick)
    told(job, "a host comes, both go on", 4, resumes=2)
    job.until_next_epoch()
    job.stop()
    job.require_losses_as_if_alone()


def test_both_sides_of_a_cut_link_end_with_a_message(hosts: Hosts, tmp_path: Path) -> None:
    job = HostJob(hosts, tmp_path, "2", *LONG, "--step-timeout=10")
    for host in ("n1", "n2"):
        job.start(host, MAX_RESTARTS="0", PROCESSES="2")
    job.until_saved_by(4)
    hosts.cut("n2")
    begun = time.monotonic()
    assert job.end("n1") == 1, job.logs()
    # Torchrun's agent on n2 waits for its store as long as TCP does, a quarter of an hour.
    workers = set(hosts.processes("n2", "train_ddp.py")) - set(hosts.processes("n2", "torchrun"))
    deadline = time.monotonic() + 30
    while workers & set(hosts.processes("n2", "train_ddp.py")):
        assert time.monotonic() < deadline, job.logs()
        time.sleep(0.1)
    print(f"the link cut, every process has ended: {time.monotonic() - begun:.0f} s")
    for host, said in (
        ("n1", "rank 0 ends: ranks 2-3 did not respond"),
        ("n2", "rank 2 ends: the rendezvous endpoint did not respond: rank 0 or its node is"),
    ):
        assert said in job.log(host), job.logs()


def test_latency_and_loss_change_no_number(hosts: Hosts, tmp_path: Path) -> None:
    if not hosts.disturb("n2", "delay", "2ms", "loss", "1%"):
        pytest.skip("this kernel has no netem")
    job = HostJob(hosts, tmp_path, "2", *SHORT)
    begun = time.monotonic()
    job.start("n1")
    job.start("n2")
    assert [job.end("n1"), job.end("n2")] == [0, 0], job.logs()
    print(f"2 ms and 1 % loss on one side, an epoch of 63 steps: {time.monotonic() - begun:.0f} s")
    job.require_losses_as_if_alone()


def test_a_wrong_rendezvous_endpoint_is_named_within_30_seconds(
    hosts: Hosts, tmp_path: Path
) -> None:
    resolve = "cannot resolve the rendezvous endpoint"
    connect = "cannot connect to the rendezvous endpoint"
    expected = {
        ("n1", "nosuchhost:29400"): f"error: {resolve} nosuchhost:29400 on n1 (",
        ("n2", "nosuchhost:29400"): f"error: {resolve} nosuchhost:29400 on n2 (",
        ("n2", "nobody:29400"): f"n2 is waiting: {connect} nobody:29400",
        ("n3", "n1:29401"): f"n3 is waiting: {connect} n1:29401 (10.77.0.1",
    }
    jobs = []
    for number, (host, head) in enumerate(expected):
        (tmp_path / str(number)).mkdir()
        jobs.append(HostJob(hosts, tmp_path / str(number), "3", *SHORT))
        jobs[-1].start(host, head)
    deadline = time.monotonic() + 30
    for job, ((host, _), said) in zip(jobs, expected.items(), strict=True):
        while f"mnist-dist: {said}" not in job.log(host):
            assert time.monotonic() < deadline, job.logs()
            time.sleep(0.1)
    assert [jobs[0].end("n1"), jobs[1].end("n2")] == [1, 1]
    assert not list(tmp_path.glob("*/run"))


def test_an_endpoint_where_no_program_listens_is_an_error_in_the_end(
    hosts: Hosts, tmp_path: Path
) -> None:
    job = HostJob(hosts, tmp_path, "2", *SHORT)
    job.start("n2", "n1:29400", SETUP_TIMEOUT="3")
    assert job.end("n2", timeout=60) == 1
    expected = "mnist-dist: error: cannot connect to the rendezvous endpoint n1:29400"
    assert job.log("n2").count(expected) == 1


def test_a_port_that_is_taken_is_named_on_the_host_that_should_offer_it(
    hosts: Hosts, tmp_path: Path
) -> None:
    listen = (
        "import socket; s = socket.create_server(('', 29400)); print('up', flush=True); s.accept()"
    )
    holder = hosts.start("n1", tmp_path, tmp_path / "holder", sys.executable, "-c", listen)
    while (tmp_path / "holder").read_text() != "up\n":
        assert holder.poll() is None
        time.sleep(0.05)
    job = HostJob(hosts, tmp_path, "2", *SHORT)
    job.start("n1")
    assert job.end("n1", timeout=30) == 1
    expected = "cannot open the rendezvous endpoint n1:29400 on n1"
    assert f"mnist-dist: error: {expected}" in job.log("n1")
