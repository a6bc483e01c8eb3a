"""What the page for teachers must say of the chapters, in a folder laid out as the repository."""

from __future__ import annotations

import re
from pathlib import Path

import notebooks as nbs


def minutes_of_chapters(paths: list[Path]) -> dict[str, tuple[int, list[int]]]:
    """Return, by number, the minutes to teach and those of each exercise, as the chapters say."""
    found = {}
    for path in paths:
        text = "\n".join(nbs.source(c) for c in nbs.read(path)["cells"])
        (teach,) = re.findall(r"\*\*Time\.\*\* (\d+) minutes to teach", text)
        each = re.findall(r"^### Exercise \d+ \((\d+) minutes\)$", text, re.M)
        found[str(int(path.stem[:2]))] = int(teach), list(map(int, each))
    return found


def page_and_chapters(root: Path) -> tuple[str, list[Path]]:
    page = (root / "book" / "teaching.md").read_text(encoding="utf-8")
    return page, sorted((root / "notebooks").glob("*.ipynb"))


def tracks_agree(root: Path) -> None:
    """Compare the table with the minutes that chapters state, and its last row with their sums."""
    page, paths = page_and_chapters(root)
    _, *rows = (line[1:-1].split("|") for line in re.findall(r"^\|.*\|$", page, re.M))
    table = {
        row[0].strip(): [int(cell or 0) for cell in map(str.strip, row[1:])] for row in rows[1:]
    }
    chapters = minutes_of_chapters(paths)
    for first, (rounds, exercises, half, full, alone) in table.items():
        if number := re.match(r"\[(\d+)\]", first):
            teach, each = chapters.pop(number[1])
            assert (rounds, exercises, alone) == (teach, sum(each), teach + sum(each)), first
            assert {half, full} <= {0, teach + each[0]}, first
    assert chapters == {}
    sums = table.pop("sum")
    assert sums == [sum(column) for column in zip(*table.values(), strict=True)]


def has_a_word_on_every_chapter(root: Path) -> None:
    """Look for what to skip, where people get lost, and two questions with their answers."""
    page, paths = page_and_chapters(root)
    parts = re.split(r"^### (\d+) .*$", page, flags=re.M)[1:]
    assert parts[::2] == list(minutes_of_chapters(paths))
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        for word, least in (("**Skip** ", 1), ("**People get lost** ", 1), ("**Ask.** ", 2)):
            assert text.count(word) >= least, f"chapter {number} has too few {word}"
        assert text.count("*Answer.* ") == text.count("**Ask.** ")
        (path,) = (p for p in paths if p.stem.startswith(f"{int(number):02}"))
        headings = re.findall(
            r"^##+ (.+)$", "\n".join(nbs.source(c) for c in nbs.read(path)["cells"]), re.M
        )
        skipped = re.search(r"\*\*Skip\*\* (.+)", text)[1]
        for name in re.findall(r"\*([^*]+)\*", skipped):
            assert any(h.startswith(name) for h in headings), f"chapter {number} has no {name}"
