"""A trace of some training steps, for TensorBoard's profiler plugin or Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
# The first steps allocate memory and are slower than the rest.
_SKIPPED, _TRACED = 10, 20


def profile_steps(step: Callable[..., T], directory: Path) -> Callable[..., T]:
    """Return `step` with its calls 10 to 30 traced into `directory`.

    Fewer calls leave no file. Once written, the file has a name that TensorBoard's plugin knows.
    """
    from torch.profiler import profile, schedule  # slow to import, and rarely used

    def export(trace: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(directory / "rank0.pt.trace.json.gz"))

    profiler = profile(
        schedule=schedule(skip_first=_SKIPPED - 1, wait=0, warmup=1, active=_TRACED, repeat=1),
        on_trace_ready=export,
    )
    profiler.start()

    def profiled_step(*args: Any) -> T:
        result = step(*args)
        profiler.step()
        return result

    return profiled_step
