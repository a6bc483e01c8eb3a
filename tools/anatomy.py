"""The anatomy of a chapter, one rule per function; as a script: strip or check the chapters.

A rule takes a notebook and its file name without the suffix, and yields the problems it finds; each
names the cell. ``output_problems`` does the same for the outputs of an executed chapter.
``tests/test_notebooks.py`` applies all this to every chapter, and breaks every rule once.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import notebooks as nbs
import repository
from notebooks import Cell, Notebook

Problems = Iterator[str]
REPOSITORY = repository.url()
# Unconstrained, pip would replace Colab's numpy, pandas and IPython, which its kernel has imported.
COLAB_GUARD = f"""import sys

if "google.colab" in sys.modules:
    %pip list --format=freeze > preinstalled.txt
    %pip install -q -c preinstalled.txt "stimage-book[imagenet] @ git+{REPOSITORY}\""""
FIRST_TAGS = ("colab", "imports", "parameters", "setup")
LAST_HEADINGS = ("Key points", "Limits", "What is next", "References")
MAX_LINES, MAX_IMPORT_LINES = 20, 15
IMPORT = re.compile(r"^(?:import|from) \w", re.M)
PARAMETER = re.compile(r"[A-Z][A-Z0-9_]* = .+?  # \S.*")
ROLE = re.compile(r"\{[a-z][a-z:-]*\}`|^\s*(```|:::+)\{", re.M)
LOCAL_PATH = re.compile(r"(?<![\w.~:/-])/(?:home|Users|root|tmp|work|mnt|private)/\w|\b[A-Z]:\\\w")
SENTENCE_END = re.compile(r"(?P<word>[\w)`*_%$\"']+)[.!?][*_)\"']* (?=[*_(\"']*[A-Z])")
LINE_START = re.compile(r"^\s*(?:[-*] |\d+\. )?\s*(?:\*\*[^*]+\*\*\s)?")
CODE_OR_MATH = re.compile(r"`[^`]*`|\$[^$]*\$")
OWN_LOG = re.compile(r"(slide \S.*\n?)+")  # remarks of the helpers, which a page may show
ABBREVIATIONS = {"al", "cf", "Dr", "Fig", "vs", "No", "Eq", "approx"}


def code_cells(notebook: Notebook, tag: str | None = None) -> list[Cell]:
    """Return the code cells, or those with a tag."""
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    return [c for c in cells if tag is None or tag in nbs.tags(c)]


def last_line(cell: Cell) -> str:
    """Return the last line of a cell."""
    return nbs.source(cell).strip().splitlines()[-1]


def markdown_cells(notebook: Notebook) -> list[Cell]:
    """Return the cells of text."""
    return [c for c in notebook["cells"] if c["cell_type"] == "markdown"]


def prose(cell: Cell) -> str:
    """Return a cell of text without its fenced code."""
    return re.sub(r"^```.*?^```", "", nbs.source(cell), flags=re.M | re.S)


# --- the rules ---------------------------------------------------------------------------------


def valid(notebook: Notebook, _: str) -> Problems:
    """A valid notebook with unique ids."""
    from nbformat.validator import iter_validate

    for error in iter_validate(notebook):
        yield f"the notebook is not valid: {str(error).splitlines()[0]}"
    ids = [c.get("id") for c in notebook["cells"]]
    yield from (f"cell id {i} is used twice" for i in dict.fromkeys(ids) if ids.count(i) > 1)


def stripped(notebook: Notebook, _: str) -> Problems:
    """Nbformat 4.5, without outputs, counts or editor metadata."""
    clean = nbs.strip(notebook)
    if notebook != clean:
        cells = [nbs.name(c) for c in notebook["cells"] if c not in clean["cells"]]
        where = ", ".join(cells) or "the metadata or version of the notebook"
        yield f"strip would change {where}: run tools/anatomy.py strip"


def title(notebook: Notebook, name: str) -> Problems:
    """First cell: numbered title, the question, the result in one sentence, the Colab link."""
    text, path = nbs.source(notebook["cells"][0]), repository.owner_and_name(REPOSITORY)
    if not re.match(rf"# {int(name[:2])}\. \S", text):
        yield f"the first line is not '# {int(name[:2])}. Title'"
    link = f"[Open in Colab](https://colab.research.google.com/github/{path}/blob/main/notebooks/{name}.ipynb)"
    for part in ("**Question.**", "**In one sentence.**", link):
        if part not in text:
            yield f"the title cell has no {part}"


def objectives(notebook: Notebook, _: str) -> Problems:
    """Second cell: three to five objectives; prerequisites, time and data."""
    text = nbs.source(notebook["cells"][1])
    if not text.startswith("## Objectives"):
        yield "the second cell does not start with '## Objectives'"
    if not 3 <= len(re.findall(r"^[-*] ", text, re.M)) <= 5:
        yield "there are not three to five objectives"
    for part in ("**Prerequisites.**", "**Time.**", "**Data.**"):
        if part not in text:
            yield f"the objectives cell has no {part} line"


def opening(notebook: Notebook, _: str) -> Problems:
    """Cells three to six: colab, imports, parameters, setup, in this order."""
    for position, tag in enumerate(FIRST_TAGS, start=2):
        cell = notebook["cells"][position]
        if cell["cell_type"] != "code" or tag not in nbs.tags(cell):
            yield f"cell number {position + 1} is not the code cell tagged {tag}"
        if len(code_cells(notebook, tag)) != 1:
            yield f"there is not exactly one cell tagged {tag}"


def colab(notebook: Notebook, _: str) -> Problems:
    """The install for Colab is the same in every chapter, guarded, and hidden in the book."""
    for cell in code_cells(notebook, "colab"):
        if re.sub(r"\n+", "\n", nbs.source(cell).strip()) != re.sub(r"\n+", "\n", COLAB_GUARD):
            yield f"{nbs.name(cell)} is not the guarded install that all chapters share"
        if "remove-cell" not in nbs.tags(cell):
            yield f"{nbs.name(cell)} is not tagged remove-cell"


def imports(notebook: Notebook, _: str) -> Problems:
    """All imports in one short cell; ruff finds those that are not used."""
    for cell in code_cells(notebook):
        if "imports" in nbs.tags(cell):
            if len(nbs.source(cell).strip().splitlines()) > MAX_IMPORT_LINES:
                yield f"{nbs.name(cell)} is longer than {MAX_IMPORT_LINES} lines"
        elif "colab" not in nbs.tags(cell) and IMPORT.search(nbs.source(cell)):
            yield f"{nbs.name(cell)} has an import: move it to the imports cell"


def parameters(notebook: Notebook, _: str) -> Problems:
    """Commented scalars, one a line, STUDY = "demo" and SEED among them."""
    for cell in code_cells(notebook, "parameters"):
        text = nbs.source(cell)
        for line in re.findall(r"^[^#\n].*", text, re.M):
            if not PARAMETER.fullmatch(line):
                yield f"{nbs.name(cell)}: the line is not 'NAME = value  # comment': {line}"
            elif not isinstance(ast.parse(line).body[0].value, ast.Constant | ast.UnaryOp):
                yield f"{nbs.name(cell)}: the value is not a scalar: {line}"
        if 'STUDY = "demo"' not in text or not re.search("^SEED = ", text, re.M):
            yield f'{nbs.name(cell)} has no STUDY = "demo" or no SEED'


def length(notebook: Notebook, _: str) -> Problems:
    """A code cell has one idea, so it is short, and no cell is empty."""
    for cell in notebook["cells"]:
        lines = len(nbs.source(cell).strip().splitlines())
        if cell["cell_type"] == "code" and lines > MAX_LINES:
            yield f"{nbs.name(cell)} has {lines} lines, more than {MAX_LINES}"
        if not nbs.source(cell).strip():
            yield f"{nbs.name(cell)} is empty"


def sections(notebook: Notebook, level: str = "##") -> list[tuple[str, list[Cell]]]:
    """Return every heading of a level with the cells from there to the next."""
    found = [("", [])]
    for cell in notebook["cells"]:
        text = prose(cell) if cell["cell_type"] == "markdown" else ""
        found += [(heading.strip(), []) for heading in re.findall(rf"^{level} (.+)$", text, re.M)]
        found[-1][1].append(cell)
    return found[1:]


def rounds(notebook: Notebook, _: str) -> Problems:
    """Four to seven rounds, each with a prediction and with code."""
    fixed = {"Objectives", "Exercises", *LAST_HEADINGS}
    own = [(heading, cells) for heading, cells in sections(notebook) if heading not in fixed]
    if not 4 <= len(own) <= 7:
        yield f"there are {len(own)} rounds of '## heading', not four to seven"
    for heading, cells in own:
        if not any(c["cell_type"] == "code" for c in cells):
            yield f"round '{heading}' has no code"
        if not any("**Predict.**" in nbs.source(c) for c in cells):
            yield f"round '{heading}' has no **Predict.**"


def figures(notebook: Notebook, name: str) -> Problems:
    """A figure has a caption, a name and alt text, and shows only its image."""
    seen = set()
    for cell in code_cells(notebook):
        settings = cell["metadata"].get("mystnb", {})
        if "figure" not in nbs.tags(cell):
            if "figure" in settings:
                yield f"{nbs.name(cell)} has a caption but no tag figure"
            continue
        figure, alt = settings.get("figure", {}), settings.get("image", {}).get("alt", "")
        label = figure.get("name", "")
        if len(figure.get("caption", "")) < 20:
            yield f"{nbs.name(cell)} has no caption, or one of under 20 characters"
        if not re.fullmatch(rf"fig-{name[:2]}-[a-z0-9-]+", label) or label in seen:
            yield f"{nbs.name(cell)}: figure name '{label}' is not a new fig-{name[:2]}-something"
        if len(alt) < 30 or alt == figure.get("caption"):
            yield f"{nbs.name(cell)} has no alt text of its own, of 30 characters or more"
        if not last_line(cell).endswith((";", "plt.show()")):
            yield f"{nbs.name(cell)} ends with neither ';' nor plt.show(), so a repr may be shown"
        seen.add(label)
    if not seen:
        yield "there is no figure"


def exercises(notebook: Notebook, _: str) -> Problems:
    """Two to four exercises: prompt and hint, stub, check, hidden solution."""
    numbers = []
    for heading, cells in sections(notebook, "###?"):
        if prompt := re.match(r"Exercise (\d+)(.*)", heading):
            numbers.append(int(prompt[1]))
            yield from exercise(numbers[-1], prompt[2], cells)
    if numbers != list(range(1, len(numbers) + 1)) or not 2 <= len(numbers) <= 4:
        yield f"exercises are numbered {numbers}, not 1 to 2, 3 or 4"


def exercise(k: int, minutes: str, cells: list[Cell]) -> Problems:
    """Check the cells of one exercise."""
    if not re.fullmatch(r" \(\d+ minutes\)", minutes):
        yield f"exercise {k} does not say '(N minutes)' in its heading"
    if not any("<details><summary>Hint</summary>\n\n" in nbs.source(c) for c in cells):
        yield f"exercise {k} has no collapsed hint"
    code = [c for c in cells if c["cell_type"] == "code"]
    kinds = [next(iter(nbs.tags(c) & {"exercise", "check", "solution"}), None) for c in code]
    if kinds[:3] != ["exercise", "check", "solution"]:
        yield f"exercise {k} is followed by {kinds}, not by stub, check, solution"
        return
    stub, check, solution = code[:3]
    if not re.search(rf"^answer_{k} = ", nbs.source(stub), re.M):
        yield f"exercise {k}: the stub does not assign answer_{k}"
    called = f"check_{k}(answer_{k})" in last_line(check)
    if not called or f"def check_{k}(" not in nbs.source(check):
        yield f"exercise {k}: the check does not define check_{k} and call it on answer_{k}"
    if f"check_{k}(" not in last_line(solution):
        yield f"exercise {k}: the last line of the solution does not call check_{k}"
    hidden = solution["metadata"].get("jupyter", {}).get("source_hidden")
    if not (hidden and "hide-cell" in nbs.tags(solution)):
        yield f"exercise {k}: the solution is not hidden (tag hide-cell, jupyter.source_hidden)"


def quick_checks(notebook: Notebook, _: str) -> Problems:
    """At least two questions whose answer is collapsed."""
    asked = [c for c in markdown_cells(notebook) if "**Quick check.**" in nbs.source(c)]
    if len(asked) < 2:
        yield f"there are {len(asked)} quick checks, not two or more"
    for cell in asked:
        if "<details><summary>Answer</summary>\n\n" not in nbs.source(cell):
            yield f"{nbs.name(cell)}: the quick check has no collapsed answer"


def claims(notebook: Notebook, _: str) -> Problems:
    """The chapter asserts what it claims."""
    if not any("assert " in nbs.source(c) for c in code_cells(notebook, "claims")):
        yield "no code cell tagged claims asserts anything"


def closing(notebook: Notebook, _: str) -> Problems:
    """Key points, limits, what is next and references with DOIs close the chapter."""
    last = tuple(heading for heading, _ in sections(notebook))[-len(LAST_HEADINGS) :]
    if last != LAST_HEADINGS:
        yield f"the chapter ends with {last}, not with {LAST_HEADINGS}"
    text = "\n".join(nbs.source(c) for c in markdown_cells(notebook))
    if "https://doi.org/10." not in text.rpartition("## References")[2]:
        yield "the references give no DOI"


def plain_markdown(notebook: Notebook, _: str) -> Problems:
    """Only Markdown that Jupyter, Colab and the book can all show; images have alt text."""
    for cell in markdown_cells(notebook):
        text = prose(cell)
        if ROLE.search(nbs.source(cell)):
            yield f"{nbs.name(cell)} uses a role or a directive, which only the book can show"
        without_code = re.sub(r"`[^`\n]*`|<https?://\S+>", "", text)
        if unknown := set(re.findall(r"</?([a-z]+)[ >/]", without_code)) - {"details", "summary"}:
            yield f"{nbs.name(cell)} uses HTML other than details: {sorted(unknown)}"
        if "![](" in text:
            yield f"{nbs.name(cell)} has an image without alt text"
        if text.count("<details>") != text.count("</details>"):
            yield f"{nbs.name(cell)} leaves a <details> open"
        if re.search(r"</summary>\n(?!\n)", text):
            yield f"{nbs.name(cell)} has no blank line after </summary>"


def one_sentence_per_line(notebook: Notebook, _: str) -> Problems:
    """One sentence per line of prose, so that a diff shows the sentence that changed."""
    for cell in markdown_cells(notebook):
        for line in prose(cell).partition("## References")[0].splitlines():
            if line.startswith(("#", "|", "<", "$$")):
                continue
            rest = CODE_OR_MATH.sub("x", LINE_START.sub("", line))
            words = [m["word"] for m in SENTENCE_END.finditer(rest)]
            if any(len(w) > 1 and w not in ABBREVIATIONS for w in words):
                yield f"{nbs.name(cell)} has two sentences on a line: {line[:60]}..."


def no_local_path(notebook: Notebook, _: str) -> Problems:
    """No path of a local machine."""
    for cell in notebook["cells"]:
        if found := LOCAL_PATH.search(nbs.source(cell)):
            yield f"{nbs.name(cell)} names a local path: {found[0]}"


RULES = (
    valid, stripped, title, objectives, opening, colab, imports, parameters, length, rounds,
    figures, exercises, quick_checks, claims, closing, plain_markdown, one_sentence_per_line,
    no_local_path,
)  # fmt: skip


def problems(notebook: Notebook, name: str) -> list[str]:
    """Return the problems of a chapter, such as ``01_loading``; each message names the rule."""
    return [f"{rule.__name__}: {found}" for rule in RULES for found in rule(notebook, name)]


# --- executed chapters -------------------------------------------------------------------------


def output_problems(notebook: Notebook, local: tuple[str, ...] = ()) -> list[str]:
    """Return what a reader should not see; ``local`` are folders of this machine."""
    return [
        f"{nbs.name(cell)} {found}"
        for cell in code_cells(notebook)
        for found in bad_outputs(nbs.tags(cell), cell["outputs"], local)
    ]


def bad_outputs(tags: set[str], outputs: list[dict[str, Any]], local: tuple[str, ...]) -> Problems:
    """Check the outputs of one cell."""
    for output in outputs:
        if output["output_type"] == "error":
            yield f"failed: {output['ename']}: {output['evalue']}"
        if output.get("name") == "stderr" and not OWN_LOG.fullmatch(shown([output])):
            yield f"wrote to stderr: {shown([output])[:300]}"
    if "check" in tags and "Not answered yet" not in shown(outputs):
        yield f"does not say 'Not answered yet' to an untouched stub but {shown(outputs)[:80]!r}"
    if "solution" in tags and not re.search(r"^['\"]?Correct", shown(outputs), re.M):
        yield f"does not say 'Correct' to the solution but {shown(outputs)[-80:]!r}"
    if "figure" in tags:
        images = [o for o in outputs if "image/png" in o.get("data", {})]
        if len(images) != 1:
            yield f"shows {len(images)} images, not one"
        if beside := [o for o in outputs if o not in images and o.get("name") != "stderr"]:
            yield f"shows text beside its figure: {shown(beside)[:80]!r}"
    for path in (path for path in local if path in json.dumps(outputs)):
        yield f"shows a path of this machine: {path}"


def shown(outputs: list[dict[str, Any]]) -> str:
    """Return everything that was printed or shown as text."""
    texts = (o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)
    return "\n".join("".join(text) for text in texts)


# --- the script --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Strip notebooks in place, or check them; return the exit status."""
    parser = argparse.ArgumentParser(description="Strip or check the notebooks of the book.")
    parser.add_argument("action", choices=["strip", "check"])
    parser.add_argument("paths", nargs="*", type=Path, help="default: all of notebooks/")
    options = parser.parse_args(argv)
    failed = False
    for path in options.paths or sorted((nbs.ROOT / "notebooks").glob("*.ipynb")):
        if options.action == "strip":
            nbs.write(nbs.strip(nbs.read(path)), path)
            continue
        for problem in problems(nbs.read(path), path.stem):
            failed = True
            print(f"{path.name}: {problem}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
