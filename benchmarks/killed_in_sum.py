"""The job, of which one rank is killed inside a sum of gradients, in its first start only.

KILLED_IN_SUM=RANK:SUM:TOLD: in its SUM-th, before (0) or after (1) it told the others of its part.
"""

import os
import signal

import train_ddp
from mnist_dist.distributed.shared_memory import HostBarrier


def die_in(number: int, told: bool) -> None:
    """Let this process be killed where it would wait for the others for the `number`-th time."""
    wait_for_all, waits = HostBarrier.wait, 0

    def wait(self: HostBarrier) -> None:
        nonlocal waits
        waits += 1
        if waits == number:
            for other in self._others if told else ():
                os.eventfd_write(other, 1)
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_all(self)

    HostBarrier.wait = wait  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, number, told = map(int, os.environ["KILLED_IN_SUM"].split(":"))
    if os.environ["RANK"] == str(rank) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_in(number, bool(told))
    train_ddp.run()
