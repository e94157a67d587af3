"""What the benchmarks patch into the job still fits it."""

from benchmarks import start


def test_the_jobs_start_is_measured_up_to_its_first_step() -> None:
    assert start.seconds_until_output(start.OUR_START, "--data=bundled", "--epochs=1") > 0


def test_the_jobs_memory_is_measured_after_its_first_validation() -> None:
    assert start.our_memory("bundled", 1) > 0
