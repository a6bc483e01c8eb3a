"""Begin a chapter: a small one that follows every rule and runs, ready to be filled in.

From then on, a failing check points to the last change. The template, ``01_small.ipynb``, is itself
a complete chapter, which the tests of the tools also use.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import notebooks as nbs
from notebooks import ROOT

TEMPLATE = Path(__file__).with_name("01_small.ipynb")
NAME = re.compile(r"[0-9]{2}(_[a-z0-9]+)+")
NEXT = """\
notebooks/{name}.ipynb follows every rule and runs. It is now the last chapter in _toc.yml, with
wrong answers in tests/wrong_answers/{name}.py, and a row and a section in book/teaching.md.
Next:
- write it in JupyterLab: make lab, then open the folder notebooks
- run it alone: .venv/bin/python tools/run_notebooks.py {number}
- before you commit: .venv/bin/python tools/anatomy.py strip, then the same with check
- link to it from book/welcome.md and from the end of the chapter before it
- fill its section of book/teaching.md, and update the minutes in the table there
- when it is complete: make lint, make book, make test"""
MINUTES = (10, 6, 0, 0, 16)  # the template's row in the table for teachers
WRONG = """\
WRONG = {
    1: [(1, "not the sum"), (3, "not the sum")],
    2: [(2, "not the sum"), (4, "not the sum")],
}
"""
SECTION = """
### {number} {words}

**Skip** *Round 4*, unless the class asks for it.

**People get lost** where they confuse two things: say what helps.

**Ask.** What does the class expect before the chapter?
*Answer.* What it has seen after the chapter.

**Ask.** What does the main number leave open?
*Answer.* What it does not measure.
"""


def title(name: str) -> str:
    """Return the title of a chapter, from the name of its file without suffix."""
    return name[3:].replace("_", " ").capitalize()


def chapter(name: str = "01_small") -> nbs.Notebook:
    """Return the template with a new name in its title, its link and its figure."""
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("# 1. Small", f"# {int(name[:2])}. {title(name)}")
    return json.loads(text.replace("01_small", name).replace("fig-01-", f"fig-{name[:2]}-"))


def refusal(name: str, root: Path) -> str | None:
    """Return why a new chapter cannot have this name, or None."""
    taken = {p.stem[:2]: p.name for p in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    number = f"{max(map(int, taken), default=0) + 1:02}"
    if not NAME.fullmatch(name):
        reason = f"{name!r} is not two digits and lower-case words, joined by _."
    elif name[:2] in taken:
        reason = f"Chapter {name[:2]} exists: notebooks/{taken[name[:2]]}."
    elif name[:2] != number:
        reason = f"Chapters are numbered without gaps, so {name[:2]} cannot be next."
    else:
        return None
    return f"{reason} The next chapter is {number}: make chapter NAME={number}_some_words"


def into_contents(name: str, path: Path) -> None:
    """Add a chapter to the table of contents, after the last one there."""
    text = path.read_text(encoding="utf-8")
    *_, last = re.finditer(r"^( *- file: notebooks/)\S+\n", text, re.M)
    text = f"{text[: last.end()]}{last[1]}{name}\n{text[last.end() :]}"
    path.write_text(text, encoding="utf-8", newline="\n")


def into_teaching(name: str, path: Path) -> None:
    """Add a chapter to the page for teachers: a row in the table, its sums, and a section."""
    text, number = path.read_text(encoding="utf-8"), int(name[:2])
    link = f"[{number}](../notebooks/{name}.ipynb) {title(name)}"
    row = "".join(f"| {cell or ''} ".replace("  ", " ") for cell in (link, *MINUTES))
    *_, last = re.finditer(r"^\| \[\d+\]\(.*\n", text, re.M)
    text = f"{text[: last.end()]}{row}|\n{text[last.end() :]}"
    before = re.search(r"^\| sum \|(.*)\|$", text, re.M)
    sums = (str(int(a) + b) for a, b in zip(before[1].split("|"), MINUTES, strict=True))
    text = text.replace(before[0], f"| sum | {' | '.join(sums)} |")
    text += SECTION.format(number=number, words=title(name))
    path.write_text(text, encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Write a new chapter; return the exit status."""
    parser = argparse.ArgumentParser(description="Begin a chapter that passes all checks.")
    parser.add_argument("name", help="two digits and lower-case words, such as 12_expression")
    name = parser.parse_args(argv).name
    if reason := refusal(name, root):
        print(reason, file=sys.stderr)
        return 1
    nbs.write(chapter(name), root / "notebooks" / f"{name}.ipynb")
    wrong = root / "tests" / "wrong_answers" / f"{name}.py"
    wrong.write_text(WRONG, encoding="utf-8", newline="\n")
    into_contents(name, root / "_toc.yml")
    into_teaching(name, root / "book" / "teaching.md")
    print(NEXT.format(name=name, number=name[:2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
