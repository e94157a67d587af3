"""TensorBoard shows what metrics.jsonl holds, also after a kill or on a clock that was set back."""

import os
import signal
from pathlib import Path

from processes import ROOT, Ended, command, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.live_job import LiveJob

FLAGS = ["--data=bundled", "--train-samples=400", "--lr=0.05"]
CLOCK_SET_BACK = "import time\nreal = time.time\ntime.time = lambda: real() - 3600\n"
PRINT_IMPORTED = """
import os, sys, train_ddp
code = train_ddp.main(sys.argv[1:])
found = {name.partition(".")[0] for name in sys.modules} & {"tensorboard", "PIL"}
print("rank", os.environ["RANK"], *sorted(found), flush=True)
sys.exit(code)
"""


def train(directory: Path, *flags: str, path: Path | None = None) -> Ended:
    """Run the job in one process of its own, with `path` first among Python's directories."""
    search = [str(path)] if path else []
    search += [value] if (value := os.environ.get("PYTHONPATH")) else []
    words = ["python", str(ROOT / "train_ddp.py"), *FLAGS, *flags]
    return command(directory, *words, environment={"PYTHONPATH": os.pathsep.join(search)})


def require_agreement(run: Path, epochs: int) -> None:
    """TensorBoard has the points of metrics.jsonl, each once."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    for tag, count in (("val/loss", epochs), ("test/loss", 1)):
        steps = [record["step"] for record in metrics(run) if tag in record]
        assert [point.step for point in events.Scalars(tag)] == steps
        assert len(steps) == count


def test_a_clock_set_back_hides_no_points(tmp_path: Path) -> None:
    run, site = tmp_path / "run", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(CLOCK_SET_BACK)
    for epochs, path in ((2, None), (5, site)):
        ended = train(tmp_path, f"--run-dir={run}", f"--epochs={epochs}", path=path)
        assert ended.code == 0, ended.err
    times = [record["time"] for record in metrics(run) if "val/loss" in record]
    assert times[2] < times[1] - 3000, "the clock was set back"
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in events.Scalars("val/loss")] == [7, 14, 21, 28, 35]
    assert [point.step for point in events.Scalars("test/loss")] == [14, 35]


def test_a_killed_and_resumed_run_has_every_point_once(tmp_path: Path) -> None:
    flags = [*FLAGS, "--epochs=60", "--checkpoint-every-epochs=3"]
    for done in (5, 30):
        with LiveJob(tmp_path, 1, *flags) as job:
            job.until(
                lambda done=done: (
                    (job.run / "metrics.jsonl").exists()  # type: ignore[misc]
                    and len(metrics(job.run)) >= done
                )
            )
            os.kill(job.pid_of(0), signal.SIGKILL)
    with LiveJob(tmp_path, 1, *flags) as job:
        assert job.wait() == 0, job.output
        assert "resume at step" in job.output
        require_agreement(job.run, epochs=60)


def test_an_installed_tensorflow_is_not_imported(tmp_path: Path) -> None:
    package = tmp_path / "site" / "tensorflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\nraise ImportError\n"
    )
    run = tmp_path / "run"
    ended = train(tmp_path, f"--run-dir={run}", "--epochs=1", path=tmp_path / "site")
    assert ended.code == 0, ended.err
    assert not (tmp_path / "imported").exists()
    require_agreement(run, epochs=1)


def test_only_rank_0_imports_tensorboard_and_pillow(tmp_path: Path) -> None:
    script = tmp_path / "print_imported.py"
    script.write_text(PRINT_IMPORTED)
    words = ["torchrun", "--nproc_per_node=2", str(script), *FLAGS, "--epochs=1"]
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = command(tmp_path, *words, environment={"PYTHONPATH": search})
    assert ended.code == 0, ended.err
    found = [line for line in ended.out.splitlines() if line.startswith("rank ")]
    assert sorted(found) == ["rank 0 PIL tensorboard", "rank 1"]
