"""The files of this checkout, also of one that came as an archive, without git's metadata."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from processes import ROOT

# As in .gitignore, which an archive's reader does not have to obey.
_LEFT_OUT = {"__pycache__", "build", "dist", "runs", ".venv"}


def project_files() -> list[str]:
    """Names of all files, relative to the root, sorted."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        listed = subprocess.check_output(words, cwd=ROOT, text=True).split("\0")
        return sorted(name for name in listed if name and (ROOT / name).exists())
    return sorted(_walk(ROOT))


def _walk(directory: Path) -> Iterator[str]:
    for path in directory.iterdir():
        name = path.name
        if path.is_file():
            yield str(path.relative_to(ROOT))
        elif name not in _LEFT_OUT and not name.endswith((".egg-info", "_cache", ".hypothesis")):
            yield from _walk(path)


def copy_checkout(directory: Path) -> None:
    """Copy all files, as an archive of the checkout unpacks."""
    for name in project_files():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
