"""Run the job and kill one rank inside an all-reduce of gradients, in the first start only.

KILLED_IN_SUM=RANK:NUMBER:NOTIFIED: in its NUMBER-th, before (0) or after (1) it notified its peers.
"""

import os
import signal

import train_ddp
from mnist_dist.distributed.shared_memory import HostBarrier


def die_in(number: int, notified: bool) -> None:
    """Kill this process when it is about to wait for its peers for the `number`-th time."""
    original_wait, waits = HostBarrier.wait, 0

    def wait(self: HostBarrier) -> None:
        nonlocal waits
        waits += 1
        if waits == number:
            for eventfd in self._others if notified else ():
                os.eventfd_write(eventfd, 1)
            os.kill(os.getpid(), signal.SIGKILL)
        original_wait(self)

    HostBarrier.wait = wait  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, number, notified = map(int, os.environ["KILLED_IN_SUM"].split(":"))
    if os.environ["RANK"] == str(rank) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_in(number, bool(notified))
    train_ddp.run()
