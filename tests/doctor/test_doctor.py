"""`mnist-dist doctor` with real processes: healthy ones, and each thing that can be amiss."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import (
    ROOT,
    Ended,
    command,
    free_port,
    run_main,
    run_ranks,
    torchrun_environment,
)

COMMAND = [sys.executable, "-m", "mnist_dist", "doctor"]
HERE = socket.gethostname()


def start(directory: Path, *flags: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """One process of the command, as a launcher would start it."""
    return subprocess.Popen(
        [*COMMAND, *flags],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(p.returncode, *both) for p, both in zip(processes, said, strict=True)]


def ranks(
    directory: Path, flags: Sequence[str], environments: Sequence[dict[str, str]]
) -> list[Ended]:
    """The command's `main` in a process for each of `environments`."""
    door = "mnist_dist.commands.doctor.command"
    results: list[Ended] = run_ranks(
        run_main, len(environments), str(directory), list(flags), door, environments=environments
    )
    return results


def doctor(
    directory: Path, *flags: str, count: int = 2, started: int | None = None, port: int = 0
) -> list[Ended]:
    """The same in `count` ranks of this host, or only in the first `started` of them."""
    return ranks(directory, flags, pair(count, port)[:started])


def pair(count: int = 2, port: int = 0) -> list[dict[str, str]]:
    """What torchrun tells `count` ranks of this host."""
    port = port or free_port()
    return [torchrun_environment(rank, count, port, "doctor") for rank in range(count)]


def found(ended: Ended) -> dict[str, Any]:
    """The findings of `--json`, by check."""
    return {finding["check"]: finding for finding in json.loads(ended.out)["findings"]}


def verdict(ended: Ended) -> str:
    return ended.out.splitlines()[-1]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(place)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_one_process_alone_is_healthy_and_leaves_nothing_behind(tmp_path: Path) -> None:
    ended = command(tmp_path, "mnist-dist", "doctor")
    assert (ended.code, ended.err) == (0, ""), ended.out
    assert verdict(ended) == "OK: this process can train here"
    assert list(tmp_path.iterdir()) == []


def test_a_healthy_pair_talks_adds_up_and_exits_with_0(tmp_path: Path) -> None:
    first, second = doctor(tmp_path, "--json")
    assert (first.code, second.code) == (0, 0), first.out + first.err
    assert second.out == "", "one rank speaks"
    report, by_check = json.loads(first.out), found(first)
    assert report["healthy"] is True
    assert report["verdict"].startswith("OK: ")
    assert [rank["pid"] for rank in report["ranks"]] != [os.getpid()] * 2
    assert {rank["host"] for rank in report["ranks"]} == {HERE}
    assert all("127.0.0.1" in rank["interfaces"].values() for rank in report["ranks"])
    expected = ["rendezvous", "versions", "devices", "interface", "messages", "clocks", "disk"]
    for check in [*expected, "all-reduce", "shared memory"]:
        assert by_check[check]["level"] == "ok", by_check[check]
    pairs = [(pair["from"], pair["to"]) for pair in by_check["messages"]["figures"]]
    assert sorted(pairs) == [(0, 1), (1, 0)]
    sums = by_check["all-reduce"]["figures"]
    assert [entry["bytes"] for entry in sums] == [1024, 544_296, 1 << 24]
    assert all(entry["seconds"] > 0 and entry["bytes_per_second"] > 0 for entry in sums)
    assert by_check["disk"]["figures"][HERE]["fsync_seconds"] > 0


def test_torchrun_examines_the_processes_it_starts(tmp_path: Path) -> None:
    words = ["torchrun", "--nproc_per_node=3", "-m", "mnist_dist", "doctor"]
    ended = command(tmp_path, *words, "--train")
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.startswith("mnist-dist doctor: 3 processes (torchrun)\n")
    assert "3 pairs of ranks, both ways" in ended.out
    assert re.search(r"ok    training      3 ranks together follow it .* samples/s", ended.out)
    assert verdict(ended).endswith("3 ranks on 1 node can train together")
    assert list(tmp_path.iterdir()) == []


def test_an_interface_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    eth7 = [each | {"GLOO_SOCKET_IFNAME": "eth7"} for each in pair()]
    first, second = ranks(tmp_path, [], eth7)
    assert (first.code, second.code) == (1, 1), first.out
    expected = f"there is no interface eth7 (ranks 0-1 on {HERE}); set it to "
    assert verdict(first).startswith(f"FAILED: interface: GLOO_SOCKET_IFNAME=eth7: {expected}")
    assert "lo, or unset it" in verdict(first)
    assert "ok    disk" in first.out, "what does not depend on it is checked all the same"


def test_a_wrong_interface_of_one_rank_is_told_from_the_others(tmp_path: Path) -> None:
    environments = pair()
    environments[1]["GLOO_SOCKET_IFNAME"] = "eth7"
    first, second = ranks(tmp_path, [], environments)
    assert (first.code, second.code) == (1, 1), first.out
    assert f"there is no interface eth7 (rank 1 on {HERE})" in verdict(first)
    assert f"GLOO_SOCKET_IFNAME differs: rank 0 on {HERE} has unset; rank 1" in first.out


def test_a_port_that_another_program_has_is_named(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        first, second = doctor(tmp_path, "--timeout=12", port=port)
    assert (first.code, second.code) == (1, 1), first.out
    expected = f"rendezvous: cannot open the rendezvous endpoint 127.0.0.1:{port} on {HERE}"
    assert f"FAILED: {expected} (Address already in use); choose another port" == verdict(first)


def test_a_rank_that_is_missing_is_named(tmp_path: Path) -> None:
    (first,) = doctor(tmp_path, "--timeout=10", count=3, started=1)
    assert first.code == 1
    assert "rendezvous: ranks 1-2 of 3 did not reach the rendezvous endpoint" in verdict(first)
    assert "--timeout" in verdict(first)


def test_ranks_with_unequal_code_are_named_with_their_directories(tmp_path: Path) -> None:
    other = tmp_path / "other"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mnist_dist", other / "mnist_dist", ignore=ignored)
    with (other / "mnist_dist" / "model.py").open("a") as file:
        file.write("# changed\n")
    environments = pair()
    environments[1]["PYTHONPATH"] = str(other)
    first, second = end([start(tmp_path, environment=each) for each in environments])
    assert (first.code, second.code) == (1, 1), first.out + first.err
    line = verdict(first)
    assert "versions: the code of mnist_dist differs" in line
    assert f"in {ROOT / 'mnist_dist'}; rank 1 on {HERE} has " in line
    assert str(other / "mnist_dist") in line
    assert "install the same commit" in line


def test_a_read_only_run_directory_is_named(disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    first, second = doctor(tmp_path, f"--run-dir={disk}/runs")
    assert (first.code, second.code) == (1, 1), first.out
    assert f"disk: --run-dir {disk}/runs: {disk} on {HERE} cannot be written" in verdict(first)
    assert "(Read-only file system); use a writable directory" in verdict(first)
    assert "ok    all-reduce" in first.out, "what does not depend on it is checked all the same"


def test_a_run_directory_that_is_almost_full_or_a_file_is_named(disk: Path, tmp_path: Path) -> None:
    (disk / "filler").write_bytes(b"x" * (170 << 20))
    (full,) = doctor(tmp_path, f"--run-dir={disk}", count=1)
    assert full.code == 1
    assert f"disk: --run-dir {disk}: {disk} on {HERE} has " in verdict(full)
    (tmp_path / "file").write_text("in the way")
    (file,) = doctor(tmp_path, "--run-dir=file/runs", count=1)
    assert file.code == 1
    assert "(Not a directory)" in verdict(file)


def test_a_disk_without_a_free_inode_is_named(disk: Path, tmp_path: Path) -> None:
    """Its free bytes show nothing of that."""
    subprocess.run(["mount", "-o", "remount,nr_inodes=3", str(disk)], check=True)
    for number in range(2):
        (disk / str(number)).touch()
    (full,) = doctor(tmp_path, f"--run-dir={disk}", count=1)
    assert full.code == 1
    assert "cannot be written (no inode is free for another file: delete some)" in verdict(full)


@pytest.mark.parametrize("reader", ["head", "full"])
def test_a_report_without_a_reader_or_a_disk_is_no_traceback(reader: str, tmp_path: Path) -> None:
    words = " ".join(COMMAND)
    script = f"{words} > /dev/full; echo $?" if reader == "full" else f"{words} | true"
    ended = command(tmp_path, "bash", "-c", script, environment={"PYTHONPATH": str(ROOT)})
    if reader == "full":
        assert ended.out == "1\n"
        (line,) = ended.err.splitlines()
        assert line.startswith("mnist-dist: error: the result cannot be written to standard output")
    else:
        assert (ended.code, ended.err) == (0, "")


def test_the_run_directory_is_left_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    run.mkdir()
    (run / "mine").write_text("text")
    before = [(path, path.stat()) for path in (tmp_path, run, run / "mine")]
    first, second = doctor(tmp_path)
    assert (first.code, second.code) == (0, 0), first.out
    assert [path.name for path in run.iterdir()] == ["mine"]
    for path, status in before:
        now = path.stat()
        assert (now.st_mtime_ns, now.st_ctime_ns) == (status.st_mtime_ns, status.st_ctime_ns)


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_falls_silent_in_the_middle_is_named(
    sent: signal.Signals, tmp_path: Path
) -> None:
    environments = pair()
    started = [start(tmp_path, "--timeout=15", environment=each) for each in environments]
    try:
        assert started[0].stdout is not None
        read = iter(started[0].stdout.readline, "")
        before = next(line for line in read if " rendezvous " in line)
        started[1].send_signal(sent)
        rest, _ = started[0].communicate(timeout=120)
    finally:
        for rank in started:
            rank.kill()
            rank.wait()
    assert started[0].returncode == 1, before + rest
    assert f"rank 1 on {HERE} did not respond in time" in rest.splitlines()[-1]


def test_the_others_end_too_when_rank_0_and_its_store_are_gone(tmp_path: Path) -> None:
    environments = pair()
    started = [start(tmp_path, "--timeout=15", environment=each) for each in environments]
    try:
        assert started[0].stdout is not None
        read = iter(started[0].stdout.readline, "")
        assert any(" rendezvous " in line for line in read)
        started[0].kill()
        _, said = started[1].communicate(timeout=120)
    finally:
        for rank in started:
            rank.kill()
            rank.wait()
    assert started[1].returncode == 1
    (line,) = said.splitlines()
    assert line.startswith("mnist-dist: error: ")
    assert f"rank 1 on {HERE} " in line


def test_more_threads_than_cpus_are_a_warning_with_the_number_to_set(tmp_path: Path) -> None:
    many = [each | {"OMP_NUM_THREADS": "512"} for each in pair()]
    first, _ = end([start(tmp_path, environment=each) for each in many])
    assert first.code == 0, first.out
    (line,) = [line for line in first.out.splitlines() if line.split()[1] == "threads"]
    assert line.split()[0] == "warn"
    assert re.search(rf"ranks 0-1 on {HERE}: \d+ threads on \d+ CPU", line)
    assert re.search(r"unset OMP_NUM_THREADS or set it to \d+$", line)
    assert verdict(first).startswith("OK, with 1 warning: ")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--timeout=1"], ["--timeout 1", "5 to 3600"]),
        (["--run-dir="], ["--run-dir"]),
        (["--quick"], ["--quick"]),
        (["--backend=nccl", "--device=cpu"], ["--backend nccl"]),
    ],
)
def test_a_bad_flag_is_one_line_from_one_rank_and_exit_code_2(
    flags: list[str], names: list[str], tmp_path: Path
) -> None:
    (ended,) = ranks(tmp_path, flags, [{}])
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("mnist-dist: error: ")
    for name in names:
        assert name in line
