"""Download one file, with limits on time and size."""

import http.client
import time
import urllib.error
import urllib.request
from queue import Empty, SimpleQueue
from threading import Thread

from mnist_dist.data.errors import DataError

# The file that the original script used; MNIST_DIST_URL sets a mirror.
URL = (
    "https://raw.githubusercontent.com/mnielsen/neural-networks-and-deep-learning/"
    "master/data/mnist.pkl.gz"
)
REMEDY = "set MNIST_DIST_URL to a mirror of mnist.pkl.gz"

# Limit for connecting, and between two chunks of the response.
_IDLE_TIMEOUT_S = 10
# Limit for the whole download: a server that trickles never exceeds the one above.
_TOTAL_TIMEOUT_S = 300
# The file has 16 MB.
_MAX_BYTES = 64 << 20
_CHUNK = 1 << 18


def fetch(url: str) -> bytes:
    """Download `url`.

    Raises:
        DataError: no connection, an HTTP error, too slow, or too large; names `url`.
    """
    try:
        return _read(url, time.monotonic() + _TOTAL_TIMEOUT_S)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{url}: {_network_fault(error)}", REMEDY) from error


def _read(url: str, deadline: float) -> bytes:
    content = bytearray()
    with _open(url) as response:
        # read1 returns what has arrived; read would wait for a full chunk.
        while chunk := response.read1(_CHUNK):
            content += chunk
            if len(content) > _MAX_BYTES:
                raise DataError(f"{url}: serves more than {_MAX_BYTES:,} bytes", REMEDY)
            if time.monotonic() > deadline:
                raise DataError(f"{url}: not complete after {_TOTAL_TIMEOUT_S} s", REMEDY)
    return bytes(content)


def _open(url: str) -> http.client.HTTPResponse:
    """Call `urlopen` with a limit of `_IDLE_TIMEOUT_S` in total.

    The timeout of `urlopen` applies to each address of the server and not to the name lookup: on a
    cluster with a firewall that drops packets, every start of a job would hang for minutes.
    """
    outcome: SimpleQueue[http.client.HTTPResponse | Exception] = SimpleQueue()

    def attempt() -> None:
        try:
            outcome.put(urllib.request.urlopen(url, timeout=_IDLE_TIMEOUT_S))
        except Exception as error:
            outcome.put(error)

    Thread(target=attempt, daemon=True).start()
    try:
        response = outcome.get(timeout=_IDLE_TIMEOUT_S)
    except Empty:
        raise TimeoutError(f"no answer within {_IDLE_TIMEOUT_S} s") from None
    if isinstance(response, Exception):
        raise response
    return response


def _network_fault(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    # urllib wraps the error of the socket, which has the familiar message.
    reason = getattr(error, "reason", error)
    return getattr(reason, "strerror", None) or str(reason) or type(error).__name__
