"""File systems that cannot be mounted here, for the tests of what is written to them."""

import os
import stat

import pytest


def directories_cannot_be_flushed(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer as file systems do that cannot be mounted here."""
    fsync = os.fsync

    def answer(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", answer)
