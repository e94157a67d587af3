"""A host whose own name leads nowhere: torchrun waits for itself, and a line says so before."""

import configparser
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from processes import ROOT

PROBLEM = "from mnist_dist.distributed.network import own_name_problem; print(own_name_problem())"


def on_host(name: str, *words: str, hosts: str = "") -> list[str]:
    """Words that run a command on a host of that name, with one more line in /etc/hosts."""
    with tempfile.NamedTemporaryFile("w", delete=False) as file:
        file.write(f"127.0.0.1 localhost\n{hosts}\n")
    script = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
    unshare = ["unshare", "--uts", "--mount", "--propagation=private"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("this user cannot name a host here")
    return [*unshare, "bash", "-c", script, "_", name, file.name, *words]


@pytest.mark.parametrize(
    ("name", "hosts", "problem"),
    [
        ("pod-7f9c", "", "pod-7f9c does not resolve ("),
        (
            "far",
            "192.0.2.77 far",
            "far resolves to 192.0.2.77, which is not an address of this host",
        ),
        ("1234567", "", "1234567 resolves to 0.18.214.135, which is not an address"),
        ("x" * 64, "", "x" * 64),
        ("near", "127.0.1.1 near", "None"),
        ("near", "::1 near", "None"),
    ],
    ids=["unknown", "foreign", "digits", "too-long", "debian", "ipv6"],
)
def test_a_name_by_which_this_host_cannot_be_reached_is_found(
    name: str, hosts: str, problem: str
) -> None:
    words = on_host(name, sys.executable, "-c", PROBLEM, hosts=hosts)
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
    assert out.startswith(problem)


def test_torchrun_is_preceded_by_a_line_about_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    """Torchrun itself waits for five minutes, and its processes do not exist yet."""
    project = configparser.ConfigParser()
    text = (ROOT / "pyproject.toml").read_text()
    group = '[project.entry-points."torchrun.handlers"]\n'
    project.read_string("[torchrun.handlers]\n" + text.partition(group)[2].partition("\n[")[0])
    package = tmp_path / "mnist_dist-0.dist-info"  # as an installation of this checkout writes it
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mnist-dist\nVersion: 0\n")
    entry = project["torchrun.handlers"]["mnist-dist"].strip('"')
    (package / "entry_points.txt").write_text(f"[torchrun.handlers]\nmnist-dist = {entry}\n")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2"]
    with subprocess.Popen(
        on_host("pod-7f9c", *torchrun, str(ROOT / "train_ddp.py")),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stderr is not None
        line = next(line for line in job.stderr if line.startswith("mnist-dist: "))
        job.kill()
    assert line.startswith("mnist-dist: warning: torchrun waits five minutes for this host, since ")
    assert "pod-7f9c does not resolve" in line
    assert "--local-addr=127.0.0.1" in line


def test_the_launch_script_needs_no_own_name(tmp_path: Path) -> None:
    words = ["--data=bundled", "--train-samples=100", "--epochs=1", "--run-dir=run"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        on_host("pod-7f9c", str(ROOT / "launch" / "local.sh"), *words),
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PROCESSES": "2"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "world  2 processes (torchrun)" in done.stdout
