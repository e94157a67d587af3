"""Streams with a size limit, so that a file cannot decide how much memory is used."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from mnist_dist.data.errors import MalformedError

# The largest valid file is the pickle, 220 MB of float32 once unpacked.
LIMIT = 1 << 30


class BoundedStream:
    """A binary stream of at most `LIMIT` bytes.

    A request for more than is left is refused before memory is allocated: neither a gzip bomb nor
    a header that claims terabytes costs anything.
    """

    def __init__(self, stream: IO[bytes] | gzip.GzipFile) -> None:
        self._stream = stream
        self._left = LIMIT

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end. Raises `MalformedError` beyond the limit."""
        self.spend(size)
        return self._stream.read(size)

    def readline(self) -> bytes:
        """The next line. Raises `MalformedError` beyond the limit."""
        line = self._stream.readline(self._left + 1)
        self.spend(len(line))
        return line

    def spend(self, size: int) -> None:
        """Count `size` bytes against the limit. Raises `MalformedError` beyond it."""
        if not 0 <= size <= self._left:
            raise MalformedError(f"claims more than the {LIMIT:,} bytes that a data set can need")
        self._left -= size

    def read_exactly(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises `MalformedError` if the stream ends earlier."""
        data = self.read(size)
        if len(data) < size:
            raise MalformedError(f"is cut short: {size:,} bytes expected, {len(data):,} left")
        return data

    def expect_end(self) -> None:
        """Raise `MalformedError` if anything is left.

        Reading to the end also makes gzip and zip compare their checksums.
        """
        if self._stream.read(1):
            raise MalformedError("continues after the end of its data")


@contextmanager
def unpacked(content: bytes) -> Iterator[BoundedStream]:
    """Read `content`, through gzip if it starts with its magic number (RFC 1952)."""
    raw = io.BytesIO(content)
    if not content.startswith(b"\x1f\x8b"):
        yield BoundedStream(raw)
        return
    with gzip.GzipFile(fileobj=raw) as stream:
        yield BoundedStream(stream)
