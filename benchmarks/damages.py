"""Ways to damage a file of a run or of the cache: see benchmarks/damaged_files.py."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Malicious:
    """Executed by an unpickler that does not refuse it."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave a mark in the working directory."""
        return os.mkdir, ("executed",)


def _rewrite(change: Callable[[bytes, random.Random], bytes]) -> Callable[..., None]:
    def damage(path: Path, chance: random.Random) -> None:
        path.write_bytes(change(path.read_bytes(), chance))

    return damage


def _replace(make: Callable[[Path], Any]) -> Callable[..., None]:
    def damage(path: Path, chance: random.Random) -> None:
        _remove(path)
        make(path)

    return damage


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 8, 64])):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _other_value(value: Any, chance: random.Random) -> Any:
    """Replace a random value inside `value` by one of another kind."""
    if isinstance(value, dict | list) and value and chance.random() < 0.8:
        places = list(value) if isinstance(value, dict) else range(len(value))
        place = chance.choice(list(places))
        if chance.random() < 0.2:
            del value[place]
        else:
            value[place] = _other_value(value[place], chance)
        return value
    return chance.choice([None, [], {}, -1, 1.5, 10**30, True, "x", "\x1b[31m", [[1]], {"a": 1}])


def _wrong_json(content: bytes, chance: random.Random) -> bytes:
    lines = content.decode().splitlines()
    with contextlib.suppress(ValueError):
        return json.dumps(_other_value(json.loads(content), chance)).encode()
    for _ in range(chance.choice([1, 3])):
        if lines:
            number = chance.randrange(len(lines))
            with contextlib.suppress(ValueError):
                lines[number] = json.dumps(_other_value(json.loads(lines[number]), chance))
    return "\n".join([*lines, ""]).encode()


def _wrong_state(content: bytes, chance: random.Random) -> bytes:
    state = torch.load(io.BytesIO(content), weights_only=True)
    return _saved(_other_value(state, chance))


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _with_digest(change: Callable[[bytes, random.Random], bytes]) -> Callable[..., None]:
    """Change a checkpoint, and the SHA-256 in its sidecar with it."""

    def damage(path: Path, chance: random.Random) -> None:
        _rewrite(change)(path, chance)
        sidecar = path.with_suffix(".json")
        if sidecar.exists():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "sha256": digest}))

    return damage


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _full_directory(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("mine")


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def _swap(path: Path, chance: random.Random) -> None:
    others = [other for other in files_of_run(Path()) if other.is_file() and other != path]
    if path.suffix == ".pt" and (sidecar := path.with_suffix(".json")).exists():
        known = sidecar.read_text()  # names the checkpoint that this one replaced, which is sound
        others = [o for o in others if hashlib.sha256(o.read_bytes()).hexdigest() not in known]
    path.write_bytes(chance.choice(others).read_bytes())


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "missing": _replace(lambda path: None),
    "empty": _replace(lambda path: path.touch()),
    "FIFO": _replace(lambda path: os.mkfifo(path)),
    "socket": _replace(_socket),
    "directory": _replace(_full_directory),
    "link loop": _replace(lambda path: path.symlink_to(path.name)),
    "link to another's file": _replace(lambda path: path.symlink_to(Path("other/file").absolute())),
    "link to nothing": _replace(lambda path: path.symlink_to(Path("other/new").absolute())),
    "link to a device": _replace(lambda path: path.symlink_to("/dev/zero")),
    "a terabyte of zeros": _replace(_sparse),
    "cut": _rewrite(lambda content, chance: content[: chance.randrange(len(content) + 1)]),
    "flipped bits": _rewrite(_flip),
    "zeros": _rewrite(lambda content, chance: bytes(len(content))),
    "noise": _rewrite(lambda content, chance: chance.randbytes(len(content))),
    "appended noise": _rewrite(lambda content, chance: content + chance.randbytes(99)),
    "twice": _rewrite(lambda content, chance: content + content),
    "malicious pickle": _rewrite(lambda content, chance: pickle.dumps(Malicious())),
    "another file's content": _swap,
}
_OF_TEXTS: dict[str, Callable[[Path, random.Random], None]] = {
    "not UTF-8": _rewrite(lambda content, chance: content.replace(b'"', b'"\xff', 1) + b"\xff\n"),
    "deep JSON": _rewrite(lambda content, chance: b'{"a":' + b"[" * 100_000 + b"\n"),
    "a long number": _rewrite(lambda content, chance: b"1" * 10_000),
    "other JSON": _rewrite(lambda content, chance: chance.choice([b"[]", b"null", b'"x"', b"3"])),
    "JSON of other kinds": _rewrite(_wrong_json),
}
_OF_STATES: dict[str, Callable[[Path, random.Random], None]] = {
    "malicious checkpoint": _with_digest(lambda content, chance: _saved({"model": Malicious()})),
    "state of other kinds": _with_digest(_wrong_state),
}
ALL_DAMAGES = DAMAGES | _OF_TEXTS | _OF_STATES


def damages_of(path: Path) -> list[str]:
    """Return the names of what can be done to a file or directory."""
    if path.is_dir():
        return list(DAMAGES)[:10]  # those that replace it
    texts = list(_OF_TEXTS) if path.suffix in (".json", ".jsonl", ".lock") else []
    return [*DAMAGES, *texts, *(_OF_STATES if path.suffix == ".pt" else [])]


def files_of_run(root: Path) -> list[Path]:
    """Return the files and directories of the run and the cache, relative to `root`."""
    found = [root / "run", root / "cache", *(root / "run").rglob("*"), *(root / "cache").rglob("*")]
    return sorted(path.relative_to(root) for path in found)
