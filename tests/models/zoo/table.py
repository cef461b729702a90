"""The table of docs/models.md, from the entries: what the test runs is what it says."""

from __future__ import annotations

import re
from pathlib import Path

from .entries import ENTRIES
from .entry import Entry
from .run import GENERATIONS

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "models.md"
BEGIN, END = "<!-- zoo:begin -->", "<!-- zoo:end -->"
HEAD = ("Model", "Class", "Attention", "Logits, gradients", "Padding", *(name.capitalize() for name in GENERATIONS))


def row(entry: Entry) -> tuple[str, ...]:
    """Of one model: what is compared, or what the error says."""
    if entry.refused:
        told = entry.refused.strip("^ ")
        return (entry.name, f"`{entry.model}`", entry.attention, f"refused: `{told}`", *["-"] * (len(HEAD) - 4))
    padding = "yes" if len(entry.sides) == 2 else " ".join(entry.sides) or "-"
    ticks = ("yes" if name in entry.generations else "-" for name in GENERATIONS)
    return (entry.name, f"`{entry.model}`", entry.attention, "yes", padding, *ticks)


def table() -> str:
    """Markdown, with notes below."""
    lines = [HEAD, tuple("---" for _ in HEAD), *(row(entry) for entry in ENTRIES)]
    notes = [f"- {entry.name}: {entry.notes}" for entry in ENTRIES if entry.notes]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{BEGIN}\n{text}\n" + ("\n" + "\n".join(notes) + "\n" if notes else "") + END


def document() -> str:
    """docs/models.md with the table as it should be."""
    text = DOCUMENT.read_text()
    return re.sub(f"{BEGIN}.*{END}", lambda _: table(), text, flags=re.DOTALL)
