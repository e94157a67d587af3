"""How quickly an epoch is trained, and how large its last gradient is."""

import time

from mnist_dist.sampling import Sharding
from mnist_dist.steps import Step


class EpochClock:
    """Measures one epoch's training on this rank."""

    def __init__(self, step: Step, sharding: Sharding, first: int) -> None:
        """Start, before global batch `first` of the epoch."""
        self._step = step
        self._sharding = sharding
        self._first = first
        self._adding_up = step.seconds_adding_up
        self._started = time.perf_counter()

    def figures(self) -> dict[str, float]:
        """The figures of the epoch, now that it is trained, by their tags.

        There are none if it was trained before: a stop may come after an epoch's last step.
        """
        seconds = time.perf_counter() - self._started
        steps = self._sharding.steps_per_epoch - self._first
        if steps == 0:
            return {}
        figures = {
            "perf/samples_per_second": self._sharding.samples_from(self._first) / seconds,
            "perf/step_ms": 1e3 * seconds / steps,
        }
        adding_up = self._step.seconds_adding_up
        if self._sharding.world_size > 1 and adding_up is not None and self._adding_up is not None:
            figures["perf/communication_share"] = (adding_up - self._adding_up) / seconds
        if (norm := self._step.gradient_norm()) is not None:
            figures["train/gradient_norm"] = norm
        return figures
