"""Kills during saves lose no checkpoint; `python -m benchmarks.faults` makes 300 of them."""

from benchmarks.faults import kill_in_save


def test_a_writer_killed_at_random_instants_leaves_a_sound_newest_checkpoint_and_no_strays() -> (
    None
):
    assert kill_in_save("ours", 15) == (0, 0)
