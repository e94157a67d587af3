"""The project's Markdown files, taken apart: headings, links, code spans, commands."""

import re
from dataclasses import dataclass
from pathlib import Path

from checkout import project_files

_SHELLS = ("bash", "sh", "shell", "console")
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
# What a code span begins with if it is to be typed. `kill -9` is the name of a signal in our texts.
_PROGRAMS = frozenset(
    (
        *("python", "python3", "torchrun", "srun", "sbatch", "scancel", "mnist-dist", "..."),
        *("pip", "pytest", "ruff", "mypy", "git", "patch", "tensorboard", "ssh", "sysctl"),
        *("apt-get", "bash"),
    )
)


@dataclass(frozen=True)
class Document:
    """One file."""

    path: Path
    """Where it is, from which its links start."""
    text: str

    @property
    def prose(self) -> str:
        """The text without its fenced blocks."""
        return _FENCE.sub("", self.text)

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """Language, if it is said, and content of the fenced blocks."""
        return _FENCE.findall(self.text)

    @property
    def spans(self) -> list[str]:
        """Inline code, each on one line."""
        return [" ".join(span.split()) for span in _SPAN.findall(self.prose)]

    @property
    def links(self) -> list[str]:
        """Targets of links and pictures."""
        prose = _SPAN.sub("", self.prose)
        html = re.findall(r"<(?:a|img)\s[^>]*?(?:href|src)=\"([^\"]+)\"", prose)
        return re.findall(r"\]\(\s*<?([^)>\s]+)", prose) + html

    @property
    def anchors(self) -> set[str]:
        """What a link may have after its #, as GitHub makes it of the headings."""
        found: set[str] = set()
        for heading in re.findall(r"^#{1,6}\s+(.*?)\s*#*$", self.prose, re.MULTILINE):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            count = 0
            while (name := f"{slug}-{count}" if count else slug) in found:
                count += 1
            found.add(name)
        return found

    @property
    def commands(self) -> list[str]:
        """Lines of the shell's blocks, and code spans that can be typed, without their comments."""
        blocks = [body for language, body in self.blocks if language in _SHELLS]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        typed = [
            " ".join(re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").split()) for line in lines
        ]
        return [line for line in typed if line] + [
            span for span in self.spans if can_be_typed(span)
        ]


def can_be_typed(span: str) -> bool:
    """Whether it is a command, and not the name of a program, a file or a flag."""
    words = [word for word in span.split() if not re.match(r"[A-Z_]+=", word)]
    if not words:
        return False
    script = re.fullmatch(r"launch/\w+\.sh|\.ci/run", words[0]) is not None
    return script or (words[0] in _PROGRAMS and len(words) > 1)


def documents(root: Path) -> list[Document]:
    """All Markdown files that belong to the checkout `root`."""
    paths = [root / name for name in project_files() if name.endswith(".md")]
    return [Document(path, path.read_text()) for path in paths]


def broken_links(document: Document) -> list[str]:
    """Links to files that are not there, or to headings that the texts there have not."""
    broken = []
    for link in document.links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.path.parent / name).resolve() if name else document.path
        there = target.exists()
        if there and anchor:
            there = anchor in Document(target, target.read_text()).anchors
        if not there:
            broken.append(link)
    return broken
