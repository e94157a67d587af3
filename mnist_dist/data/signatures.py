"""Identify an unreadable file by its first bytes, and give the remedy."""

from mnist_dist.data.errors import MalformedError

HEAD = 512
"""Bytes that distinguish the formats."""

SAVE_AS_NPZ = "save x_train, y_train, x_test and y_test with numpy.savez, and pass that file"
_DOWNLOAD = "download the file itself, by its direct link, or pass another file with --data"
_UNPACK = "unpack it and pass what is in it"
BIG_ENDIAN = "write its numbers big-endian, as struct's '>I' does, or download it again"

# Offset, first bytes as published by each format, what it is, remedy.
_SIGNATURES = (
    (0, b"version https://git-lfs", "is a Git LFS pointer, not the file", "run `git lfs pull`"),
    (0, b"\x1f\x8b", "is packed twice, gzip in gzip", "unpack it once with gunzip, and pass that"),
    (0, b"PK\x03\x04", "is a zip file in gzip", "unpack it once with gunzip, and pass that"),
    (0, b"BZh", "is a bzip2 file", _UNPACK),
    (0, b"\xfd7zXZ\0", "is an xz file", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "is a Zstandard file", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "is a RAR archive", _UNPACK),
    (257, b"ustar", "is a tar archive", _UNPACK),
    (0, b"\x93NUMPY", "is a single NumPy array", SAVE_AS_NPZ),
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file", SAVE_AS_NPZ),
    (0, b"MATLAB 5.0 MAT-file", "is a MATLAB file", SAVE_AS_NPZ),
    (0, b"PAR1", "is a Parquet file", SAVE_AS_NPZ),
    (0, b"ARROW1", "is an Arrow file", SAVE_AS_NPZ),
    (0, b"SQLite format 3\0", "is a SQLite database", SAVE_AS_NPZ),
    (0, b"\x89PNG\r\n\x1a\n", "is a PNG image", SAVE_AS_NPZ),
    (0, b"\xff\xd8\xff", "is a JPEG image", SAVE_AS_NPZ),
    (0, b"%PDF-", "is a PDF document", _DOWNLOAD),
    (1, b"\x08\0\0", "is an IDX file in the wrong byte order", BIG_ENDIAN),
)
_MARKUP = (
    (b"<!doctype html", "is an HTML page, not data"),
    (b"<html", "is an HTML page, not data"),
    (b"<?xml", "is an XML document, not data"),
    (b"<", "is markup, not data"),
    (b"{", "is JSON, not data"),
)


def identify(head: bytes) -> MalformedError | None:
    """Identify a file that starts with `head`, up to `HEAD` bytes; None if unknown."""
    for offset, magic, kind, remedy in _SIGNATURES:
        if head.startswith(magic, offset):
            return MalformedError(kind, remedy)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for opening, kind in _MARKUP:
        if text[: len(opening)].lower() == opening:
            return MalformedError(kind, _DOWNLOAD)
    if head and not head.strip(b"\0"):
        return MalformedError("starts with zeros: it was not written completely")
    return None


def unknown(head: bytes) -> MalformedError:
    """Refuse a file that starts with `head`, and identify it if possible."""
    if error := identify(head):
        return error
    if head and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return MalformedError("is a text file", SAVE_AS_NPZ)
    return MalformedError(
        "has an unknown format",
        "pass an mnist.pkl.gz, an mnist.npz, or a directory or zip of IDX files",
    )
