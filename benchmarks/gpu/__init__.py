"""The GPU path on a real GPU: what it promises, and how fast it is."""
