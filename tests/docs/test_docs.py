"""What the documentation names is there: links, files, tests, flags, and commands that were run."""

import ast
import importlib
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from command_table import COMMANDS, By, Here, Never
from data_files import digits, write_pickle
from documents import Document, broken_links, documents
from processes import ROOT, command, run_main, run_ranks
from test_readme import blocks

DOCUMENTS = documents(ROOT)
TYPED = sorted({typed for document in DOCUMENTS for typed in document.commands})
# The name in capitals is for the reader to fill in.
BENCHMARKS = [typed for typed in TYPED if re.match(r"python -m benchmarks\.[a-z]", typed)]
FOLDERS = "benchmarks|docs|examples|launch|mnist_dist|tests"
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def name(document: Document) -> str:
    return str(document.path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_link_leads_somewhere(document: Document) -> None:
    assert broken_links(document) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_file_and_test_that_is_named_exists(document: Document) -> None:
    files = [span for span in document.spans if re.fullmatch(rf"({FOLDERS})/[\w./-]*", span)]
    assert [file for file in files if not (ROOT / file).exists()] == []
    tests = [span for span in document.spans if re.fullmatch(r"test_\w+", span)]
    assert [test for test in tests if test not in all_tests()] == []


@cache
def all_tests() -> set[str]:
    return set().union(*(names_of_tests(file) for file in (ROOT / "tests").rglob("test_*.py")))


def names_of_tests(file: Path) -> set[str]:
    functions = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
    return {function.name for function in functions if function.name.startswith("test_")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_block_is_closed(document: Document) -> None:
    """Else what follows it would be neither read as text nor looked at here."""
    outside_fences = [document.prose, *(body for _, body in document.blocks)]
    assert ["```" in text for text in outside_fences] == [False] * len(outside_fences)


def test_every_command_has_its_row_and_every_row_its_command() -> None:
    found = {typed for typed in TYPED if not typed.startswith("python -m benchmarks.")}
    assert sorted(found - set(COMMANDS)) == [], "say in command_table.py who runs these"
    assert sorted(set(COMMANDS) - found) == [], "no document names these: drop their rows"


@pytest.mark.parametrize("typed", [typed for typed, row in COMMANDS.items() if isinstance(row, By)])
def test_what_is_run_elsewhere_stands_in_the_test_that_is_named(typed: str) -> None:
    row = COMMANDS[typed]
    assert isinstance(row, By)
    path, _, test = row.test.partition("::")
    file = ROOT / path
    if path.startswith("tests/"):
        assert test in names_of_tests(file)
    sources = "".join(source.read_text() for source in [file, *helpers(file)])
    assert "".join(row.as_text.split()) in "".join(sources.split())


def test_what_the_test_of_readme_runs_stands_where_that_test_looks() -> None:
    rows = {typed: row for typed, row in COMMANDS.items() if isinstance(row, By)}
    typed_there = [typed for typed, row in rows.items() if "/test_readme.py::" in row.test]
    assert len(typed_there) >= 5
    assert [typed for typed in typed_there if typed not in "".join(blocks("bash"))] == []


def helpers(file: Path) -> Iterator[Path]:
    """The modules of the tests and of the benchmarks that a test imports."""
    if file.suffix != ".py":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(alias.name for alias in node.names)]
            for module in names:
                yield from (ROOT / "tests").rglob(f"{module.rpartition('.')[2]}.py")
                yield from (ROOT / "benchmarks").glob(f"{module.rpartition('.')[2]}.py")


def test_what_is_run_by_nobody_has_a_reason() -> None:
    reasons = {typed: row.why for typed, row in COMMANDS.items() if isinstance(row, Never)}
    assert [typed for typed, why in reasons.items() if len(why.split()) < 4] == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a command finds in a checkout, and a place for its runs; the files that texts name."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("train_ddp.py", "docs", "launch"):
        (directory / name).symlink_to(ROOT / name)
    write_pickle(directory / "path" / "to" / "mnist.pkl.gz", digits(train=600, test=100))
    return directory


@pytest.mark.parametrize(
    "typed", [typed for typed, row in COMMANDS.items() if isinstance(row, Here)]
)
def test_the_command_runs_as_written(typed: str, checkout: Path) -> None:
    row = COMMANDS[typed]
    assert isinstance(row, Here)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = re.sub(r"^\.\.\.", "python", typed)
    ended = command(checkout, "bash", "-ec", script, environment={"PATH": path, "PIP_QUIET": "0"})
    assert ended.code == 0, ended.out + ended.err
    assert re.search(row.says, ended.out), ended.out


def module_and_flags(typed: str) -> tuple[str, list[str]] | None:
    """Which of our programs a command starts, and the flags that it gives it; None for others'."""
    words = typed.split()
    for number, word in enumerate(words):
        rest = words[number + 1 :]
        if word.startswith("benchmarks.") and word.islower():
            return word, FLAG.findall(" ".join(rest))
        if word.endswith(("train_ddp.py", ".sbatch", "local.sh", "host.sh")):
            return "train_ddp", FLAG.findall(" ".join(rest))
        if word in ("mnist-dist", "mnist_dist") and rest:
            package = (ROOT / "mnist_dist" / "commands" / rest[0]).is_dir()
            module = f"mnist_dist.commands.{rest[0]}{'.command' if package else ''}"
            return module, FLAG.findall(" ".join(rest[1:]))
    return None


OURS = {typed: found for typed in TYPED if (found := module_and_flags(typed))}


@cache
def help_of(module: str) -> str:
    (ended,) = run_ranks(run_main, 1, str(ROOT), [module], __name__)
    assert ended.code == 0, ended.err
    said: str = ended.out
    return said


def main(words: list[str]) -> int:
    """`MODULE --help`, for `help_of`."""
    sys.argv = [words[0], "--help"]
    module = importlib.import_module(words[0])
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{words[0]}.__main__")
    if words[0].startswith("benchmarks."):
        module.main()
    return int(getattr(module, "main", module.run)(["--help"]))


@pytest.mark.parametrize("module", sorted({module for module, _ in OURS.values()}))
def test_the_flags_that_are_named_are_those_of_the_programs_help(module: str) -> None:
    named = {flag for own, flags in OURS.values() if own == module for flag in flags}
    assert named - set(FLAG.findall(help_of(module))) == set()


def test_every_flag_in_readmes_table_is_in_the_programs_help() -> None:
    (table,) = re.findall(r"\| flag \| default \|.*?\n\n", (ROOT / "README.md").read_text(), re.S)
    cells = [line.split("|")[1] for line in table.splitlines()[2:] if line]
    named = {flag for cell in cells for flag in FLAG.findall(cell)}
    assert len(named) >= 20
    assert named - set(FLAG.findall(help_of("train_ddp"))) == set()


def test_broken_links_and_unlisted_commands_would_be_found(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# Two `words`, here\n\n```\n# no heading\n```\n\n## Again\n\n## Again\n")
    text = (
        "# Top\n[a](other.md#two-words-here) [b](#top) [c](other.md#again-1) [d](https://e.org/f)\n"
        "[g](gone.md) [h](other.md#no-heading) ![i](j.png) `[k](l.md)` [m](#bottom)\n\n"
        "Type `torchrun --nproc_per_node=2\ntrain_ddp.py`, not `torchrun`, `kill -9` or `--lr 1`.\n"
        "```bash\nmnist-dist runs \\\n  --json   # a comment\n# and another\n```\n```\nls -l\n```\n"
        "| here | `A=1 launch/local.sh` |\n"
    )
    document = Document(tmp_path / "text.md", text)
    document.path.write_text(text)
    assert broken_links(document) == ["gone.md", "other.md#no-heading", "j.png", "#bottom"]
    assert document.commands == [
        "mnist-dist runs --json",
        "torchrun --nproc_per_node=2 train_ddp.py",
        "A=1 launch/local.sh",
    ]
