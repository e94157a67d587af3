"""README.zh-CN.md says what README.md says: the same commands, code, figures and links."""

import re
from collections import Counter

import pytest
from documents import Document
from processes import ROOT

_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def sections(name: str) -> list[Document]:
    path = ROOT / name
    parts = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)
    return [Document(path, part) for part in parts]


ENGLISH, CHINESE = sections("README.md"), sections("README.zh-CN.md")


def figures(section: Document) -> Counter[str]:
    """The numbers in the text around code and links."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", section.prose)
    return Counter(number.rstrip(",") for number in _NUMBER.findall(text))


def test_both_have_the_same_sections() -> None:
    assert len(CHINESE) == len(ENGLISH) > 8


@pytest.mark.parametrize(
    ("english", "chinese"),
    list(zip(ENGLISH, CHINESE, strict=False)),
    ids=[section.text.split("\n")[0] for section in ENGLISH],
)
def test_a_section_has_the_same_commands_code_figures_and_links(
    english: Document, chinese: Document
) -> None:
    assert chinese.blocks == english.blocks
    assert Counter(chinese.spans) == Counter(english.spans)
    assert figures(chinese) == figures(english)
    other = {"README.zh-CN.md": "README.md"}
    assert Counter(chinese.links) == Counter(other.get(link, link) for link in english.links)
    rows = [len(re.findall(r"^\|", part.prose, re.MULTILINE)) for part in (english, chinese)]
    assert rows[0] == rows[1]
