"""A trace of some training steps, to be looked at in TensorBoard's profiler plugin or Perfetto."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
# The first steps allocate, and are not like the others.
_FIRST, _COUNT = 10, 20


def profiled(steps: Iterable[T], directory: Path) -> Iterator[T]:
    """`steps` itself; the operations of its steps 10 to 30 are written to `directory`.

    Args:
        steps: at least 30; fewer leave no file.
        directory: made if need be; the file's name in it is one that TensorBoard's plugin knows.

    Raises:
        OSError: the file cannot be written.
    """
    from torch.profiler import profile  # takes long to import, and is seldom used

    with contextlib.ExitStack() as running:
        trace = None
        for number, result in enumerate(steps):
            if trace is not None and number == _FIRST + _COUNT:
                running.close()
                directory.mkdir(parents=True, exist_ok=True)
                trace.export_chrome_trace(str(directory / "rank0.pt.trace.json.gz"))
            elif number == _FIRST:
                trace = running.enter_context(profile())
            yield result
