"""Every figure in the documentation comes from a command here: `python -m benchmarks.NAME`."""
