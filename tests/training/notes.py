"""A corpus of notes that tiny models learn in a few steps."""

from __future__ import annotations

WORDS = (
    "the",
    "teacher",
    "knows",
    "which",
    "word",
    "may",
    "follow",
    "and",
    "the",
    "student",
    "learns",
)


def write_notes(folder):
    """Forty small files, alike enough to be learnt in a few steps."""
    for i in range(40):
        lines = (" ".join(WORDS[(i + j) % 7 :]) + f" {j % 5}.\n" for j in range(20))
        (folder / f"note{i}.txt").write_text("".join(lines))
    return folder
