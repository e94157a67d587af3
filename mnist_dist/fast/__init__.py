"""Opt-in speed for the MLP on CPUs: `--step manual`. The rest of the project works without it."""
