"""Fetch one file from the network, within bounds of time and size."""

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from mnist_dist.data.errors import DataError

# The original's address; MNIST_DIST_URL names a mirror.
URL = (
    "https://raw.githubusercontent.com/mnielsen/neural-networks-and-deep-learning/"
    "master/data/mnist.pkl.gz"
)
REMEDY = "set MNIST_DIST_URL to a mirror of mnist.pkl.gz"

# To connect, and between two pieces of the answer.
_SILENCE_S = 10
# For all of it: a server that trickles never falls silent.
_WHOLE_S = 300
# The file has 16 MB.
_MOST_BYTES = 64 << 20
_PIECE = 1 << 18


def fetch(url: str, file: Path) -> None:
    """Write what `url` serves to `file`.

    Raises:
        DataError: no connection, an HTTP error, too slow, or too large; names `url`.
    """
    try:
        _copy(url, file, time.monotonic() + _WHOLE_S)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{url}: {_network_fault(error)}", REMEDY) from error


def _copy(url: str, file: Path, deadline: float) -> None:
    size = 0
    with _open(url) as answer, file.open("wb") as out:
        # read1 returns what has come; read would wait for a full piece, however slowly it trickles.
        while piece := answer.read1(_PIECE):
            size += out.write(piece)
            if size > _MOST_BYTES:
                raise DataError(f"{url}: serves more than {_MOST_BYTES:,} bytes", REMEDY)
            if time.monotonic() > deadline:
                raise DataError(f"{url}: not complete after {_WHOLE_S} s", REMEDY)


def _open(url: str) -> http.client.HTTPResponse:
    """`urlopen` in `_SILENCE_S` all told.

    Its own timeout starts anew for each address of the server and leaves out the name look-up: on
    a cluster whose firewall drops packets, every start of a job would hang for minutes.
    """
    outcome: SimpleQueue[http.client.HTTPResponse | Exception] = SimpleQueue()

    def attempt() -> None:
        try:
            outcome.put(urllib.request.urlopen(url, timeout=_SILENCE_S))
        except Exception as error:
            outcome.put(error)

    Thread(target=attempt, daemon=True).start()
    try:
        answer = outcome.get(timeout=_SILENCE_S)
    except Empty:
        raise TimeoutError(f"no answer within {_SILENCE_S} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _network_fault(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    # urllib wraps the socket's error, whose own words are the ones people know.
    reason = getattr(error, "reason", error)
    return getattr(reason, "strerror", None) or str(reason) or type(error).__name__
