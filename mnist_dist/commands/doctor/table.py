"""A round table: every rank's word reaches rank 0, and rank 0's word all.

Over the ranks' store alone, which works where the backend does not.
"""

import json
import time
from typing import Any

from torch.distributed import PrefixStore, Store

_POLL_S = 0.02


class Table:
    """The table of the ranks that share `store`. Words are what JSON can hold."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """Sit down; nobody is waited for."""
        self._store = PrefixStore("table", store)
        self._rank = rank
        self._world_size = world_size

    def collect(self, subject: str, word: Any, seconds: float) -> list[Any]:
        """Give this rank's word on `subject`.

        Returns:
            On rank 0 each rank's word, in rank order, and None for one that gave none within
            `seconds`; on other ranks nothing, at once.
        """
        self._store.set(f"{subject}/{self._rank}", json.dumps(word))
        if self._rank != 0:
            return []
        words: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while True:
            for rank in set(range(self._world_size)) - words.keys():
                if self._store.check([f"{subject}/{rank}"]):
                    words[rank] = json.loads(self._store.get(f"{subject}/{rank}"))
            if len(words) == self._world_size or time.monotonic() > deadline:
                return [words.get(rank) for rank in range(self._world_size)]
            time.sleep(_POLL_S)

    def tell(self, subject: str, word: Any) -> None:
        """Rank 0: give all the others a word on `subject`."""
        self._store.set(f"{subject}/told", json.dumps(word))

    def hear(self, subject: str) -> Any:
        """Rank 0's word on `subject`, when it comes."""
        key = f"{subject}/told"
        while not self._store.check([key]):
            time.sleep(_POLL_S)
        return json.loads(self._store.get(key))
