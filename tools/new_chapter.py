"""Begin a chapter: a small one that follows every rule and runs, ready to be filled.

From then on, a failing check is about the last change. The tests of the tools use it, too.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import anatomy
import notebooks as nbs
from notebooks import ROOT

NAME = re.compile(r"[0-9]{2}(_[a-z0-9]+)+")
NEXT = """\
notebooks/{name}.ipynb follows every rule and runs. It is now the last chapter in _toc.yml, with
wrong answers in tests/wrong_answers/{name}.py, and a row and a section in book/teaching.md.
Next:
- write it in JupyterLab: make lab, then the folder notebooks
- run it alone: .venv/bin/python tools/run_notebooks.py {number}
- before a commit: .venv/bin/python tools/anatomy.py strip, then the same with check
- name it in book/welcome.md and at the end of the chapter before it
- fill its section of book/teaching.md, and update the minutes in the table there
- at the end: make lint, make book, make test"""

MINUTES, EACH = 10, 3  # to teach the rounds, and to do one of the two exercises
WRONG = """\
WRONG = {
    1: [(1, "not the sum"), (3, "not the sum")],
    2: [(2, "not the sum"), (4, "not the sum")],
}
"""
PARAMETERS = 'STUDY = "demo"  # which study runs\nSEED = 0  # of every draw'
SETUP = """\
rng = np.random.default_rng(SEED)
print(STUDY)  # slides.load_study(STUDY), of helpers, loads its slides"""
SECTION = """
### {number} {words}

**Skip** *Round 4*, unless the class asks for it.

**People get lost** where they confuse two things: say what helps.

**Ask.** What does the class expect before the chapter?
*Answer.* What it has seen after the chapter.

**Ask.** What does the main number leave open?
*Answer.* What it does not measure.
"""


def markdown(name: str, text: str) -> dict[str, Any]:
    """Return a cell of text."""
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def code(name: str, text: str, *tags: str, **metadata: Any) -> dict[str, Any]:
    """Return a cell of code."""
    if tags:
        metadata["tags"] = list(tags)
    return {"cell_type": "code", "id": name, "metadata": metadata, "source": text}


def one_round(k: int) -> list[dict[str, Any]]:
    """Return a round: why, a prediction, code, and the result in words."""
    why = (
        f"## Round {k}\n\nSay why this step is needed.\n"
        "The page links the first mention of each word of the glossary, "
        "such as spot, donor, gene panel and embedding.\n\n"
        "**Predict.** Ask for the result."
    )
    return [
        markdown(f"round-{k}", why),
        code(f"code-{k}", f"print(rng.integers({k} + 1))"),
        markdown(f"seen-{k}", "Say the result in words."),
    ]


def exercise(k: int) -> list[dict[str, Any]]:
    """Return prompt with hint, stub, check and solution."""
    hint = "<details><summary>Hint</summary>\n\nAdd them.\n\n</details>"
    hidden = {"source_hidden": True}
    check = f"""def check_{k}(answer):
    if answer is None:
        return "Not answered yet: add the two numbers"
    assert answer == {k} + 1, "that is not the sum"
    return "Correct: the sum"


check_{k}(answer_{k})"""
    return [
        markdown(f"exercise-{k}", f"### Exercise {k} ({EACH} minutes)\n\nAdd {k} and 1.\n\n{hint}"),
        code(f"stub-{k}", f"answer_{k} = None  # your code here", "exercise"),
        code(f"check-{k}", check, "check"),
        code(f"solution-{k}", f"check_{k}({k} + 1)", "solution", "hide-cell", jupyter=hidden),
    ]


def quick_check(k: int) -> dict[str, Any]:
    """Return a question with its answer."""
    answer = "<details><summary>Answer</summary>\n\nBecause.\n\n</details>"
    return markdown(f"quick-{k}", f"**Quick check.** Why?\n\n{answer}")


def title(name: str) -> str:
    """Return the title of a chapter, from the name of its file without suffix."""
    return name[3:].replace("_", " ").capitalize()


def opening(name: str) -> list[dict[str, Any]]:
    """Return title, objectives and the four cells of code that every chapter begins with."""
    repository = anatomy.REPOSITORY.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb"
    return [
        markdown(
            "title",
            f"# {int(name[:2])}. {title(name)}\n\n"
            "**Question.** What does this chapter ask?\n\n"
            f"**In one sentence.** The result.\n\n[Open in Colab]({link})",
        ),
        markdown(
            "objectives",
            "## Objectives\n\n- Say what the reader can do after the chapter.\n"
            "- Begin each line with a verb.\n- Stop after five lines.\n\n"
            "**Prerequisites.** The chapters before it, as links.\n\n"
            f"**Time.** {MINUTES} minutes to teach; seconds to run on a CPU.\n\n"
            "**Data.** The study named in the parameters: by default `demo`, which is simulated.",
        ),
        code("colab", anatomy.COLAB_GUARD, "colab", "remove-cell"),
        code("imports", "import matplotlib.pyplot as plt\nimport numpy as np", "imports"),
        code("parameters", PARAMETERS, "parameters"),
        code("setup", SETUP, "setup"),
    ]


def figure(name: str) -> dict[str, Any]:
    """Return a figure with caption, name and alt text."""
    return code(
        "fig-line",
        "plt.plot([0, 1], [0, 1])\nplt.show()",
        "figure",
        mystnb={
            "figure": {"caption": "A line from one corner.", "name": f"fig-{name[:2]}-line"},
            "image": {"alt": "A straight line from the lower left to the upper right."},
        },
    )


def chapter(name: str = "01_small") -> dict[str, Any]:
    """Return a chapter that follows every rule, as parsed JSON."""
    cells = [
        *opening(name),
        *one_round(1),
        *one_round(2),
        figure(name),
        quick_check(1),
        *one_round(3),
        quick_check(2),
        *one_round(4),
        *exercise(1),
        *exercise(2),
        code("claims", "assert SEED == 0", "claims"),
        markdown(
            "end",
            "## Key points\n\n- What to remember.\n\n## Limits\n\n- What was not shown.\n\n"
            "## What is next\n\nThe question that this leaves open.\n\n"
            "## References\n\n- A. Author. A title. https://doi.org/10.1000/182",
        ),
    ]
    return nbs.strip({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


# --- writing it --------------------------------------------------------------------------------


def refusal(name: str, root: Path) -> str | None:
    """Return why a new chapter cannot have this name, or None."""
    taken = {p.stem[:2]: p.name for p in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    number = f"{max(map(int, taken), default=0) + 1:02}"
    if not NAME.fullmatch(name):
        reason = f"{name!r} is not two digits and words in small letters with _ between."
    elif name[:2] in taken:
        reason = f"Chapter {name[:2]} exists: notebooks/{taken[name[:2]]}."
    elif name[:2] != number:
        reason = f"Chapters are numbered without gaps, so {name[:2]} cannot be the next one."
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
    minutes = [MINUTES, 2 * EACH, 0, 0, MINUTES + 2 * EACH]  # in self-study alone
    link = f"[{number}](../notebooks/{name}.ipynb) {title(name)}"
    row = "".join(f"| {cell or ''} ".replace("  ", " ") for cell in (link, *minutes))
    *_, last = re.finditer(r"^\| \[\d+\]\(.*\n", text, re.M)
    text = f"{text[: last.end()]}{row}|\n{text[last.end() :]}"
    before = re.search(r"^\| sum \|(.*)\|$", text, re.M)
    sums = (str(int(a) + b) for a, b in zip(before[1].split("|"), minutes, strict=True))
    text = text.replace(before[0], f"| sum | {' | '.join(sums)} |")
    text += SECTION.format(number=number, words=title(name))
    path.write_text(text, encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Write a new chapter; return the exit status."""
    parser = argparse.ArgumentParser(description="Begin a chapter that passes all checks.")
    parser.add_argument("name", help="two digits and words in small letters, as 12_expression")
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
