"""Every way to take a step gives the same numbers, and says which it is."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Ended, completed_run, metrics, run_job, run_main, run_ranks

FLAGS = ["--data=bundled", "--train-samples=640", "--lr=0.05", "--epochs=2"]


def losses(run: Path) -> list[float]:
    return [r[name] for r in metrics(run) for name in ("train/loss", "val/loss") if name in r]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step_*.pt"))
    model: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["model"]
    return model


def test_by_hand_and_by_autograd_end_in_the_same_bits(tmp_path: Path) -> None:
    """Also with momentum, weight decay and a schedule, and batches of powers of two."""
    flags = [*FLAGS, "--momentum=0.9", "--weight-decay=0.001", "--schedule=onecycle"]
    by_hand = completed_run(tmp_path / "hand", 1, *flags, "--step=manual")
    by_autograd = completed_run(tmp_path / "autograd", 1, *flags)
    assert losses(by_hand) == losses(by_autograd)
    for name, weight in weights(by_autograd).items():
        assert torch.equal(weights(by_hand)[name], weight), name


def run_on_threads(threads: int, directory: str, flags: list[str]) -> Ended:
    """The job in this process, as a user who sets OMP_NUM_THREADS has it."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return run_main(directory, flags)


def test_the_number_of_threads_changes_no_bit(tmp_path: Path) -> None:
    """Here two threads may have one core; on some batches the job may decide to take fewer."""
    flags = [*FLAGS, "--train-samples=4000", "--epochs=20", "--momentum=0.9"]
    flags += ["--step=manual"]
    found = []
    for threads in (1, 2, 3):
        (ended,) = run_ranks(
            run_on_threads, 1, threads, str(tmp_path), [f"--run-dir=run-{threads}", *flags]
        )
        assert ended.code == 0, ended
        found.append(tmp_path / f"run-{threads}")
    for other in found[1:]:
        assert losses(other) == losses(found[0])
        for name, weight in weights(found[0]).items():
            assert torch.equal(weights(other)[name], weight), name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "autograd, gradients over shared memory"),
        (["--shared-memory=off"], "autograd, gradients over gloo"),
        (["--step=manual", "--shared-memory=off"], "by hand, gradients over gloo"),
    ],
)
def test_every_way_gives_the_same_losses_at_1_2_3_4_and_7_processes(
    flags: list[str], said: str, tmp_path: Path
) -> None:
    few = [*FLAGS, "--global-batch-size=50"]
    expected = losses(completed_run(tmp_path / "plain", 1, *few))
    assert losses(completed_run(tmp_path, 1, *few, *flags)) == pytest.approx(expected, rel=1e-5)
    for world_size in (2, 3, 4, 7):
        run = tmp_path / f"run-{world_size}"
        ended = run_job(tmp_path, world_size, f"--run-dir={run}", *few, *flags)
        assert f"step   {said}\n" in ended[0].out, ended
        assert losses(run) == pytest.approx(expected, rel=1e-5), world_size


def test_a_run_begun_by_autograd_goes_on_by_hand_to_the_same_bits(tmp_path: Path) -> None:
    flags = [*FLAGS, "--momentum=0.9"]
    whole = completed_run(tmp_path / "whole", 2, *flags, "--step=manual")
    run = completed_run(tmp_path / "parts", 2, *flags, "--epochs=1")
    ended = run_job(tmp_path, 2, f"--run-dir={run}", *flags, "--step=manual")
    assert "resume at step 10, 1 epoch done" in ended[0].out, ended
    assert losses(run)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-6)


def test_a_compiled_model_gives_the_same_losses_or_says_why_it_is_none(tmp_path: Path) -> None:
    expected = losses(completed_run(tmp_path / "plain", 2, *FLAGS))
    run = tmp_path / "compiled"
    ended = run_job(tmp_path, 2, f"--run-dir={run}", *FLAGS, "--compile")
    assert "step   autograd, compiled, " in ended[0].out or "not compiled (" in ended[0].out, ended
    assert losses(run) == pytest.approx(expected, rel=1e-5)


def test_compressed_gradients_still_learn(tmp_path: Path) -> None:
    flags = [*FLAGS, "--epochs=4", "--momentum=0.9", "--grad-compression=powersgd"]
    run = completed_run(tmp_path, 2, *flags)
    curve = losses(run)
    assert curve[-1] < 0.8 * curve[0]
    exact = losses(completed_run(tmp_path / "exact", 2, *flags, "--grad-compression=none"))
    assert curve != pytest.approx(exact, rel=1e-5), "nothing was compressed"


def test_bfloat16_learns_nearly_the_same_at_any_number_of_processes(tmp_path: Path) -> None:
    flags = [*FLAGS, "--epochs=4"]
    exact = losses(completed_run(tmp_path / "fp32", 1, *flags))
    for processes in (1, 2):
        run = completed_run(tmp_path / str(processes), processes, *flags, "--precision=bf16")
        assert losses(run) == pytest.approx(exact, rel=0.02)
        assert losses(run) != pytest.approx(exact, rel=1e-6), "it is another precision"


def test_a_precision_that_the_device_lacks_is_one_line(tmp_path: Path) -> None:
    ended = run_job(tmp_path, 2, *FLAGS, "--device=cpu", "--precision=tf32", "--run-dir=run")
    assert [rank.code for rank in ended] == [2, 2]
    (line,) = "".join(rank.err for rank in ended).splitlines()
    assert "--precision tf32: needs a GPU" in line
    assert not (tmp_path / "run").exists()


def test_compression_that_the_backend_cannot_do_is_one_line(tmp_path: Path) -> None:
    first, second = run_job(tmp_path, 2, "--run-dir=run", *FLAGS, "--grad-compression=bf16")
    assert (first.code, second.code) == (2, 2)
    assert first.err.startswith("mnist-dist: error: --grad-compression bf16: ")
    assert first.err.count("\n") == 1
    assert second.err == ""
    assert not (tmp_path / "run").exists()


def test_a_profile_is_a_trace_of_steps_and_changes_no_number(tmp_path: Path) -> None:
    flags = [*FLAGS, "--global-batch-size=16"]
    expected = losses(completed_run(tmp_path / "plain", 1, *flags))
    run = completed_run(tmp_path / "profiled", 1, *flags, "--profile")
    with gzip.open(run / "profile" / "rank0.pt.trace.json.gz") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::addmm" for event in events) == 3 * 20
    assert losses(run) == expected
