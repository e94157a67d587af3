"""What a disk may hold after a power loss: see benchmarks/crash_states.py for the model."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_PAGE = 4096


@dataclass(frozen=True)
class Operation:
    """A file operation that succeeded. Paths are relative to the watched directory."""

    kind: str
    """create, write, truncate, sync, rename, unlink or mkdir."""
    path: str
    target: str = ""
    """New name, of a rename."""
    offset: int = 0
    """Of a write; the new size, of a truncate."""
    content: bytes = b""


def read_trace(trace: Path, root: Path) -> Iterator[Operation]:
    """Yield what benchmarks/file_operations.c recorded below `root`."""
    recorded = trace.read_bytes()
    position = 0
    while position < len(recorded):
        end = recorded.index(b"\n", position)
        kind, *words = recorded[position:end].decode().split("\t")
        position = end + 1
        match kind:
            case "write":
                path, offset, count = words
                content = recorded[position : position + int(count)]
                position += int(count)
                yield Operation(kind, os.path.relpath(path, root), "", int(offset), content)
            case "truncate":
                size, path = words
                yield Operation(kind, os.path.relpath(path, root), "", int(size))
            case "rename":
                old, new = (os.path.relpath(path, root) for path in words)
                yield Operation(kind, old, new)
            case _:
                yield Operation(kind, os.path.relpath(words[0], root))


@dataclass(eq=False)
class File:
    """A file's content: what is durable, and what programs read before the power loss."""

    durable: bytes = b""
    content: bytearray = field(default_factory=bytearray)

    def after_power_loss(self, rng: random.Random) -> bytes:
        """Return a content that the disk may hold."""
        new = bytes(self.content)
        if new == self.durable:
            return new
        pairs = enumerate(zip(new, self.durable, strict=False))
        kept = next((n for n, (a, b) in pairs if a != b), min(len(new), len(self.durable)))
        missing = len(new) - kept
        match rng.choice(["all", "nothing", "beginning", "zeros", "anything", "pages"]):
            case "nothing":
                return self.durable
            case "beginning":
                return new[: rng.randint(kept, len(new))]
            case "zeros":
                return new[:kept] + bytes(missing)
            case "anything":
                return new[:kept] + rng.randbytes(missing)
            case "pages":
                pages = [
                    (max(kept, p), min(len(new), p + _PAGE)) for p in range(0, len(new), _PAGE)
                ]
                there = [
                    new[a:b] if rng.random() < 0.5 else bytes(b - a) for a, b in pages if a < b
                ]
                return new[:kept] + b"".join(there)
        return new


@dataclass(eq=False)
class Directory:
    """Names in a directory: what is durable, and the changes since, in order."""

    durable: "dict[str, File | Directory]" = field(default_factory=dict)
    changes: "list[dict[str, File | Directory | None]]" = field(default_factory=list)
    """Entries by name, None for a name that is gone; a rename is one change of two names."""

    @property
    def entries(self) -> "dict[str, File | Directory]":
        """Return the directory as programs see it."""
        return self._with(self.changes)

    def _with(
        self, changes: "list[dict[str, File | Directory | None]]"
    ) -> "dict[str, File | Directory]":
        entries = {**self.durable}
        for change in changes:
            for name, node in change.items():
                if node is None:
                    entries.pop(name, None)
                else:
                    entries[name] = node
        return entries

    def after_power_loss(self, rng: random.Random) -> "dict[str, File | Directory]":
        """Return entries that the disk may hold."""
        match rng.choice(["all", "none", "first", "any"]):
            case "none":
                return self._with([])
            case "first":
                return self._with(self.changes[: rng.randint(0, len(self.changes))])
            case "any":
                return self._with([change for change in self.changes if rng.random() < 0.6])
        return self.entries


class Disk:
    """A directory tree, all of it durable, and operations on it that are not."""

    def __init__(self, initial: Path) -> None:
        """Read the tree below `initial`."""
        self.root = self._read(initial)

    def _read(self, path: Path) -> Directory:
        entries: dict[str, File | Directory] = {}
        for child in path.iterdir():
            if child.is_dir():
                entries[child.name] = self._read(child)
            else:
                content = child.read_bytes()
                entries[child.name] = File(content, bytearray(content))
        return Directory(entries)

    def _find(self, path: str) -> File | Directory:
        node: File | Directory = self.root
        for name in Path(path).parts:
            assert isinstance(node, Directory)
            node = node.entries[name]
        return node

    def _parent(self, path: str) -> Directory:
        node = self._find(str(Path(path).parent))
        assert isinstance(node, Directory)
        return node

    def apply(self, operation: Operation) -> None:
        """Do what a program did."""
        path, name = operation.path, Path(operation.path).name
        match operation.kind:
            case "create":
                self._parent(path).changes.append({name: File()})
            case "mkdir":
                self._parent(path).changes.append({name: Directory()})
            case "unlink":
                self._parent(path).changes.append({name: None})
            case "rename":
                change = {name: None, Path(operation.target).name: self._find(path)}
                self._parent(path).changes.append(change)
            case "sync":
                node = self._find(path)
                if isinstance(node, Directory):
                    node.durable, node.changes = node.entries, []
                else:
                    node.durable = bytes(node.content)
            case "write" | "truncate":
                file = self._find(path)
                assert isinstance(file, File)
                if operation.kind == "truncate":
                    del file.content[operation.offset :]
                else:
                    end = operation.offset + len(operation.content)
                    file.content[operation.offset : end] = operation.content

    def lose_power(self, target: Path, rng: random.Random) -> None:
        """Write a state to `target` that the disk may hold if the power fails now."""
        self._write(self.root, target, rng)

    def _write(self, directory: Directory, target: Path, rng: random.Random) -> None:
        target.mkdir()
        for name, node in directory.after_power_loss(rng).items():
            if isinstance(node, Directory):
                self._write(node, target / name, rng)
            else:
                (target / name).write_bytes(node.after_power_loss(rng))
