"""Exchange small messages between ranks through their torch.distributed store.

The store works when the backend does not: before there is a process group, and after it failed.
"""

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from torch.distributed import PrefixStore, Store

_POLL_S = 0.02


class StoreMailbox:
    """Messages that the ranks sharing a store leave for each other under unique keys.

    A payload is anything JSON can hold except None. Every method raises RuntimeError once the
    store's host is gone, and blocks while that host is stopped or unreachable.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        """Use the keys of `store` that start with `prefix`."""
        self._store = PrefixStore(prefix, store)

    def publish(self, key: str, payload: Any) -> None:
        """Make `payload` readable under `key` for every rank."""
        self._store.set(key, json.dumps(payload))

    def read(self, key: str) -> Any | None:
        """Return the payload under `key`, or None if there is none yet."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def wait_for(self, key: str, deadline: float = math.inf) -> Any:
        """Return the payload under `key` once it is there, or None at `deadline`."""
        return self.collect([key], deadline)[0]

    def collect(self, keys: Sequence[str], deadline: float) -> list[Any | None]:
        """Wait until there is a payload under each of `keys`, or until `deadline`; return them.

        What is missing at the deadline, a `time.monotonic()`, is None.
        """
        while not self._store.check(list(keys)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return [self.read(key) for key in keys]
